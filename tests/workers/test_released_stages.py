"""The stages on released SpeechLLMs: encode, adopt, map, heal and evaluate as plain functions."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from tiny_released import (
    ASR,
    CLIPS,
    LAYERS,
    MAIN,
    RATE,
    TEXTS,
    made_when_asked_for,
    original,
    original_inputs,
)

from workers.config import DecodeSettings, HealSettings, LoraSettings, MapSettings, PromptSettings
from workers.stages import STAGES, Context, Input

DECODER = {"dtype": "float32", "trust_remote_code": False, "speechllm": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return made_when_asked_for(tmp_path_factory)


class World:
    """A released model, a manifest of clips, and the stages as plain functions."""

    def __init__(self, folder, root):
        self.folder, self.root, self.context, self.count = folder, root, Context(), 0
        rows = []
        for name, waveform in CLIPS.items():
            soundfile.write(root / f"{name}.wav", waveform, RATE, subtype="FLOAT")
            rows.append({"audio_filepath": f"{name}.wav", "text": TEXTS[name], "id": name})
        (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.model, self.data = Input(str(folder)), Input(str(root / "data.jsonl"))
        self.features = self.run(
            "encode", {"split": None, **DECODER}, encoder=self.model, data=self.data
        )
        self.base = self.run(
            "adopt",
            {
                "decoder": DECODER,
                "prompts": PromptSettings().model_dump(),
                "lora": LoraSettings(rank=2).model_dump(),
                "seed": 0,
                "conditions": [ASR.model_dump()],
            },
            decoder=self.model,
        )

    def run(self, kind, params, **inputs):
        self.count += 1
        out = self.root / f"{kind}-{self.count}"
        out.mkdir()
        STAGES[kind].function()(params, inputs, out, self.context)
        return Input(str(out))

    def heal(self, mode, block):
        params = {"decoder": DECODER, "mode": mode, "block": block}
        inputs = {"decoder": self.model, "base": self.base}
        if mode != "none":
            settings = HealSettings(steps=2, batch_size=3, micro_batch=2)
            data = {"data": "data0", "features": "features0", "split": None}
            params |= {"settings": settings.model_dump(), "seed": 0}
            params |= {"conditions": [{**ASR.model_dump(), **data}]}
            inputs |= {"data0": self.data, "features0": self.features}
        return self.run("heal", params, **inputs)

    def evaluate(self, model):
        settings = DecodeSettings(tokens_per_second=1, extra_tokens=10)
        out = self.run(
            "evaluate",
            {"decoder": DECODER, "condition": ASR.model_dump(), "split": None,
             "settings": settings.model_dump()},
            decoder=self.model, model=model, data=self.data, features=self.features,
        )  # fmt: skip
        return pd.read_parquet(Path(out.path) / "hypotheses.parquet")

    def map(self, modality, *, base=True, **decoder):
        inputs = {"decoder": self.model, "data": self.data}
        if base:
            inputs["base"] = self.base
        if modality == "speech":
            inputs["features"] = self.features
        out = self.run(
            "map",
            {"decoder": {**DECODER, **decoder}, "condition": ASR.model_dump(), "split": None,
             "modality": modality, "settings": MapSettings(samples=3).model_dump(),
             "prompts": None if base else PromptSettings().model_dump()},
            **inputs,
        )  # fmt: skip
        return pd.read_parquet(Path(out.path) / "map.parquet")


@pytest.fixture(scope="module")
def worlds(folders, tmp_path_factory):
    made = {}

    def world(family):
        if family not in made:
            made[family] = World(folders(family), tmp_path_factory.mktemp(f"{family}-world"))
        return made[family]

    return world


def weights(folder, file):
    return load_file(Path(folder.path) / file)


@pytest.mark.parametrize("family", MAIN)
def test_the_control_without_healing_writes_what_the_original_does(worlds, folders, family):
    world = worlds(family)
    written = world.evaluate(world.heal("none", None))
    theirs, processor = original(folders(family))
    described = json.loads((Path(world.base.path) / "speechllm.json").read_text())
    prompt = described["config"]["prompts"]["conditions"]["asr-en"]["text"]
    for name, hypothesis in zip(written["id"], written["hypothesis"], strict=True):
        given = original_inputs(processor, prompt, CLIPS[name])
        with torch.no_grad():
            new = theirs.generate(**given, max_new_tokens=10 + len(CLIPS[name]) // RATE + 1)
        text = processor.tokenizer.decode(
            new[0, given["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert text.strip().startswith(hypothesis)
        assert hypothesis


@pytest.mark.parametrize("family", MAIN)
@pytest.mark.parametrize("mode", ["none", "projector", "decoder", "joint"])
def test_healing_trains_what_its_mode_says_and_the_rest_stays_theirs(worlds, family, mode):
    world = worlds(family)
    healed = world.heal(mode, {"start": 1, "depth": 2})
    theirs = weights(world.base, "projector.safetensors")
    ours = weights(healed, "projector.safetensors")
    assert ours.keys() == theirs.keys()
    changed = any(not torch.equal(ours[key], theirs[key]) for key in ours)
    assert changed == (mode in ("projector", "joint"))
    adapter = weights(healed, "adapter/adapter_model.safetensors")
    trained = any(value.any() for key, value in adapter.items() if "lora_B" in key)
    assert trained == (mode in ("decoder", "joint"))
    assert len(world.evaluate(healed)) == len(CLIPS)
    resident = next(iter(world.context.resident.values()))
    assert len(resident.decoder.get_decoder().layers) == LAYERS


@pytest.mark.parametrize("family", MAIN)
def test_maps_of_speech_and_text_are_whole(worlds, family):
    world = worlds(family)
    speech, text = world.map("speech"), world.map("text")
    for table, pools in ((speech, {"audio"}), (text, set())):
        assert len(table) == LAYERS * (LAYERS + 1) // 2 * table["pool"].nunique()
        assert set(table["pool"]) == {"last", "prompt", "target", "all"} | pools
        assert table["distance"].between(0, 1).all()
    assert not np.allclose(speech["distance"].mean(), text["distance"].mean())
    before = world.map("text", base=False)
    assert np.allclose(before["distance"], text["distance"], atol=1e-6), "nothing was adapted"


def test_the_text_map_before_adapting_is_made_without_granites_adapter(worlds):
    world = worlds("granite-speech-lora")
    before = world.map("text", base=False, own_adapter=False)
    after = world.map("text")
    assert not np.allclose(before["distance"], after["distance"], atol=1e-3)
    assert np.allclose(world.map("text", base=False)["distance"], after["distance"], atol=1e-6)


def test_any_number_of_rounds_leaves_the_model_as_it_was(worlds):
    world = worlds("granite-speech")
    first = world.evaluate(world.heal("none", None))
    for mode in ("joint", "decoder"):
        world.evaluate(world.heal(mode, {"start": 0, "depth": 1}))
    assert world.evaluate(world.heal("none", None)).equals(first)
