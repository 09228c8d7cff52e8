"""What `layersweep status` and `logs` tell from a run folder, finished, half-finished or at work."""

import json
import re
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.plan import build_plan
from orchestrator.runs import RunFolder
from orchestrator.sources import DigestCache
from orchestrator.status import journal_lines, status_data, status_table
from orchestrator.sweep import load_sweep

CONFIGS = Path(__file__).parents[2] / "configs"
HEAL = "heal/llama-tiny+conformer-tiny/all/consensus/d2/joint/s0"
TEST = "evaluate/llama-tiny+conformer-tiny/asr-en/test/consensus/d2/joint/s0"
OTHER = "heal/llama-tiny+whisper-tiny/all/consensus/d1/decoder/s0"


@pytest.fixture
def folder(tmp_path):
    sweep = load_sweep(CONFIGS / "smoke.yaml")
    plan = build_plan(sweep, CONFIGS, DigestCache(tmp_path / "digests.json"))
    run = RunFolder(tmp_path / "runs" / "smoke")
    run.path.mkdir(parents=True)
    run.start(sweep, CONFIGS, str(tmp_path / "store"), plan)
    run.note("begin", nodes=len(plan.nodes))
    return run


def begin(run, stage, attempt=1, text="", **fields):
    log = run.log(stage, attempt)
    log.write_text(text)
    run.note("start", id=stage, kind="heal", attempt=attempt, log=str(log), **fields)


def fail(run, stage, failure, message, event="failed"):
    run.note(event, id=stage, **{"class": failure}, message=message)


def shown(run, width=80):
    console = Console(file=StringIO(), width=width, force_terminal=True, highlight=False)
    status_table(json.loads(json.dumps(status_data(run))), console)
    return re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())


def test_a_running_run_shows_its_rows_and_what_runs_with_its_last_words(folder):
    with folder.lock():
        folder.note("done", id=OTHER, reused=True)
        begin(folder, HEAL, text="2026-01-01T00:00:00Z step 3 of 30, loss 2.5\n")
        text = shown(folder)
        data = status_data(folder)
    assert "a driver is at work, 1 of 171 stages done" in text
    assert re.search(r"^encode +· +0/16", text, re.M)
    assert re.search(r"^ +joint +· 0/7 +· 0/7 +▸ 0/7$", text, re.M)
    assert re.search(r"^ +decoder +· 0/7 +· 1/7 +· 0/7$", text, re.M)
    assert re.search(rf"running  {re.escape(HEAL)}  \d s\n +step 3 of 30, loss 2.5", text)
    running = data["running"][0]
    assert running["attempt"] == 1
    assert running["last"] == "step 3 of 30, loss 2.5"
    assert 0 <= running["seconds"] < 60


def test_a_stage_that_is_tried_again_says_after_which_failure(folder):
    with folder.lock():
        begin(folder, HEAL)
        fail(folder, HEAL, "preempted", "its node was lost", "retry")
        waiting = shown(folder, 200)
        begin(folder, HEAL, 2, "loading\n")
        again = shown(folder, 200)
    assert f"retry    {HEAL}  after (preempted) its node was lost" in waiting
    assert re.search(
        rf"running  {re.escape(HEAL)}  \d s, attempt 2 after \(preempted\) its node was lost", again
    )


def test_a_failure_has_its_class_attempts_message_last_words_and_log(folder):
    begin(folder, HEAL)
    fail(folder, HEAL, "transient", "no route to host", "retry")
    begin(folder, HEAL, 2, "step 9 of 30\nOSError: the disk is \x1b[31mfull\x1b[0m\n")
    fail(folder, HEAL, "transient", "no space left")
    folder.note("blocked", id=TEST, message=f"needs {HEAL}, which failed")
    text = shown(folder, 200)
    assert f"failed   {HEAL}  (transient) no space left, 2 attempts" in text
    assert "\n         OSError: the disk is full\n" in text
    assert f"\n         log: {folder.log(HEAL, 2)}\n" in text
    assert "1 stage is blocked by these failures" in text
    assert "To go on, run the sweep again" in text
    assert re.search(r"^ +joint +· 0/7 +· 0/7 +✗ 0/7$", text, re.M)
    assert "⊘ blocked" in text
    (failed,) = status_data(folder)["failed"]
    assert (failed["class"], failed["attempt"]) == ("transient", 2)


def test_what_the_log_says_as_the_message_does_is_not_said_twice(folder):
    begin(folder, HEAL, text="failed (invalid): the loss is nan at step 2\n")
    fail(folder, HEAL, "invalid", "the loss is nan at step 2")
    assert shown(folder, 200).count("the loss is nan") == 1


def test_what_ran_short_of_memory_stays_to_be_seen_when_it_is_done(folder):
    begin(folder, HEAL)
    fail(folder, HEAL, "device-oom", "CUDA out of memory", "retry")
    begin(folder, HEAL, 2, relief="micro-batch 4 in place of 8")
    folder.note("done", id=HEAL, seconds=3.0)
    assert f"relief   {HEAL}  micro-batch 4 in place of 8" in shown(folder, 200)
    deviation = {"id": HEAL, "state": "done", "relief": "micro-batch 4 in place of 8"}
    assert status_data(folder)["deviations"] == [deviation]


def test_what_ran_when_its_driver_died_waits(folder):
    begin(folder, HEAL)
    text = shown(folder)
    assert "no driver is at work" in text
    assert "running" not in text


def test_what_was_stopped_with_a_checkpoint_is_told_apart(folder):
    begin(folder, HEAL)
    folder.note("stopped", id=HEAL, message="interrupted")
    assert re.search(r"^ +joint +· 0/7 +· 0/7 +∎ 0/7$", shown(folder), re.M)
    folder.note("begin", nodes=171)
    assert "∎" not in shown(folder)


def test_a_driver_that_waits_says_for_what(folder):
    with folder.lock():
        folder.note("waiting", message="waits for room on the cluster: 8 GPUs of 4")
        assert "waits for room on the cluster: 8 GPUs of 4" in shown(folder)
        begin(folder, HEAL)
        assert "waits for room" not in shown(folder)


def test_a_run_begun_by_an_older_version_shows_its_kinds(folder):
    path = folder.path / "plan.json"
    data = json.loads(path.read_text())
    for node in data["nodes"]:
        node.pop("cell", None)
    path.write_text(json.dumps(data))
    text = shown(folder)
    assert re.search(r"^evaluate +· +0/108", text, re.M)
    assert "healing" not in text


def test_a_finished_run_needs_no_advice(folder):
    for stage in folder.records():
        folder.note("done", id=stage, seconds=1.0)
    text = shown(folder)
    assert "171 of 171 stages done" in text
    assert "To go on" not in text
    assert text.count("✓ 7/7") == 18


def test_the_journal_is_a_line_an_event(folder):
    begin(folder, HEAL)
    lines = list(journal_lines(folder))
    assert lines[0].endswith("begin     nodes=171")
    assert lines[1].endswith(f"start    {HEAL} attempt=1")
    assert lines[0].startswith(time.strftime("%Y-"))
