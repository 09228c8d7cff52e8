"""A miniature sweep, end to end through Ray: run, resume, status, logs, report, faults."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time

import pandas as pd
import psutil
import pytest
import yaml
from conftest import CONFIGS, PROGRAM, layersweep

from orchestrator.report.tables import TABLES
from orchestrator.runs import RunFolder

SMOKE = str(CONFIGS / "smoke.yaml")
CELLS = 2 * 3 * 2 * (3 + 3 + 3)  # encoders x conditions x test sets x (depths x modes)


def tables(run):
    return {name: (run / "report" / f"{name}.parquet").read_bytes() for name in TABLES}


def test_the_sweep_runs_to_its_report(smoke):
    assert smoke.process.returncode == 0, smoke.process.stdout + smoke.process.stderr
    last = smoke.process.stdout.strip().splitlines()[-1]
    assert last == f"Report: {smoke.run / 'report' / 'index.html'}"
    page = (smoke.run / "report" / "index.html").read_text()
    assert "<html" in page
    assert "llama-tiny" in page


def test_every_cell_has_its_scores(smoke):
    results = pd.read_parquet(smoke.run / "report" / "results.parquet")
    assert list(results.columns) == list(TABLES["results"])
    assert len(results) == 2 * CELLS
    assert set(results["status"]) == {"done"}
    assert results["value"].notna().all()
    assert results.loc[results["depth"] > 0, "block_start"].notna().all()
    assert (results["ci_low"] <= results["ci_high"]).all()


def test_the_maps_and_the_consensus_are_whole(smoke):
    maps = pd.read_parquet(smoke.run / "report" / "maps.parquet")
    one = maps.groupby(
        ["encoder", "task", "source_language", "modality", "adapted", "criterion", "pool"],
        dropna=False,
    )
    assert (one.size() == 6 * 7 // 2).all()
    assert set(maps["criterion"]) == {"angular", "influence", "cka", "damage"}
    damage = maps[maps["criterion"] == "damage"]
    assert set(damage["modality"]) == {"speech"}
    assert (damage["samples"] == 4).all()
    consensus = pd.read_parquet(smoke.run / "report" / "consensus.parquet")
    assert set(consensus["depth"]) == {1, 2}
    assert (consensus["coverage"] == 1).all()
    chosen = pd.read_parquet(smoke.run / "report" / "results.parquet")
    for depth in (1, 2):
        shared = consensus[(consensus["depth"] == depth) & (consensus["scope"] == "all")]
        used = chosen.loc[chosen["depth"] == depth, "block_start"].unique()
        assert list(used) == list(shared["block_start"])


def test_a_second_run_reuses_everything_in_seconds(smoke):
    before = tables(smoke.run)
    journal = len((smoke.run / "journal.jsonl").read_text().splitlines())
    started = time.monotonic()
    again = layersweep(smoke.folder, "run", SMOKE, "--json")
    data = json.loads(again.stdout)
    assert again.returncode == 0
    assert data["done"] == data["reused"]
    assert time.monotonic() - started < 60
    assert tables(smoke.run) == before
    # The journal knows it all already: it does not grow by every stage with every resume.
    assert len((smoke.run / "journal.jsonl").read_text().splitlines()) == journal + 2


def test_plan_says_that_nothing_is_left(smoke):
    assert "Nothing to run" in layersweep(smoke.folder, "plan", SMOKE).stdout
    stages = json.loads(layersweep(smoke.folder, "plan", SMOKE, "--json").stdout)["stages"]
    assert {stage["verdict"] for stage in stages} == {"reuse"}


def test_a_depth_added_later_reuses_all_that_exists(smoke):
    found = layersweep(smoke.folder, "plan", SMOKE, "--json", "--set", "depths=[0,1,2,3]")
    stages = json.loads(found.stdout)["stages"]
    fresh = {stage["id"] for stage in stages if stage["verdict"] != "reuse"}
    assert fresh
    assert all("/d3/" in stage for stage in fresh)


def test_status_and_logs_tell_what_happened(smoke):
    state = json.loads(layersweep(smoke.folder, "status", "smoke", "--json").stdout)
    assert set(state["states"]) == {"done"}
    assert not state["held"]
    assert "no driver is at work" in layersweep(smoke.folder, "status", "smoke").stdout
    journal = layersweep(smoke.folder, "logs", "smoke").stdout
    assert "adapt/llama-tiny+whisper-tiny/all" in journal


def test_a_stage_has_its_own_log(smoke):
    log = next((smoke.run / "logs").glob("adapt.llama-tiny+whisper-tiny.all.1.log")).read_text()
    assert "step 30 of 30" in log
    assert "done in" in log


def test_no_artefact_is_a_pickle(smoke):
    suffixes = {p.suffix for p in (smoke.folder / "store").rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".parquet", ".safetensors", ".jinja", ".md", ".txt", ""}


def test_artefacts_name_no_secret_and_no_run(smoke):
    for path in (smoke.folder / "store").glob("*/*/stage.json"):
        stage = json.loads(path.read_text())
        assert stage["provenance"]["packages"]["torch"]
        assert "token" not in json.dumps(stage["provenance"]).lower()


def test_a_killed_driver_changes_nothing_in_the_tables(smoke, tmp_path):
    folder = smoke.copy_to(tmp_path, "build", "encode")
    process = subprocess.Popen(
        [PROGRAM, "run", SMOKE], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    journal = folder / "runs" / "smoke" / "journal.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        events = list(RunFolder(journal.parent).events()) if journal.exists() else []
        if any(
            e["event"] == "done" and e["id"].startswith("heal/") and not e.get("reused")
            for e in events
        ):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = layersweep(folder, "run", SMOKE, "--json")
    assert again.returncode == 0, again.stderr
    data = json.loads(again.stdout)
    committed = [
        e["id"]
        for e in RunFolder(journal.parent).events()
        if e["event"] == "done" and not e.get("reused")
    ]
    assert len(committed) == len(set(committed)), "nothing that was committed is done twice"
    assert data["reused"] < data["done"]
    assert tables(folder / "runs" / "smoke") == tables(smoke.run)


def test_a_killed_worker_goes_on_from_its_checkpoint(smoke, tmp_path):
    folder = smoke.copy_to(tmp_path, "build", "encode")
    command = [PROGRAM, "run", SMOKE, "--set", "resources.checkpoint_minutes=0"]
    command += ["--set", "depths=[0]", "--set", "heal.modes=[none]"]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 240
    killed = 0
    while not killed:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        for file in folder.glob("store/adapt/.*.checkpoint/step-*"):
            killed = int(file.name[5:13]) if int(file.name[5:13]) > 11 else 0
        time.sleep(0.005)
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.cmdline() and child.cmdline()[0].startswith("ray::Rank"):
                child.kill()
    assert process.wait(timeout=240) == 0, process.stdout.read()
    run = RunFolder(folder / "runs" / "smoke")
    retried = [e for e in run.events() if e["event"] == "retry"]
    assert {e["class"] for e in retried} == {"preempted"}
    steps = [
        int(found[1])
        for log in (run.path / "logs").glob("adapt.*.2.log")
        for found in [re.search(r"step (\d+) of 30", log.read_text())]
    ]
    assert max(steps) >= killed, "the second attempt began where the first had come to"
    for folder_of in sorted((smoke.folder / "store" / "adapt").iterdir()):
        for file in ("projector.safetensors", "adapter/adapter_model.safetensors"):
            again = folder / "store" / "adapt" / folder_of.name / file
            assert again.read_bytes() == (folder_of / file).read_bytes()
    assert not list(folder.glob("store/adapt/.*.checkpoint")), "nothing is left of them"


def broken_sweep(smoke, folder):
    """The smoke sweep with one more test set, whose audio is no audio."""
    (folder / "noise.wav").write_text("this is no sound")
    (folder / "broken.jsonl").write_text('{"audio_filepath": "noise.wav", "text": "the house"}\n')
    raw = yaml.safe_load((CONFIGS / "smoke.yaml").read_text())
    raw["encoders"] = raw["encoders"][:1]
    raw["tasks"] = [
        {
            "task": "asr",
            "language": "en",
            "train": "lab:speech-tiny/train",
            "dev": "lab:speech-tiny/dev",
            "test": [
                {"name": "test", "data": "lab:speech-tiny/test"},
                {"name": "broken", "data": "broken.jsonl", "in_domain": False},
            ],
        }
    ]
    raw["depths"] = [1]
    raw["heal"]["modes"] = ["none"]
    (folder / "broken.yaml").write_text(yaml.safe_dump(raw))
    return smoke.copy_to(folder, "build")


def test_a_broken_stage_leaves_a_hole_and_the_rest_goes_on(smoke, tmp_path):
    folder = broken_sweep(smoke, tmp_path)
    found = layersweep(folder, "run", "broken.yaml", "--set", "name=broken")
    assert found.returncode == 1
    assert "noise.wav" in found.stdout
    report = folder / "runs" / "broken" / "report"
    results = pd.read_parquet(report / "results.parquet")
    by_set = results.groupby("test_set")["status"].unique().map(list).to_dict()
    assert by_set == {"test": ["done"], "broken": ["blocked"]}
    assert results.loc[results["test_set"] == "broken", "value"].isna().all()
    assert results.loc[results["test_set"] == "broken", "reason"].str.contains("encode/").all()
    state = json.loads(layersweep(folder, "status", "broken", "--json").stdout)
    assert [f["class"] for f in state["failed"]] == ["invalid"]
    assert "noise.wav" in layersweep(folder, "logs", "broken", state["failed"][0]["id"]).stdout
    assert "noise.wav" in (report / "index.html").read_text()


def test_a_held_run_is_refused_with_status_3(smoke):
    with RunFolder(smoke.run).lock():
        found = layersweep(smoke.folder, "run", SMOKE)
    assert found.returncode == 3
    assert "another driver holds run smoke" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such sweep file"),
        (["run", SMOKE, "--set", "depths=[6]"], "sweep.depths[1]: cannot remove 6 layers"),
        (["plan", SMOKE, "--set", "tasks.0.language=klingon"], "unknown language 'klingon'"),
        (["plan", SMOKE, "--set", "heal.stps=1"], "did you mean steps?"),
        (["run", SMOKE, "--store", "/proc/store"], "the store cannot be written"),
        (["run", SMOKE, "--set", "resources.cpus=99"], "but no node has more than"),
        (["run", SMOKE, "--set", "name=fresh", "--address", "ray://head:1"], "drops work"),
        (["run", SMOKE, "--set", "name=fresh", "--address", "127.0.0.1:1"], "no Ray cluster at"),
        (["status", "nosuchrun"], "no run called nosuchrun"),
        (["logs", "smoke", "nosuchstage"], "no stage nosuchstage"),
        (["logs", "smoke", "evaluate"], "stages match"),
        (["report", "nosuchrun"], "no run called nosuchrun"),
        (["run"], "SWEEP"),
    ],
)
def test_a_users_mistake_is_told_with_status_2_and_no_traceback(
    smoke, tmp_path, arguments, message
):
    folder = smoke.folder if arguments[0] in ("logs", "status") else tmp_path
    found = layersweep(folder, *arguments)
    assert found.returncode == 2
    assert message in found.stderr
    assert "Traceback" not in found.stderr


def test_report_is_rebuilt_from_the_store(smoke):
    page = smoke.run / "report" / "index.html"
    page.unlink()
    found = layersweep(smoke.folder, "report", "smoke")
    assert found.stdout.strip() == str(page)
    assert page.is_file()


def test_doctor_finds_this_machine_well(smoke):
    found = layersweep(smoke.folder, "doctor", "--json")
    states = {f["what"]: f["state"] for f in json.loads(found.stdout)}
    assert found.returncode == 0
    assert states["ray"] == states["store"] == states["packages"] == "ok"
