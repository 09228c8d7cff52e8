"""What goes to a cluster with a submitted sweep, what stays, and what is refused before anything goes."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.commit import commit
from orchestrator.shipping import pack, refuse_local_paths
from orchestrator.submitted import hand_over
from orchestrator.sweep import load_sweep
from workers.errors import InvalidInput

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"
NOBODY = "http://127.0.0.1:1"


@pytest.fixture
def shipped(tmp_path):
    pack(load_sweep(SMOKE, ["depths=[0, 3]"]), tmp_path / "shipped.zip")
    return tmp_path / "shipped.zip"


def test_the_program_and_the_resolved_sweep_are_sent_and_nothing_else(shipped):
    with zipfile.ZipFile(shipped) as archive:
        names = set(archive.namelist())
        sweep = yaml.safe_load(archive.read("sweep.yaml"))
    assert {"orchestrator/cli/__main__.py", "workers/stages/heal.py", "cluster/jobs.py"} <= names
    assert "orchestrator/report/page.html" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.startswith("layersweep-")} == {
        *("cluster", "orchestrator", "workers", "sweep.yaml")
    }
    assert not [name for name in names if "__pycache__" in name or "/." in name]
    assert shipped.stat().st_size < 2 * 2**20
    assert sweep["depths"] == [0, 3]


def test_the_same_code_and_sweep_give_the_same_bytes(shipped, tmp_path):
    pack(load_sweep(SMOKE, ["depths=[0, 3]"]), tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == shipped.read_bytes()


def test_what_was_sent_runs_by_itself(shipped, tmp_path):
    there = tmp_path / "there"
    with zipfile.ZipFile(shipped) as archive:
        archive.extractall(there)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["LAYERSWEEP_COMMIT"] = "0123abc-dirty"
    script = """
import json, sys
import cluster, orchestrator, workers
from importlib.metadata import distribution
from orchestrator.commit import commit
places = [m.__file__ for m in (cluster, orchestrator, workers)]
print(json.dumps([places + [str(distribution("layersweep").locate_file(""))], commit()]))
"""
    answer = subprocess.run(
        [sys.executable, "-c", script],
        cwd=there, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    places, told = json.loads(answer.stdout)
    assert all(Path(place).is_relative_to(there) or place == "." for place in places), places
    assert told == "0123abc-dirty"
    planned = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "plan", "sweep.yaml", "--json"],
        cwd=there, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(planned.stdout)["sweep"] == "smoke"


def test_a_checkout_knows_its_commit(monkeypatch):
    monkeypatch.delenv("LAYERSWEEP_COMMIT", raising=False)
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert commit().removesuffix("-dirty") == head.stdout.strip()


def test_paths_of_this_machine_are_refused_each_by_name(tmp_path):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    raw = yaml.safe_load(SMOKE.read_text())
    raw["models"] = [
        {"decoder": "models/mine"},
        {"decoder": "org/decoder-1B"},
        {"decoder": "/shared/models/theirs"},
        {"decoder": "./models/other"},
    ]
    raw["tasks"] = [
        {
            "task": "asr",
            "language": "en",
            "train": "data/{language}.jsonl",
            "dev": "/shared/dev.jsonl",
            "test": [{"name": "t", "data": "test.jsonl"}],
        }
    ]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(InvalidInput) as refused:
        refuse_local_paths(load_sweep(file), tmp_path)
    named = [line.split(":")[0] for line in str(refused.value).splitlines()[:-1]]
    assert named == [
        *("sweep.models[0].decoder", "sweep.models[3].decoder"),
        *("sweep.tasks[0].train", "sweep.tasks[0].test[0].data"),
    ]
    assert "storage that every node of the cluster sees" in str(refused.value)


def test_a_wrong_sweep_is_refused_before_anything_is_sent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(
        app, ["submit", str(SMOKE), "--address", NOBODY, "--set", "heal.stepz=3"]
    )
    assert isinstance(answer.exception, InvalidInput)
    assert "sweep.heal.stepz: unknown key (did you mean steps?)" in str(answer.exception)
    assert not list(tmp_path.iterdir())


def test_a_root_that_only_means_something_here_is_refused():
    with pytest.raises(InvalidInput, match="--root: sweeps is no folder of the cluster"):
        hand_over(load_sweep(SMOKE), ROOT, NOBODY, "sweeps", None)


def test_a_run_of_this_machine_keeps_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "smoke").mkdir(parents=True)
    (tmp_path / "runs" / "smoke" / "run.json").write_text("{}")
    with pytest.raises(InvalidInput, match=r"is a run of this machine .*--set name=NAME"):
        hand_over(load_sweep(SMOKE), ROOT, NOBODY, "~/layersweep", None)
