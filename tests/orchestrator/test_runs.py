"""Run folders: one driver at a time, and a journal that survives a crash."""

import json
import os
import subprocess
import sys
import time

import pytest

from orchestrator.graph import Node, Plan
from orchestrator.runs import STALE_SECONDS, RunFolder, RunHeld
from orchestrator.sweep import parse_sweep
from workers.errors import InvalidInput

SWEEP = {
    "name": "r",
    "models": [{"decoder": "lab:llama-tiny"}],
    "encoders": [{"encoder": "lab:whisper-tiny"}],
    "tasks": [{"task": "asr", "language": "en", "data": "lab:speech-tiny"}],
    "depths": [1],
}


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "runs" / "r")
    nodes = {
        "build/a": Node("build/a", "build", {"name": "lab:speech-tiny"}),
        "encode/b": Node("encode/b", "encode", {}, {"data": "build/a"}),
        "map/c": Node("map/c", "map", {}, {"features": "encode/b"}),
    }
    run.path.mkdir(parents=True)
    run.start(parse_sweep(SWEEP), tmp_path, str(tmp_path / "store"), Plan("r", nodes))
    return run


def test_a_second_driver_is_turned_away_with_the_firsts_process(folder):
    with folder.lock():
        assert folder.held()
        with pytest.raises(RunHeld, match=str(os.getpid())), folder.lock():
            pass
    assert not folder.held()
    with folder.lock():
        pass


def test_a_second_driver_in_another_process_is_turned_away(folder):
    code = (
        "import sys; from pathlib import Path; from orchestrator.runs import *\n"
        "try:\n  with RunFolder(Path(sys.argv[1])).lock(): print('taken')\n"
        "except RunHeld: print('held')"
    )
    command = [sys.executable, "-c", code, str(folder.path)]
    with folder.lock():
        assert subprocess.check_output(command, text=True).strip() == "held"
    assert subprocess.check_output(command, text=True).strip() == "taken"


def test_the_lock_of_a_dead_driver_is_taken_over(folder):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    import socket

    lock = folder.path / "lock.json"
    lock.write_text(json.dumps({"pid": ended.pid, "host": socket.gethostname(), "token": "x"}))
    with folder.lock():
        assert folder.held()
    assert not lock.exists()


def test_a_lock_whose_heart_stopped_on_another_machine_is_taken_over(folder):
    lock = folder.path / "lock.json"
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "token": "x"}))
    assert folder.held()
    old = time.time() - STALE_SECONDS - 1
    os.utime(lock, (old, old))
    assert not folder.held()
    with folder.lock():
        pass


def test_records_tell_the_story_of_the_newest_try(folder):
    folder.note("begin")
    folder.note("done", id="build/a", reused=True)
    folder.note("start", id="encode/b", kind="encode", key="q", attempt=1, log="l")
    folder.note("failed", id="encode/b", **{"class": "invalid", "message": "no"})
    folder.note("blocked", id="map/c", message="needs encode/b")
    records = folder.records()
    assert {i: r.state for i, r in records.items()} == {
        "build/a": "done", "encode/b": "failed", "map/c": "blocked",
    }  # fmt: skip
    assert records["encode/b"].failure == "invalid"
    folder.note("begin")
    assert folder.records()["encode/b"].state == "pending"
    assert folder.records()["build/a"].state == "done"


def test_what_ran_when_the_driver_died_is_pending_again(folder):
    folder.note("begin")
    folder.note("start", id="build/a", kind="build", attempt=1, log="l")
    assert folder.records()["build/a"].state == "pending"
    with folder.lock():
        assert folder.records()["build/a"].state == "running"


def test_a_journal_cut_short_is_still_read(folder):
    folder.note("begin")
    folder.note("done", id="build/a")
    with (folder.path / "journal.jsonl").open("a") as file:
        file.write('{"event": "done", "id": "enc')
    assert folder.records()["build/a"].state == "done"


def test_a_line_cut_short_costs_no_other_line(folder):
    for number in range(3):
        folder.note("done", id="build/a", key=str(number))
    path = folder.path / "journal.jsonl"
    first, second, third = path.read_text().splitlines(keepends=True)
    path.write_text(first + second[:20] + "\n" + third)
    assert [event["key"] for event in folder.events()] == ["0", "2"]


def test_history_is_what_was_done_last_and_what_it_cost(folder):
    folder.note("done", id="build/a", key="k", gpu_seconds=2.5)
    folder.note("done", id="encode/b", key="q", gpu_seconds=1.0)
    folder.note("start", id="encode/b", kind="encode", key="q", attempt=2, log="l")
    folder.note("stopped", id="encode/b", message="told to end", gpu_seconds=0.5)
    history = folder.history()
    assert history.done == {"build/a": "k"}
    assert history.gpu_seconds == 4.0


def test_an_unknown_run_is_refused_with_those_that_exist(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert RunFolder.existing("r").path == folder.path
    with pytest.raises(InvalidInput, match="runs here: r"):
        RunFolder.existing("q")


def test_a_stage_that_an_earlier_plan_did_under_the_same_name_is_not_done(folder):
    folder.note("done", id="build/a", key="another")
    assert folder.records()["build/a"].state == "pending"
