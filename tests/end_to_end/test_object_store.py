"""A sweep whose store is a bucket: run, nothing run twice, report from another machine's disk."""

import json
import os
import subprocess

import pandas as pd
import pytest
import soundfile
import tiny_released
import yaml
from conftest import PROGRAM
from object_server import BUCKET, object_server

TEXTS = ["the red house", "a dog runs"]
URL = f"s3://{BUCKET}/team/store"


@pytest.fixture(scope="module")
def server():
    with object_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A released SpeechLLM, a few sounds, and a sweep of them that keeps every checkpoint."""
    folder = tmp_path_factory.mktemp("bucket-sweep")
    tiny_released.qwen2_audio(folder / "model")
    for split in ("train", "dev", "test"):
        rows = []
        for number, text in enumerate(TEXTS):
            file = f"{split}{number}.wav"
            soundfile.write(folder / file, tiny_released.voice(0.5, number), tiny_released.RATE)
            rows.append(json.dumps({"audio_filepath": file, "text": text}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    sweep = {
        "name": "bucket",
        "models": [{"speechllm": "model"}],
        "tasks": [
            {"task": "asr", "language": "en", "train": "train.jsonl", "dev": "dev.jsonl",
             "test": [{"name": "test", "data": "test.jsonl"}]}
        ],
        "depths": [1],
        "heal": {"modes": ["joint"], "steps": 3, "batch_size": 2},
        "maps": {"samples": 2},
        "adapt": {"lora": {"rank": 2}},
        "evaluate": {"extra_tokens": 4, "tokens_per_second": 1},
        "resources": {"checkpoint_minutes": 0},
    }  # fmt: skip
    (folder / "bucket.yaml").write_text(yaml.safe_dump(sweep))
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
    found = layersweep("logs", "bucket", "heal/model+own/asr-en/consensus", node="node-3")
    assert "step 3 of 3" in found.stdout, found.stderr
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
