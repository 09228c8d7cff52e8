"""Three released SpeechLLMs through one sweep, from the command line to the report."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
import soundfile
import yaml
from conftest import layersweep

TEXTS = ["the red house", "a dog runs", "it sleeps", "the big car"]


@pytest.fixture(scope="module")
def tiny():
    place = Path(__file__).parents[1] / "workers" / "tiny_released.py"
    spec = importlib.util.spec_from_file_location("tiny_released", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of a finished run, and what the command printed."""
    folder = tmp_path_factory.mktemp("released")
    families = {**tiny.MAIN, "granite-speech": tiny.granite_speech_with_adapter}
    for name, build in families.items():
        build(folder / "models" / name)
    for split, count in (("train", 3), ("dev", 2), ("test", 2)):
        rows = []
        for i in range(count):
            file = f"{split}{i}.wav"
            soundfile.write(folder / file, tiny.voice(0.5 + 0.3 * i, seed=i), tiny.RATE)
            rows.append({"audio_filepath": file, "text": TEXTS[i]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sweep = {
        "name": "released",
        "models": [{"speechllm": f"models/{name}"} for name in families],
        "tasks": [
            {"task": "asr", "language": "en", "train": "train.jsonl", "dev": "dev.jsonl",
             "test": [{"name": "test", "data": "test.jsonl"}]}
        ],
        "depths": [1],
        "heal": {"modes": ["none", "joint"], "steps": 1, "batch_size": 2},
        "maps": {"samples": 2},
        "adapt": {"lora": {"rank": 2}},
        "evaluate": {"extra_tokens": 4, "tokens_per_second": 1},
    }  # fmt: skip
    (folder / "released.yaml").write_text(yaml.safe_dump(sweep))
    return folder, layersweep(folder, "run", "released.yaml")


def test_every_cell_of_every_model_is_done(finished):
    folder, process = finished
    assert process.returncode == 0, process.stdout + process.stderr
    results = pd.read_parquet(folder / "runs" / "released" / "report" / "results.parquet")
    assert set(results["status"]) == {"done"}
    assert len(results) == 3 * 2 * 2 * 2  # models, depths, modes, metrics
    assert set(results["encoder"]) == {"own"}
    assert set(results["layers"]) == {4}


def test_maps_and_consensus_are_whole(finished):
    report = finished[0] / "runs" / "released" / "report"
    maps = pd.read_parquet(report / "maps.parquet")
    kinds = maps[["model", "modality", "adapted"]].drop_duplicates()
    assert len(kinds) == 3 * 3  # speech, and text before and after adapting
    consensus = pd.read_parquet(report / "consensus.parquet")
    assert (consensus["coverage"] == 1).all()
    page = (report / "index.html").read_text()
    assert all(name in page for name in ("qwen2-audio", "voxtral", "granite-speech"))


def test_a_second_run_makes_nothing(finished):
    again = layersweep(finished[0], "plan", "released.yaml", "--json")
    assert {s["verdict"] for s in json.loads(again.stdout)["stages"]} == {"reuse"}
    shown = layersweep(finished[0], "plan", "released.yaml").stdout
    assert shown.startswith("Sweep released: 3 released SpeechLLM(s) x 1 conditions")


def test_a_whole_model_named_as_a_decoder_is_told_its_place(finished):
    found = layersweep(
        finished[0], "plan", "released.yaml",
        "--set", "models=[{decoder: models/voxtral}]", "--set", "encoders=[{encoder: lab:whisper}]",
    )  # fmt: skip
    assert found.returncode == 2
    assert "sweep.models[0].decoder: models/voxtral is a whole SpeechLLM" in found.stderr
    assert "write speechllm: models/voxtral" in found.stderr
