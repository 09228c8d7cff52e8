"""A sweep whose store is a bucket: run, nothing run twice, report from another machine's disk."""

import json
import os
import subprocess

import pandas as pd
import pytest
import yaml
from conftest import CONFIGS, PROGRAM
from object_server import BUCKET, object_server

URL = f"s3://{BUCKET}/team/store"


@pytest.fixture(scope="module")
def server():
    with object_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bucket-sweep")
    raw = yaml.safe_load((CONFIGS / "smoke.yaml").read_text())
    raw["name"] = "bucket"
    raw["encoders"] = raw["encoders"][:1]
    raw["tasks"] = [{"task": "asr", "language": "en", "data": "lab:speech-tiny"}]
    raw["depths"] = [0, 1]
    raw["adapt"] |= {"steps": 2, "alignment_steps": 2}
    raw["heal"]["modes"] = ["none"]
    raw["maps"] = {"samples": 4}
    (folder / "bucket.yaml").write_text(yaml.safe_dump(raw))
    return folder


@pytest.fixture
def layersweep(server, folder):
    def run(*arguments, node="node-1"):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "AWS_ENDPOINT_URL": server,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "s3cret-value",
            "LAYERSWEEP_CACHE": str(folder / node),
        }
        return subprocess.run(
            [PROGRAM, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def tables():
    return {}


def scores(folder):
    return (folder / "runs" / "bucket" / "report" / "results.parquet").read_bytes()


def test_a_sweep_runs_with_its_store_in_a_bucket(layersweep, folder, tables):
    found = layersweep("run", "bucket.yaml", "--store", URL)
    assert found.returncode == 0, found.stdout + found.stderr
    results = pd.read_parquet(folder / "runs" / "bucket" / "report" / "results.parquet")
    assert set(results["status"]) == {"done"}
    assert json.loads((folder / "runs/bucket/run.json").read_text())["store"] == URL
    assert not (folder / "store").exists()
    tables["first"] = scores(folder)


def test_another_machine_finds_it_all_done_and_builds_the_same_report(layersweep, folder, tables):
    planned = layersweep("plan", "bucket.yaml", "--store", URL, node="node-2")
    assert f"Nothing to run: all of it is in {URL}" in planned.stdout, planned.stderr
    found = layersweep("report", "bucket", node="node-2")
    assert found.returncode == 0, found.stderr
    assert scores(folder) == tables["first"]


def test_logs_and_status_are_read_from_the_bucket(layersweep, folder):
    found = layersweep("logs", "bucket", "adapt", node="node-3")
    assert "step 2 of 2" in found.stdout, found.stderr
    assert "done in" in found.stdout
    assert list((folder / "runs" / "bucket" / "logs").iterdir()) == []
    assert layersweep("status", "bucket", node="node-3").returncode == 0


def test_no_secret_is_kept(folder):
    kept = [
        p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl", ".yaml")
    ]
    assert len(kept) > 10
    assert not [p for p in kept if "s3cret-value" in p.read_text()]


def test_a_store_that_does_not_answer_is_told_without_a_traceback(layersweep, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    found = layersweep("plan", "bucket.yaml", "--store", URL)
    assert found.returncode == 2
    assert "does not answer at 127.0.0.1:9" in found.stderr
    assert "Traceback" not in found.stderr
