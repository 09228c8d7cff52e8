"""`layersweep prune` as a person or a program calls it."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from orchestrator.cli import main
from orchestrator.cli.prune import parse_layers
from orchestrator.compare import spans
from workers.errors import InvalidInput


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=6,
        num_attention_heads=2, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def layersweep(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["layersweep", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capsys.readouterr()

    return call


def test_it_says_what_it_removed_and_where_the_result_is(layersweep, model, tmp_path):
    status, out, err = layersweep(
        "prune", model, "--start", 1, "--depth", 2, "--out", tmp_path / "cut"
    )
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"Removed layers 1–2 of 6 (33 %) from {model}"
    assert lines[2].split() == ["layers", "6", "4", "33.3", "%"]
    assert any(line.startswith("ok    all ") for line in lines)
    assert lines[-1] == f"Pruned model: {tmp_path / 'cut'}"
    assert "copying the layers that stay" in err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cut").config.num_hidden_layers == 4


def test_json_is_all_there_is_on_standard_output(layersweep, model, tmp_path):
    status, out, _ = layersweep(
        "prune", model, "--layers", "0,3-4", "--out", tmp_path / "cut", "--json",
        "--in-memory", "--check", "stored", "--dtype", "bfloat16",
    )  # fmt: skip
    assert status == 0
    found = json.loads(out)
    assert (found["removed"], found["layers"], found["streamed"]) == ([0, 3, 4], [6, 3], False)
    assert found["weight_bytes"][1] == 2 * found["parameters"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start", 4, "--depth", 3], "layer 6 does not exist: the decoder has 6 layers"),
        (["--start", 0, "--depth", 6], "all 6 layers would be removed"),
        (["--start", 1], "--depth: a block has a start and a depth"),
        (["--start", 1, "--depth", 1, "--layers", "2"], "either as a block or one by one"),
        ([], "either as a block or one by one"),
        (["--layers", "2,x"], "'x' is neither a number nor a range"),
        (["--layers", "2,2"], "named twice"),
        (["--layers", "1", "--dtype", "int3"], "'int3' is none of the types"),
        (["--layers", "1", "--check", "twice"], "'twice' is no check"),
        (["--layers", "1", "--merge-adapter"], "the model has no adapter"),
    ],
)
def test_mistakes_end_with_status_2_and_leave_nothing(
    layersweep, model, tmp_path, arguments, message
):
    status, out, err = layersweep("prune", model, *arguments, "--out", tmp_path / "cut")
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_no_such_model(layersweep, tmp_path):
    status, _, err = layersweep(
        "prune", tmp_path / "gone", "--layers", 1, "--out", tmp_path / "cut"
    )
    assert (status, "no folder" in err) == (2, True)


def test_layers_are_written_as_numbers_and_ranges():
    assert parse_layers(3, 2, None) == [3, 4]
    assert parse_layers(None, None, "3,7-9, 1 - 1") == [3, 7, 8, 9, 1]
    assert spans([1, 3, 4, 5, 9]) == "1, 3–5, 9"
    for text in ("", "5-3", "-1", "1,,2", "1.5"):
        with pytest.raises(InvalidInput, match="neither a number nor a range"):
            parse_layers(None, None, text)
