"""A sweep handed to a real Ray head: followed over a line that breaks, asked after, cancelled, resumed."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from conftest import PROGRAM
from ray_head import HERE, Line, ray_head

from orchestrator.cli import main

SWEEP = """
name: away
models: [{decoder: lab:llama-tiny}]
encoders:
  - encoder: lab:whisper-tiny
    projector: {kind: mlp, stack: 2, hidden: 64}
tasks: [{task: asr, language: en, data: lab:speech-tiny}]
depths: [0, 1]
adapt: {steps: 3, batch_size: 8, alignment_steps: 3}
heal: {modes: [none], steps: 2, batch_size: 8}
maps: {samples: 8, text: false}
share: {base: true, heal: true}
"""


@dataclass(frozen=True)
class Laptop:
    """A folder that shares nothing with the cluster but an address."""

    folder: Path
    cluster: Path
    line: Line
    first: subprocess.CompletedProcess
    """The first submission, followed to its end."""

    @property
    def address(self) -> str:
        return f"http://{HERE}:{self.line.port}"

    def __call__(self, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess:
        """The command, in this process: importing Ray a dozen times would take half a minute."""
        out, errors, code = io.StringIO(), io.StringIO(), 0
        with (
            contextlib.chdir(folder or self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(sys, "argv", ["layersweep", *arguments])
            try:
                main()
            except SystemExit as left:
                code = left.code
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())

    def submit(self, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess:
        return self(
            *("submit", str(self.folder / "away.yaml"), "--address", self.address),
            *("--root", str(self.cluster), *arguments),
            folder=folder,
        )


@pytest.fixture(scope="module")
def laptop(tmp_path_factory):
    """After one submission whose connection was cut while it was followed."""
    folder, cluster = tmp_path_factory.mktemp("laptop"), tmp_path_factory.mktemp("cluster")
    (folder / "away.yaml").write_text(SWEEP)
    with pytest.MonkeyPatch.context() as patch, ray_head() as port:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        line = Line(port)
        yield Laptop(folder, cluster, line, follow_over(line, folder, cluster))
        line.cut()


def follow_over(line: Line, folder: Path, cluster: Path) -> subprocess.CompletedProcess:
    command = [
        PROGRAM, "submit", "away.yaml", "--address", f"http://{HERE}:{line.port}",
        "--root", cluster, "--follow",
    ]  # fmt: skip
    errors = folder / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ, stdout=subprocess.PIPE, stderr=file, text=True
        )
    printed = ""
    while " done " not in printed:
        printed += process.stdout.readline()
    line.cut()
    until = time.monotonic() + 30
    while "lost" not in errors.read_text() and time.monotonic() < until:
        time.sleep(0.1)
    line.mend()
    printed += process.stdout.read()
    return subprocess.CompletedProcess(command, process.wait(60), printed, errors.read_text())


def test_a_lost_connection_is_not_a_failed_job(laptop):
    assert laptop.first.returncode == 0, laptop.first.stdout + laptop.first.stderr
    assert "lost the connection: no answer from" in laptop.first.stderr
    assert f"connected to {laptop.address} again" in laptop.first.stderr


def test_what_the_run_prints_comes_once_and_whole(laptop):
    events = re.findall(r"^[\d:]+ \[ *(\d+)/17\] done ", laptop.first.stdout, re.M)
    assert events == [str(number) for number in range(1, 18)]
    assert laptop.first.stdout.rstrip().endswith("report/index.html")
    assert "entrypoint" not in laptop.first.stdout


def test_the_run_lies_on_the_cluster_and_only_its_address_here(laptop):
    assert (laptop.cluster / "runs" / "away" / "journal.jsonl").is_file()
    assert not (laptop.folder / "runs" / "away" / "run.json").exists()
    assert not (laptop.folder / "store").exists()
    stages = list((laptop.cluster / "store").glob("*/*/stage.json"))
    assert len(stages) == 17
    sent = json.loads((laptop.folder / "runs" / "away" / "job.json").read_text())["commit"]
    told = {json.loads(stage.read_text())["provenance"]["commit"] for stage in stages}
    assert told == {sent}


def test_status_and_logs_are_asked_for_by_the_runs_name(laptop):
    state = json.loads(laptop("status", "away", "--json").stdout)
    assert state["job"]["state"] == "done"
    assert state["states"] == {"done": 17}
    log = laptop("logs", "away", "adapt", "-f")
    assert log.returncode == 0, log.stderr
    assert "step 3 of 3" in log.stdout


def test_the_report_comes_here_byte_by_byte(laptop):
    answer = laptop("report", "away")
    here, there = (
        folder / "runs" / "away" / "report" for folder in (laptop.folder, laptop.cluster)
    )
    assert answer.stdout.strip() == str(here / "index.html")
    assert re.search(r"12 files from .*: \S+ MB sent, \S+ MB unpacked", answer.stderr)
    names = sorted(path.name for path in there.iterdir())
    assert sorted(path.name for path in here.iterdir()) == names
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in names)
    assert set(pd.read_parquet(here / "results.parquet")["status"]) == {"done"}


def test_a_job_that_fails_hands_its_exit_status_and_its_words_on(laptop):
    broken = laptop.submit("--set", "name=broken", "--set", "models.0.decoder=/nowhere", "--follow")
    assert broken.returncode == 2
    assert "layersweep: sweep.models[0].decoder: no folder /nowhere" in broken.stdout
    state = laptop("status", "broken")
    assert ": failed\n" in state.stdout
    assert "No stages to show: no run called broken" in state.stdout


def test_a_living_job_holds_the_run_and_a_cancelled_one_is_resumed(laptop, tmp_path):
    assert laptop.submit("--set", "adapt.steps=100000").returncode == 0
    again = laptop.submit()
    elsewhere = laptop.submit(folder=tmp_path)
    for refused in (again, elsewhere):
        assert refused.returncode == 3
        assert "another driver holds run away: job away-" in refused.stderr
    run = laptop.cluster / "runs" / "away"
    until = time.monotonic() + 60
    while not any("of 100000" in log.read_text() for log in (run / "logs").glob("adapt.*")):
        assert time.monotonic() < until
        time.sleep(0.2)
    stopped = laptop("cancel", "away")
    assert stopped.returncode == 0, stopped.stderr
    assert "is stopped" in stopped.stdout
    last = json.loads((run / "journal.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["interrupted"]) == ("end", True)
    assert not (run / "lock.json").exists()
    resumed = laptop.submit("--follow")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "17 stages done (17 reused, 0 run)" in resumed.stdout
