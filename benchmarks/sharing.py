"""A row of depths and healing modes by our driver, beside the script one writes without it.

    python benchmarks/sharing.py [--rounds 2] [--keep FOLDER]

The naive script is a fresh process for every cell of the results: it loads the base, encodes the
speech it needs, measures its map, chooses a block, prunes, heals and evaluates. It calls the very
stage functions that our workers call, so each cell must come out with the same scores, and that is
checked. Both sides have two processes of one thread at work, and take turns.

Outside the clock, and given to both: the lab's decoder, encoder and data, and the adapted base.
Inside it: everything else, on our side the start of Ray and the report as well. A naive process
encodes each split once, which is kind to it: a script that trains with the encoder in the loop does
so in every epoch.

CPU seconds are those of every process of a side, Ray's own included.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
WORKERS = 2
GIVEN = ("build", "adapt")
"""Kinds of stages that both sides find done."""

DATA = {
    "train": "lab:speech/train",
    "dev": "lab:speech/dev",
    "test": [{"name": "test", "data": "lab:speech/test"}],
}
SWEEP: dict[str, Any] = {
    "name": "row",
    "models": [{"decoder": "lab:llama"}],
    "encoders": [
        {"encoder": "lab:whisper", "projector": {"kind": "mlp", "stack": 2, "hidden": 256}}
    ],
    "tasks": [
        {"task": "asr", "language": "en", **DATA},
        {"task": "ast", "language": "de", "target_language": "en", **DATA},
    ],
    "depths": [0, 2, 4, 6],
    "selectors": ["own"],
    "adapt": {
        "steps": 320, "batch_size": 32, "lr_decoder": 3e-3, "lr_projector": 1e-3,
        "alignment_steps": 300,
    },
    "heal": {
        "modes": ["none", "decoder", "joint"], "steps": 50, "batch_size": 32,
        "lr_decoder": 1e-3, "lr_projector": 3e-4,
    },
    "maps": {"samples": 64, "text": False},
    "evaluate": {"batch_size": 128, "extra_tokens": 6},
}  # fmt: skip
"""The quickstart with one encoder and two conditions, each healed on its own."""


# --- a naive cell: the script in a fresh process -------------------------------------------------


def cell(script: Path) -> None:
    """Do the steps of one cell in this process, and leave its scores beside the script."""
    import pandas as pd
    import torch

    from orchestrator.graph import Choice
    from orchestrator.selectors import choose_start
    from workers.stages import STAGES, Context, Input

    torch.set_num_threads(1)
    scratch = script.with_suffix("")
    context = Context()
    for step in json.loads(script.read_text()):
        params = step["params"]
        if step["choice"] is not None:
            maps = [pd.read_parquet(scratch / name / "map.parquet") for name in step["maps"]]
            choice = Choice(**step["choice"])
            params["block"] = {"start": choose_start(choice, maps), "depth": choice.depth}
        out = scratch / step["name"]
        out.mkdir(parents=True)
        # What is given has an absolute path, which stands as it is.
        inputs = {role: Input(str(scratch / place)) for role, place in step["inputs"].items()}
        STAGES[step["kind"]].function()(params, inputs, out, context)
    scores = json.loads((out / "scores.json").read_text())
    script.with_suffix(".scores").write_text(json.dumps(scores))


def write_scripts(sweep: Path, store: Path, folder: Path) -> dict[str, Path]:
    """One script for each cell: the stages of the plan that lead to it, without those given."""
    from orchestrator.plan import build_plan
    from orchestrator.sources import DigestCache
    from orchestrator.sweep import load_sweep

    plan = build_plan(load_sweep(sweep, ()), sweep.parent, DigestCache(store / "digests.json"))
    numbers = {node_id: str(number) for number, node_id in enumerate(plan.nodes)}

    def place(node_id: str) -> str:
        kind = plan.nodes[node_id].kind
        return str(store / kind / str(plan.key(node_id))) if kind in GIVEN else numbers[node_id]

    scripts = {}
    for goal in plan.by_kind("evaluate"):
        needed, stack = set(), [goal.id]
        while stack:
            node_id = stack.pop()
            if node_id not in needed and plan.nodes[node_id].kind not in GIVEN:
                needed.add(node_id)
                stack.extend(plan.nodes[node_id].dependencies())
        steps = [
            {
                "name": numbers[node.id],
                "kind": node.kind,
                "params": node.params,
                "inputs": {role: place(other) for role, other in node.inputs.items()},
                "choice": None if node.choice is None else vars(node.choice),
                "maps": [numbers[other] for other in node.choice.maps] if node.choice else [],
            }
            for node in plan.nodes.values()
            if node.id in needed
        ]
        scripts[goal.id] = folder / f"{numbers[goal.id]}.json"
        scripts[goal.id].write_text(json.dumps(steps))
    return scripts


# --- the two sides -------------------------------------------------------------------------------


class TreeCpu(threading.Thread):
    """CPU seconds of a process and all it starts, looked at ten times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root, self._seen = psutil.Process(pid), dict[tuple[int, float], float]()

    def run(self) -> None:
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            try:
                tree = [self._root, *self._root.children(recursive=True)]
            except psutil.Error:
                return
            for process in tree:
                try:
                    used = process.cpu_times()
                    self._seen[process.pid, process.create_time()] = used.user + used.system
                except psutil.Error:
                    continue
            time.sleep(0.1)

    @property
    def seconds(self) -> float:
        """In all."""
        return sum(self._seen.values())


def ours(sweep: Path, given: Path, folder: Path) -> tuple[float, float, dict[str, Any]]:
    """Seconds by the clock and of CPU, and the scores of each cell."""
    for kind in GIVEN:
        shutil.copytree(given / kind, folder / "store" / kind)
    command = [sys.executable, "-m", "orchestrator.cli", "run", sweep, "--cpus", str(WORKERS)]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    cpu = TreeCpu(process.pid)
    cpu.start()
    status = process.wait()
    seconds = time.perf_counter() - began
    cpu.join()
    assert status == 0
    return seconds, cpu.seconds, scores_of(sweep, folder / "store")


def scores_of(sweep: Path, store: Path) -> dict[str, Any]:
    """What our store says of each cell."""
    from orchestrator.plan import build_plan
    from orchestrator.reuse import assess
    from orchestrator.sources import DigestCache
    from orchestrator.store import open_store
    from orchestrator.sweep import load_sweep

    opened = open_store(store)
    plan = build_plan(load_sweep(sweep, ()), sweep.parent, DigestCache(store / "digests.json"))
    assess(plan, opened)
    return {
        node.id: json.loads(
            (store / "evaluate" / str(plan.key(node.id)) / "scores.json").read_text()
        )
        for node in plan.by_kind("evaluate")
    }


def naive(sweep: Path, given: Path, folder: Path) -> tuple[float, float, dict[str, Any]]:
    """The same of the scripts, two at a time."""
    scripts = write_scripts(sweep, given, folder)
    waiting, running = list(scripts.values()), dict[int, Path]()
    cpu, began = 0.0, time.perf_counter()
    while waiting or running:
        while waiting and len(running) < WORKERS:
            script = waiting.pop(0)
            command = [sys.executable, __file__, "--cell", str(script)]
            with script.with_suffix(".log").open("w") as log:
                running[subprocess.Popen(command, stdout=log, stderr=log).pid] = script
        pid, status, used = os.wait3(0)
        script = running.pop(pid)
        assert status == 0, script.with_suffix(".log").read_text()
        cpu += used.ru_utime + used.ru_stime
    seconds = time.perf_counter() - began
    scores = {
        name: json.loads(script.with_suffix(".scores").read_text())
        for name, script in scripts.items()
    }
    return seconds, cpu, scores


# --- -------------------------------------------------------------------------------------------


def prepare(sweep: Path, folder: Path) -> Path:
    """Decoder, encoder, data and adapted base: a store that is given to both sides."""
    small = yaml.safe_load(sweep.read_text()) | {"depths": [0]}
    small["heal"]["modes"] = ["none"]
    first = folder / "given.yaml"
    first.write_text(yaml.safe_dump(small))
    command = [sys.executable, "-m", "orchestrator.cli", "run", first, "--store", folder / "given"]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return folder / "given"


def measure(folder: Path, rounds: int) -> None:
    """Both sides in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep = folder / "row.yaml"
    sweep.write_text(yaml.safe_dump(SWEEP))
    given = prepare(sweep, folder)
    spent: dict[str, list[tuple[float, float]]] = {"ours": [], "naive": []}
    for number in range(rounds):
        found = {}
        for name, side in (("ours", ours), ("naive", naive)):
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                wall, cpu, found[name] = side(sweep, given, Path(scratch))
            spent[name].append((wall, cpu))
            print(
                f"round {number + 1} {name:6} {len(found[name])} cells  wall {wall:7.1f} s  "
                f"CPU {cpu:7.1f} s  load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
        different = [name for name in found["ours"] if found["ours"][name] != found["naive"][name]]
        assert not different, different
    print("the scores of each cell are the same")
    for what, index in (("wall-clock", 0), ("CPU", 1)):
        medians = {name: statistics.median(s[index] for s in all_) for name, all_ in spent.items()}
        print(
            f"{what}: ours {medians['ours']:.1f} s, naive {medians['naive']:.1f} s, "
            f"{medians['naive'] / medians['ours']:.2f} x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep", help="work here, and leave what is given to both behind")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if options.cell:
        cell(Path(options.cell))
        return
    with tempfile.TemporaryDirectory() as scratch:
        measure(Path(options.keep or scratch).absolute(), options.rounds)


if __name__ == "__main__":
    main()
