"""`layersweep map` as a user types it: what it prints, writes, refuses and how it ends."""

import json
import sys

import pandas as pd
import pytest
from tiny_folders import (
    SENTENCES,
    read_rows,
    save_causal_lm,
    save_speechllm,
    write_manifest,
    write_rows,
    write_text,
)

from orchestrator.cli import main
from workers.config import POOLS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("work")
    save_causal_lm(root / "llama")
    save_speechllm(root / "speechllm")
    write_text(root / "lines.txt")
    write_manifest(root / "clips.jsonl")
    return root


@pytest.fixture
def layersweep(folder, monkeypatch, capsys):
    """Runs the command where the models lie: exit status, standard output and error."""
    monkeypatch.chdir(folder)

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["layersweep", *line.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run


def test_a_text_map_is_printed_and_written(layersweep, folder):
    status, out, err = layersweep("map llama --text lines.txt --out text/map.parquet")
    assert status == 0, err
    assert f"llama: 4 layers, 10 blocks, {len(SENTENCES)} samples of text" in out
    assert "angular, pool all" in out
    assert "pool last" not in out  # one pool speaks for the others
    assert out.splitlines()[-2:] == ["text/map.parquet", "text/map.png"]
    table = pd.read_parquet(folder / "text" / "map.parquet")
    assert list(table.columns) == [
        "criterion", "pool", "start", "depth", "distance", "std_error", "samples",
    ]  # fmt: skip
    assert len(table) == 3 * 10
    about = json.loads((folder / "text" / "map.json").read_text())["about"]
    assert about["model"] == "llama"
    assert about["data"] == "lines.txt"
    assert (about["modality"], about["dtype"], about["skipped"]) == ("text", "float32", [])


def test_json_says_it_all(layersweep, folder):
    status, out, err = layersweep(
        "map speechllm --manifest clips.jsonl --validate --depth 1 --depth 2 --out v.parquet --json"
    )
    assert status == 0, err
    data = json.loads(out)
    assert (data["layers"], data["modality"], data["samples"]) == (4, "speech", len(SENTENCES))
    measures = {(row["criterion"], row["pool"]) for row in data["best"]}
    assert measures == {
        *((criterion, pool) for criterion in ("angular", "influence") for pool in POOLS),
        *(("cka", pool) for pool in ("prompt", "target", "all")),
        ("damage", "target"),
        *({("cka", "audio")} & measures),  # clips may be too short for it
    }
    for row in data["best"]:
        assert row["depth"] in (1, 2)
        assert 0 <= row["start"] <= 4 - row["depth"]
        assert 0 < row["stability"] <= 1
        assert row["start"] not in row["near_ties"]
    assert data["unpruned_loss"] > 0
    assert {row["depth"] for row in data["validation"]} == {1, 2}
    stored = pd.read_parquet(folder / "v.validation.parquet")
    assert (
        stored.astype(object).where(stored.notna(), None).to_dict("records") == data["validation"]
    )


def test_validation_is_printed_too(layersweep):
    status, out, err = layersweep("map llama --text lines.txt --validate --out w.parquet")
    assert status == 0, err
    assert "damage, pool target" in out
    assert "against damage, mean over depths" in out
    assert "w.validation.parquet" in out


def test_criteria_and_pools_can_be_chosen(layersweep, folder):
    status, out, err = layersweep(
        "map llama --text lines.txt --criterion influence --criterion cka --pool all --out c.parquet"
    )
    assert status == 0, err
    table = pd.read_parquet(folder / "c.parquet")
    assert set(table.criterion) == {"influence", "cka"}
    assert set(table.pool) == {"all"}
    assert "influence, pool all" in out
    status, out, err = layersweep("map llama --text lines.txt --criterion damage --out d.parquet")
    assert status == 0, err
    assert set(pd.read_parquet(folder / "d.parquet").criterion) == {"damage"}


def test_a_criterion_that_no_sample_is_long_enough_for_is_said(layersweep, folder):
    (folder / "short.txt").write_text("the house\nthe car\n")
    status, out, err = layersweep("map llama --text short.txt --validate --out s.parquet")
    assert status == 0, err
    assert "cka left out: no sample has 4 tokens" in out


def test_bad_samples_are_listed(layersweep, folder):
    write_rows(folder / "bad.jsonl", ["{", *read_rows(folder / "clips.jsonl")])
    status, _, err = layersweep("map speechllm --manifest bad.jsonl")
    assert status == 2
    assert err.startswith("layersweep: bad.jsonl:1: not valid JSON")
    status, out, err = layersweep("map speechllm --manifest bad.jsonl --skip-bad --out b.parquet")
    assert status == 0, err
    assert "1 bad samples left out:\n  bad.jsonl:1: not valid JSON" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("map nowhere --text lines.txt", "MODEL: no folder nowhere"),
        ("map llama --text nowhere.txt", "nowhere.txt: no such file"),
        ("map llama", "--text, --manifest: give one of the two"),
        ("map llama --text lines.txt --manifest clips.jsonl", "give one of the two"),
        (
            "map llama --text lines.txt --pool ears",
            "--pool: 'ears' is not known (choose among last",
        ),
        ("map llama --text lines.txt --criterion taste", "--criterion: 'taste' is not known"),
        ("map llama --text lines.txt --dtype int4", "--dtype: 'int4' is not known"),
        ("map llama --text lines.txt --modality smell", "--modality: 'smell' is not known"),
        ("map llama --text lines.txt --modality speech", "--modality: there is no speech to map"),
        ("map llama --text lines.txt --target-language de", "a text file has no translations"),
        ("map llama --text lines.txt --depth 4", "--depth: no block of 4 layers can be removed"),
        ("map llama --text lines.txt --out map.csv", "--out: map.csv does not end in .parquet"),
        ("map llama --text lines.txt --device tpu", "--device: 'tpu' is not known"),
        ("map llama --text lines.txt --pool audio", "no utterance has a token in audio"),
        ("map speechllm --manifest lines.txt", "lines.txt:1: not valid JSON"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(layersweep, line, message):
    status, out, err = layersweep(line)
    assert status == 2
    assert message in err
    assert err.startswith("layersweep: ")
    assert err.count("\n") == 1
    assert out == ""
