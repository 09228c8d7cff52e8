"""`logs -f` hands on what a living run writes and ends with it; `cancel` ends a driver of this machine."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator import follow
from orchestrator.cli import app
from orchestrator.follow import follow_journal, follow_stage
from orchestrator.runs import RunFolder, RunHeld
from workers.errors import InvalidInput

NODES = [{"id": i, "kind": "map", "dependencies": []} for i in ("map/a", "map/b", "map/c")]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)
    folder = RunFolder(tmp_path / "runs" / "r")
    (folder.path / "logs").mkdir(parents=True)
    (folder.path / "plan.json").write_text(json.dumps({"sweep": "r", "nodes": NODES}))
    (folder.path / "run.json").write_text(json.dumps({"base": ".", "store": "store"}))
    folder.note("begin", nodes=3)
    return folder


def start(run: RunFolder, stage: str, attempt: int, text: str) -> Path:
    log = run.log(stage, attempt)
    run.note("start", id=stage, attempt=attempt, log=str(log))
    log.write_text(text)
    return log


def collected(lines) -> tuple[list[str], threading.Thread]:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(iter_into(lines, found)))
    thread.start()
    return found, thread


def iter_into(lines, found):
    for line in lines:
        found.append(line)
    return ()


def until(condition) -> None:
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_the_journal_is_followed_until_its_driver_leaves(run):
    with run.lock():
        found, thread = collected(follow_journal(run))
        until(lambda: len(found) == 1)
        run.note("start", id="map/a", attempt=1, log="x")
        until(lambda: len(found) == 2)
        run.note("end", done=0)
    thread.join(10)
    assert [line.split()[2] for line in found] == ["begin", "start", "end"]


def test_a_stage_is_followed_through_its_attempts_to_its_end(run):
    with run.lock():
        start(run, "map/a", 1, "first\nhalf")
        found, thread = collected(follow_stage(run, "map/a"))
        until(lambda: found == ["first"])
        run.note("retry", id="map/a", **{"class": "transient"}, message="again", delay=0)
        log = start(run, "map/a", 2, "second\n")
        until(lambda: found == ["first", "half", "second"])
        log.write_text("second\nlast, without an end")
        run.note("done", id="map/b", key="k")  # somebody else's end is not ours
        time.sleep(0.1)
        assert thread.is_alive()
        run.note("done", id="map/a", key="k")
        thread.join(10)
        assert not thread.is_alive()
    assert found == ["first", "half", "second", "last, without an end"]


def test_a_stage_that_is_still_to_come_is_waited_for_while_a_driver_lives(run):
    with pytest.raises(InvalidInput, match="map/c has no log in this run: it is pending"):
        list(follow_stage(run, "map/c"))
    with run.lock():
        found, thread = collected(follow_stage(run, "map/c"))
        time.sleep(0.05)
        start(run, "map/c", 1, "here\n")
        run.note("failed", id="map/c", **{"class": "invalid"}, message="no")
        thread.join(10)
    assert found == ["here"]


HOLDER = """
import signal, sys
from pathlib import Path
from orchestrator.runs import RunFolder
def leave(number, frame): raise KeyboardInterrupt
signal.signal(signal.SIGTERM, leave)
try:
    with RunFolder(Path(sys.argv[1])).lock():
        print("held", flush=True)
        signal.pause()
except KeyboardInterrupt:
    print("left")
"""


def test_cancel_asks_the_driver_of_this_machine_to_leave(run):
    program = [sys.executable, "-c", HOLDER, str(run.path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout.readline() == "held\n"
        answer = CliRunner().invoke(app, ["cancel", "r"])
        assert answer.exit_code == 0, answer.output
        assert f"asked process {driver.pid} to stop" in answer.output
        assert driver.stdout.read() == "left\n"
    assert not run.held()
    idle = CliRunner().invoke(app, ["cancel", "r"])
    assert (idle.exit_code, idle.output) == (0, "no driver is at work on run r: nothing to stop\n")


def test_cancel_does_not_signal_a_process_of_another_machine(run, monkeypatch):
    with run.lock():
        monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
        answer = CliRunner().invoke(app, ["cancel", "r"])
    assert isinstance(answer.exception, RunHeld)
    assert "cancel it there" in str(answer.exception)
