"""The stages as plain functions: what each trains, keeps and writes. No Ray, no lab models."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from workers.base import load_decoder, trained_speechllm
from workers.batches import IGNORED, collate, encode
from workers.config import (
    AdaptSettings,
    Condition,
    DamageSettings,
    DecodeSettings,
    HealSettings,
    MapSettings,
    PromptSettings,
)
from workers.data import read_utterances
from workers.errors import NotFinite
from workers.examples import examples_of
from workers.features import Features
from workers.lab.grammar import tokenizer
from workers.maps.redundancy import RedundancyMap
from workers.stages import STAGES, Context, Input
from workers.training import logits_at

LAYERS = 4
DECODER = {"dtype": "float32", "trust_remote_code": False}
CONDITION = {"task": "asr", "source_language": "en", "target_language": None}
TRANSLATION = {"task": "ast", "source_language": "en", "target_language": "de"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random decoder, a data set with encoder features, and the base adapted to it."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    words = tokenizer("tiny")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=2, max_position_embeddings=128,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "decoder")
    words.save_pretrained(root / "decoder")
    vocabulary = [w for w in words.get_vocab() if w.isalpha()]
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6)):
        texts = [" ".join(rng.choice(vocabulary, 3)) for _ in range(count)]
        rows = {
            "id": [f"{split}{i}" for i in range(count)],
            "duration": [0.8] * count,
            "lang": ["en"] * count,
            "text": texts,
            "text_en": texts,
            "text_de": [" ".join(reversed(t.split())) for t in texts],
            "words": [[{"word": w, "start": 0.2 * j, "end": 0.2 * j + 0.2} for j, w in enumerate(t.split())] for t in texts],
        }  # fmt: skip
        (root / "data").mkdir(exist_ok=True)
        pq.write_table(pa.table(rows), root / "data" / f"{split}.parquet")
        folder = root / f"features-{split}"
        folder.mkdir()
        frames = torch.randn(count * 20, 16).half()
        save_file({"frames": frames}, folder / "features.safetensors")
        index = {"id": rows["id"], "start": [20 * i for i in range(count)],
                 "frames": [20] * count, "seconds": [0.8] * count}  # fmt: skip
        pq.write_table(pa.table(index), folder / "index.parquet")
    conditions = [
        {**c, "data": "data0", "features": "features0", "split": "train"}
        for c in (CONDITION, TRANSLATION)
    ]
    world = {
        "root": root,
        "decoder": Input(str(root / "decoder")),
        "data": Input(str(root / "data")),
        "train": Input(str(root / "features-train")),
        "test": Input(str(root / "features-test")),
        "conditions": conditions,
        "context": Context(),
    }
    params = {
        "decoder": DECODER,
        "projector": {"kind": "mlp", "stack": 4, "hidden": 24},
        "prompts": PromptSettings().model_dump(),
        "settings": AdaptSettings(steps=4, batch_size=8, alignment_steps=3).model_dump(),
        "conditions": conditions,
    }
    world["base"] = run(world, "adapt", params, decoder=True, training=True)
    return world


def run(world, kind, params, *, decoder=True, training=False, context=None, **inputs):
    """Run a stage into a new folder; returns the folder as an input for the next."""
    out = world["root"] / f"{kind}-{len(list(world['root'].iterdir()))}"
    out.mkdir()
    if decoder:
        inputs["decoder"] = world["decoder"]
    if training:
        inputs |= {"data0": world["data"], "features0": world["train"]}
    STAGES[kind].function()(params, inputs, out, context or world["context"])
    return Input(str(out))


def heal(world, mode, block, **changes):
    params = {"decoder": DECODER, "mode": mode, "block": block}
    if mode != "none":
        settings = HealSettings(steps=3, batch_size=8).model_dump()
        params |= {"settings": settings, "seed": 0, "conditions": world["conditions"]}
    params |= changes
    return run(world, "heal", params, training=mode != "none", base=world["base"])


def evaluate(world, model, condition=CONDITION):
    params = {
        "decoder": DECODER,
        "condition": condition,
        "split": "test",
        "settings": DecodeSettings().model_dump(),
    }
    return run(world, "evaluate", params, model=model, data=world["data"], features=world["test"])


def digest_of_folder(folder):
    """Digests of all files of a folder."""
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def weights(artefact):
    folder = Path(artefact.path)
    return (
        load_file(folder / "adapter" / "adapter_model.safetensors"),
        load_file(folder / "projector.safetensors"),
    )


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_an_unpruned_model_that_is_not_healed_is_the_base(world):
    control = weights(heal(world, "none", None))
    base = weights(world["base"])
    assert same(control[0], base[0])
    assert same(control[1], base[1])


@pytest.mark.parametrize(
    ("mode", "adapter_changes", "projector_changes"),
    [("none", False, False), ("projector", False, True), ("decoder", True, False), ("joint", True, True)],
)  # fmt: skip
def test_healing_trains_what_its_mode_says_and_nothing_else(
    world, mode, adapter_changes, projector_changes
):
    block = {"start": 1, "depth": 2}
    untouched = weights(heal(world, "none", block))
    healed = weights(heal(world, mode, block))
    assert same(healed[0], untouched[0]) is not adapter_changes
    assert same(healed[1], untouched[1]) is not projector_changes


def test_a_pruned_adapter_is_numbered_by_the_layers_that_are_left(world):
    adapter, _ = weights(heal(world, "none", {"start": 1, "depth": 2}))
    base, _ = weights(world["base"])
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in adapter}
    assert layers == {0, 1}
    name = next(n for n in adapter if ".layers.1." in n)
    assert torch.equal(adapter[name], base[name.replace(".layers.1.", ".layers.3.")])


def test_the_base_decoder_is_bit_identical_after_any_stage(world):
    resident = next(iter(world["context"].resident.values()))
    resident.release()
    before = {name: value.clone() for name, value in resident.decoder.state_dict().items()}
    on_disk = load_file(f"{world['decoder'].path}/model.safetensors")
    evaluate(world, heal(world, "joint", {"start": 0, "depth": 1}))
    assert next(iter(world["context"].resident.values())) is resident
    resident.release()
    assert same(dict(resident.decoder.state_dict()), before)
    assert all(torch.equal(before[name], value) for name, value in on_disk.items())
    assert resident.decoder.config.num_hidden_layers == LAYERS


def test_the_same_stage_gives_the_same_bytes(world):
    block = {"start": 1, "depth": 1}
    one, other = heal(world, "joint", block), heal(world, "joint", block)
    assert digest_of_folder(one.path) == digest_of_folder(other.path)


def test_a_stage_gives_the_same_bytes_in_a_fresh_process_as_in_a_used_one(world):
    model = heal(world, "joint", {"start": 2, "depth": 1})
    used = evaluate(world, model)
    params = {
        "decoder": DECODER, "condition": CONDITION, "split": "test",
        "settings": DecodeSettings().model_dump(),
    }  # fmt: skip
    fresh = run(
        world, "evaluate", params, context=Context(), model=model,
        data=world["data"], features=world["test"],
    )  # fmt: skip
    assert digest_of_folder(used.path) == digest_of_folder(fresh.path)


def test_evaluation_keeps_every_hypothesis_and_scores_them(world):
    folder = evaluate(world, world["base"]).path
    table = pd.read_parquet(f"{folder}/hypotheses.parquet")
    assert list(table["id"]) == [f"test{i}" for i in range(6)]
    assert (table["words"] == 3).all()
    found = json.loads(Path(folder, "scores.json").read_text())
    assert [s["metric"] for s in found["scores"]] == ["wer", "cer"]
    wer = 100 * table["word_errors"].sum() / table["words"].sum()
    assert found["scores"][0]["value"] == pytest.approx(wer)
    assert found["runaway_rate"] == table["runaway"].mean()


def test_translation_is_scored_against_the_translation(world):
    folder = evaluate(world, world["base"], TRANSLATION).path
    table = pd.read_parquet(f"{folder}/hypotheses.parquet")
    data = pd.read_parquet(f"{world['data'].path}/test.parquet")
    assert list(table["reference"]) == list(data["text_de"])


@pytest.mark.parametrize(
    ("modality", "adapted", "pools"),
    [
        ("text", False, {"last", "prompt", "target", "all"}),
        ("text", True, {"last", "prompt", "target", "all"}),
        ("speech", True, {"last", "prompt", "audio", "target", "all"}),
    ],
)
def test_maps_hold_every_block_of_every_pool_there_is(world, modality, adapted, pools):
    params = {
        "decoder": DECODER,
        "condition": CONDITION,
        "modality": modality,
        "split": "test",
        "settings": MapSettings(samples=4, batch_size=3).model_dump(),
        "prompts": None if adapted else PromptSettings().model_dump(),
    }
    inputs = {"data": world["data"]}
    if adapted:
        inputs["base"] = world["base"]
    if modality == "speech":
        inputs["features"] = world["test"]
    table = pd.read_parquet(run(world, "map", params, **inputs).path + "/map.parquet")
    assert set(table["pool"]) == pools
    one = table[table["pool"] == "all"]
    assert len(one) == LAYERS * (LAYERS + 1) // 2
    assert (one["samples"] == 4).all()
    assert one["distance"].between(0, 1).all()


def test_damage_is_what_the_unhealed_model_loses(world):
    settings = DamageSettings(samples=6, depths=(1,)).model_dump(mode="json")
    params = {
        "decoder": DECODER,
        "condition": CONDITION,
        "modality": "speech",
        "split": "test",
        "settings": settings,
        "prompts": None,
    }
    inputs = {"data": world["data"], "base": world["base"], "features": world["test"]}
    damage = RedundancyMap.load(Path(run(world, "damage", params, **inputs).path))
    assert damage.criteria == ("damage",)
    whole = loss(world, heal(world, "none", None))
    np.testing.assert_allclose(damage.unpruned_loss, whole, rtol=1e-4)
    for start, lost in enumerate(damage.distances(1, "target", "damage")):
        healed = heal(world, "none", {"start": start, "depth": 1})
        assert lost == pytest.approx((loss(world, healed) - whole).mean(), abs=1e-5)


def loss(world, model) -> np.ndarray:
    """Mean target loss of each test utterance, in the order of their ids."""
    utterances = read_utterances(Path(world["data"].path), "test")
    examples = examples_of(utterances, Condition(**CONDITION), Features(Path(world["test"].path)))
    resident = load_decoder(world["decoder"], DECODER, world["context"])
    with trained_speechllm(Path(model.path), resident) as opened, torch.no_grad():
        batch = collate(opened, encode(opened, examples), "right")
        places = batch.labels != IGNORED
        logits = logits_at(opened, batch, places)
        each = torch.nn.functional.cross_entropy(logits, batch.labels[places], reduction="none")
        rows = places.nonzero()[:, 0]
        return np.array([float(each[rows == row].mean()) for row in range(len(examples))])


def test_training_on_nan_stops_and_names_the_utterance(world, tmp_path):
    frames = load_file(f"{world['train'].path}/features.safetensors")["frames"]
    broken = tmp_path / "features"
    broken.mkdir()
    save_file({"frames": torch.full_like(frames, float("nan"))}, broken / "features.safetensors")
    index = pq.read_table(f"{world['train'].path}/index.parquet")
    pq.write_table(index, broken / "index.parquet")
    world = {**world, "train": Input(str(broken))}
    with pytest.raises(NotFinite, match="train"):
        heal(world, "joint", None)
