"""Cut weight files hold the right bytes under the right names, and stay files others can read."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from workers.errors import InvalidInput
from workers.surgery.gate import stored_gate
from workers.surgery.shards import (
    BUFFER_BYTES,
    digest_of,
    layer_prefixes,
    read_headers,
    renumbered,
    write_shards,
)


def test_tensors_of_every_type_and_size_come_back_bit_for_bit(tmp_path):
    types = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    given = {f"t{i}": torch.arange(7).to(kind) for i, kind in enumerate(types)}
    given["empty"] = torch.empty(0, 3)
    given["one"] = torch.tensor(2.5)
    given["large"] = torch.randn(BUFFER_BYTES // 4 + 5)  # more than one buffer
    given["name with spaces and ü"] = torch.ones(2, 3)
    save_file(given, tmp_path / "a.safetensors", metadata={"format": "pt", "note": "kept"})
    found = {t.name: t for t in read_headers([tmp_path / "a.safetensors"])}
    out = tmp_path / "out"
    out.mkdir()
    steps = []
    plan = {f"new {name}": tensor for name, tensor in found.items() if name != "t1"}
    write_shards(plan, out, progress=lambda *step: steps.append(step))
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]
    written = load_file(out / "model.safetensors")
    assert written.keys() == {f"new {name}" for name in given} - {"new t1"}
    for name, tensor in written.items():
        original = given[name.removeprefix("new ")]
        assert tensor.dtype == original.dtype
        assert torch.equal(tensor, original)
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "kept"}
    size = sum(t.numel() * t.element_size() for t in written.values())
    assert steps[-1] == (size, size)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_files_that_become_empty_are_left_out_and_the_index_counts(tmp_path):
    for number in range(4):
        save_file({f"m.layers.{number}.w": torch.full((5,), number)}, tmp_path / f"{number}")
    found = read_headers([tmp_path / str(i) for i in range(4)])
    out = tmp_path / "out"
    out.mkdir()
    plan = {new: t for t in found if (new := renumbered(t.name, "m.layers", [0, 2, 3])) is not None}
    write_shards(plan, out, parameters=15)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 3 * 5 * 8, "total_parameters": 15}
    assert index["weight_map"] == {
        f"m.layers.{i}.w": f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)
    }
    for i, source in enumerate((0, 2, 3)):
        file = out / index["weight_map"][f"m.layers.{i}.w"]
        assert torch.equal(load_file(file)[f"m.layers.{i}.w"], torch.full((5,), source))


def test_lists_of_layers_are_found_by_their_numbers():
    names = [f"language_model.model.layers.{i}.mlp.experts.{j}.w" for i in range(3) for j in (0, 1)]
    names += [f"vision.layers.{i}.w" for i in range(3)] + ["vision.head.0.w", "norm.weight"]
    assert layer_prefixes(names, 3) == ["language_model.model.layers", "vision.layers"]
    assert layer_prefixes([*names, "vision.layers.3.w"], 3) == ["language_model.model.layers"]
    assert layer_prefixes(names, 4) == []


def test_only_layers_of_that_list_are_renumbered():
    assert renumbered("a.layers.3.w", "a.layers", [0, 3]) == "a.layers.1.w"
    assert renumbered("a.layers.1.w", "a.layers", [0, 3]) is None
    assert renumbered("b.a.layers.1.w", "a.layers", [0, 3]) == "b.a.layers.1.w"
    assert renumbered("a.layers.norm.w", "a.layers", [0, 3]) == "a.layers.norm.w"
    assert renumbered("a.layers2.3.w", "a.layers", [0, 3]) == "a.layers2.3.w"


@pytest.mark.parametrize("damage", ["cut short", "no header", "empty", "text"])
def test_damaged_files_are_named(damage, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100)}, file)
    whole = file.read_bytes()
    content = {
        "cut short": whole[:-1], "no header": whole[8:], "empty": b"", "text": b"404 not found",
    }[damage]  # fmt: skip
    file.write_bytes(content)
    with pytest.raises(InvalidInput, match="no valid safetensors file") as caught:
        read_headers([file])
    assert caught.value.where == str(file)


def test_a_name_in_two_files_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"w": torch.ones(1)}, tmp_path / name)
    with pytest.raises(InvalidInput, match="w is in a as well"):
        read_headers([tmp_path / "a", tmp_path / "b"])


class TestStoredGate:
    @pytest.fixture
    def written(self, tmp_path):
        save_file({"w": torch.ones(4), "v": torch.zeros(4)}, tmp_path / "a.safetensors")
        found = {t.name: t for t in read_headers([tmp_path / "a.safetensors"])}
        return found, {name: digest_of(t) for name, t in found.items()}

    def refuse(self, match, written, sources, digests):
        with pytest.raises(InvalidInput, match=match):
            stored_gate(None, None, written, sources, digests, "out")

    def test_a_tensor_too_few_or_too_many(self, written):
        found, digests = written
        self.refuse("v is missing", {"w": found["w"]}, found, digests)
        self.refuse("v is not meant to be there", found, {"w": found["w"]}, digests)

    def test_another_content(self, written):
        found, digests = written
        self.refuse("[vw] differs from", found, found, dict.fromkeys(digests, digests["w"][:-1]))

    def test_another_shape(self, written, tmp_path):
        found, digests = written
        save_file({"w": torch.ones(2, 2), "v": torch.zeros(4)}, tmp_path / "b.safetensors")
        other = {t.name: t for t in read_headers([tmp_path / "b.safetensors"])}
        self.refuse("w has another type or shape", other, found, digests)
