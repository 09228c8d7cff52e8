"""The driver's own cost: seconds to plan, run and resume tens of thousands of stages that do nothing.

    python benchmarks/driver.py                           # 10,000 and 100,000 stages; a quarter of an hour
    python benchmarks/driver.py --run 10000 --trials 200

A real sweep file, laid out by the real planner (one decoder, two encoders, five conditions, four
depths, two selectors, two modes, and as many seeds as it takes), with workers that call a function
of `noop.py` in place of the stages. Beside it, on the same Ray and in the same run: a bare loop of
`ray.remote` tasks with a bounded number in flight, and Ray Tune's grid over as many trials as one has
patience for. Each figure is of a fresh process: driver CPU is that process's alone (`os.times`, Ray's
threads in it included; workers not), memory its `ru_maxrss`.
"""

import argparse
import json
import os
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SEED_STAGES, OTHER_STAGES = 420, 42
"""Stages of the sweep below: for every seed, and besides."""
MEBI = 2**20


def sweep_of(stages: int) -> dict[str, Any]:
    """A sweep file of about that many stages."""
    seeds = max(1, round((stages - OTHER_STAGES) / SEED_STAGES))
    return {
        "name": f"many-{stages}",
        "models": [{"decoder": "lab:llama"}],
        "encoders": [{"encoder": "lab:whisper"}, {"encoder": "lab:conformer"}],
        "tasks": [
            {"task": "asr", "language": ["en", "de", "fr"], "data": "lab:speech"},
            {
                "task": "ast",
                "language": ["de", "fr"],
                "target_language": "en",
                "data": "lab:speech",
            },
        ],
        "depths": [0, 2, 4, 6],
        "selectors": ["consensus", "last"],
        "seeds": list(range(seeds)),
        "heal": {"modes": ["decoder", "joint"]},
        "maps": {"text": False},
    }


# --- each of these runs in a process of its own --------------------------------------------------


@contextmanager
def spent(into: dict[str, float], name: str) -> Iterator[None]:
    """Note seconds by the clock and by this process's CPU."""
    began, before = time.perf_counter(), os.times()
    yield
    after = os.times()
    into[f"{name}_seconds"] = time.perf_counter() - began
    into[f"{name}_cpu"] = sum(after[:4]) - sum(before[:4])


def host(options: argparse.Namespace) -> None:
    """An embedded Ray that the others join, until its stdin is closed."""
    from cluster.connection import Cluster

    with Cluster(cpus=options.cpus):
        import ray

        print(json.dumps({"address": ray.get_runtime_context().gcs_address}), flush=True)
        sys.stdin.read()


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """What `layersweep run` does between reading the file and the report."""
    import yaml
    from rich.console import Console

    from cluster.connection import Capacity, Cluster
    from orchestrator.driver import Driver
    from orchestrator.plan import build_plan
    from orchestrator.reuse import assess
    from orchestrator.runs import Fence, RunFolder
    from orchestrator.sources import DigestCache
    from orchestrator.store import open_store
    from orchestrator.sweep import load_sweep
    from orchestrator.watch import PlainWatch

    found: dict[str, Any] = {"imports_mib": peak_mib()}
    os.chdir(options.folder)
    file = Path(f"{options.stages}.yaml")
    file.write_text(yaml.safe_dump(sweep_of(options.stages)))
    store = open_store("store")
    with spent(found, "read"):
        sweep = load_sweep(file, ())
    with spent(found, "plan"):
        plan = build_plan(sweep, Path.cwd(), DigestCache(store.folder / "digests.json"))
    with spent(found, "assess"):
        assessment = assess(plan, store)
    found["stages"] = len(plan.nodes)
    found["to_run"] = len(plan.nodes) - assessment.count("reuse") - assessment.count("unneeded")
    folder = RunFolder(Path("runs") / sweep.name)

    def drive(look: Callable[[], Capacity]) -> None:
        with folder.lock() as hold:
            with spent(found, "start"):
                folder.start(sweep, Path.cwd(), store.location, plan)
                fence = Fence(store, folder.identity(), hold)
            with spent(found, "drive"), Path(os.devnull).open("w") as sink:
                driver = Driver(
                    plan, store, folder, sweep, look, fence,
                    PlainWatch(Console(file=sink), plan), {},
                    assessment=assessment, target=f"noop:{options.target}",
                )  # fmt: skip
                outcome = driver.execute()
        assert outcome.complete, outcome
        found["ran"] = outcome.done - outcome.reused

    if found["to_run"]:
        with Cluster(options.address) as cluster:
            drive(cluster.capacity)
    else:
        drive(lambda: Capacity(()))
    found["drive_mib"] = peak_mib()
    command = [sys.executable, "-m", "orchestrator.cli", "status", sweep.name, "--json"]
    with spent(found, "status"):
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return found


def loop(options: argparse.Namespace) -> dict[str, Any]:
    """A bare loop of tasks, twice as many in flight as there are CPUs."""
    from cluster.connection import Cluster

    found: dict[str, Any] = {"imports_mib": peak_mib()}
    with Cluster(options.address) as cluster:
        import ray
        from noop import commit, nothing

        function = {"commit": commit, "nothing": nothing}[options.target]
        payloads = payloads_of(Path(options.folder), options.stages)
        task = ray.remote(max_retries=0, num_cpus=1)(function)
        slots = 2 * int(cluster.capacity().cpus)
        with spent(found, "drive"):
            flying: list[Any] = []
            for payload in payloads:
                if len(flying) >= slots:
                    done, flying = ray.wait(flying, num_returns=1)
                    ray.get(done)
                flying.append(task.remote(payload, 0, 1, None))
            ray.get(flying)
    return found | {"ran": options.stages, "drive_mib": peak_mib()}


def tune(options: argparse.Namespace) -> dict[str, Any]:
    """Ray Tune's grid with a trainable that does the same, and its own resume of the finished grid."""
    from cluster.connection import Cluster

    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    found: dict[str, Any] = {}
    with Cluster(options.address):
        from noop import commit, nothing
        from ray import tune as ray_tune

        found["imports_mib"] = peak_mib()
        function = {"commit": commit, "nothing": nothing}[options.target]
        payloads = payloads_of(Path(options.folder), options.stages)

        def trainable(config: dict[str, Any]) -> dict[str, int]:
            function(payloads[config["index"]], 0, 1, None)
            return {"answer": 42}

        run = ray_tune.RunConfig(
            name="grid", storage_path=str(Path(options.folder) / "tune"), verbose=0
        )
        with spent(found, "drive"):
            results = ray_tune.Tuner(
                trainable,
                param_space={"index": ray_tune.grid_search(list(range(options.stages)))},
                tune_config=ray_tune.TuneConfig(reuse_actors=True),
                run_config=run,
            ).fit()
        assert results.num_errors == 0
        with spent(found, "resume"):
            again = ray_tune.Tuner.restore(
                str(Path(options.folder) / "tune" / "grid"), trainable=trainable
            ).fit()
        assert len(again) == options.stages
    return found | {"ran": options.stages, "drive_mib": peak_mib()}


def payloads_of(folder: Path, count: int) -> list[dict[str, Any]]:
    """Work for the others: the same artefacts, in a store of their own."""
    from orchestrator.store import open_store

    store = open_store(folder / "store")
    store.write_note("bench", {"number": 1})
    return [
        {
            "id": str(i), "kind": "evaluate", "key": f"{i:032x}", "params": {"index": i}, "inputs": {},
            "store": store.location, "fence": {"name": "bench", "number": 1},
        }
        for i in range(count)
    ]  # fmt: skip


def peak_mib() -> float:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEBI


# --- the parent: imports nothing, since a child's ru_maxrss begins at what its parent held -------


def child(name: str, **options: Any) -> dict[str, Any]:
    """Run one of the above in a fresh process, and read what it found."""
    command = [sys.executable, __file__, "--child", name]
    for option, value in options.items():
        command += [f"--{option}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def one_ray(cpus: int) -> Iterator[str]:
    """A Ray for all of them; gives its address."""
    command = [sys.executable, __file__, "--child", "host", "--cpus", str(cpus)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["address"]
    finally:
        process.stdin.close()
        process.wait()


def measure(options: argparse.Namespace, folder: Path) -> None:
    """All of it, in turn."""
    print(f"load {os.getloadavg()[0]:.1f} before; {options.cpus} CPU slots", flush=True)
    first = options.run[0]
    ran: dict[tuple[str, str], dict[str, Any]] = {}
    with one_ray(options.cpus) as address:

        def on_ray(name: str, jobs: int, target: str) -> dict[str, Any]:
            place = room(folder, f"{name}-{target}")
            found = child(name, stages=jobs, target=target, address=address, folder=place)
            line(name, target, found)
            return found

        print(f"{'':24}{'jobs':>8}{'wall s':>9}{'CPU s':>9}{'CPU ms a job':>14}{'peak MiB':>10}")
        for target in ("nothing", "commit"):
            for name, jobs in (("ours", first), ("loop", first), ("tune", options.trials)):
                ran[name, target] = on_ray(name, jobs, target)
        for more in options.run[1:]:
            on_ray("ours", more, "commit")
    for (name, target), found in ran.items():
        if name != "ours":
            mine = per_job(ran["ours", target], "cpu")
            wall = per_job(ran["ours", target], "seconds")
            print(
                f"{name}, {target}: driver CPU a job {per_job(found, 'cpu') / mine:.2f} x ours, "
                f"wall-clock a job {per_job(found, 'seconds') / wall:.2f} x ours"
            )
    trials = ran["tune", "commit"]
    each = 1e3 * trials["resume_cpu"] / trials["ran"]
    print(
        f"Ray Tune, {trials['ran']} trials that are all done, restored: "
        f"{trials['resume_seconds']:.1f} s, {each:.2f} CPU ms each"
    )
    print("\nours, all done: seconds (and CPU seconds)")
    print(f"{'stages':>8}" + "".join(f"{name:>16}" for name in (*PHASES, "to resume")))
    for stages in options.run:
        place = room(folder, "ours-commit")
        found = child("ours", stages=stages, target="commit", address="none", folder=place)
        whole = sum(found[f"{name}_seconds"] for name in PHASES if name != "status")
        seconds = [
            f"{found[f'{name}_seconds']:.2f} ({found[f'{name}_cpu']:.2f})" for name in PHASES
        ]
        print(
            f"{found['stages']:8}"
            + "".join(f"{text:>16}" for text in (*seconds, f"{whole:.1f}"))
            + f"   peak {found['drive_mib']:.0f} MiB, "
            f"{found['drive_mib'] - found['imports_mib']:.0f} above the imports"
        )
    print(f"load {os.getloadavg()[0]:.1f} after")


PHASES = ("read", "plan", "assess", "start", "drive", "status")


def room(folder: Path, name: str) -> Path:
    """A folder of its own for one measurement."""
    place = folder / name
    place.mkdir(exist_ok=True)
    return place


def per_job(found: dict[str, Any], what: str) -> float:
    """Seconds, by the clock or of CPU, for each job that ran."""
    return float(found[f"drive_{what}"]) / int(found["ran"])


def line(name: str, target: str, found: dict[str, Any]) -> None:
    """One row of the table."""
    print(
        f"{name + ', ' + target:24}{found['ran']:8}{found['drive_seconds']:9.1f}"
        f"{found['drive_cpu']:9.2f}{1e3 * per_job(found, 'cpu'):14.2f}{found['drive_mib']:10.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run", type=int, nargs="+", default=[10_000, 100_000],
        help="stages to run and resume; the first number for all, the others for ours alone",
    )  # fmt: skip
    parser.add_argument("--trials", type=int, default=500, help="of Ray Tune")
    parser.add_argument("--cpus", type=int, default=os.cpu_count())
    parser.add_argument("--folder", help="work here, and leave it behind")
    for name in ("--child", "--target", "--address"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--stages", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    children: dict[str, Callable[[argparse.Namespace], Any]] = {
        "host": host, "ours": ours, "loop": loop, "tune": tune,
    }  # fmt: skip
    if options.child:
        answer = children[options.child](options)
        if answer:
            print(json.dumps(answer))
        return
    with tempfile.TemporaryDirectory() as scratch:
        # Ray's own token: whoever joins must have the one of the Ray that was started.
        token = Path(scratch) / "token"
        token.write_text(secrets.token_hex(32))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        measure(options, Path(options.folder or scratch).absolute())


if __name__ == "__main__":
    main()
