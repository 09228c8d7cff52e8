"""Memory of stages as a plan reckons it, held against real models: counts exact, the rest near."""

import json

import pytest
import tiny_released
import torch
from tiny_decoders import FAMILIES, tiny_lm

from orchestrator.estimate.memory import CONTEXT_BYTES, HEADROOM, Memory, card_share, stage_memory
from orchestrator.estimate.tensors import config_shapes
from orchestrator.plan import build_plan
from orchestrator.reuse import assess
from orchestrator.sources import DigestCache
from orchestrator.store import open_store
from orchestrator.sweep import parse_sweep
from workers.batches import Example, encode
from workers.config import Condition, LoraSettings, ProjectorConfig
from workers.lab import acoustics, encoders
from workers.lab.decoders import RECIPES, _new
from workers.lab.grammar import tokenizer
from workers.lab.shapes import (
    DECODERS,
    ENCODERS,
    FRAME_RATE,
    LONGEST_SECONDS,
    LONGEST_WORDS,
)
from workers.lora import fused_lora
from workers.projectors import build_projector
from workers.released.model import open_released
from workers.speechllm import SpeechLLM, SpeechLLMConfig
from workers.stages.heal import TRAINED
from workers.surgery.cut import pruned
from workers.surgery.decoder_parts import count_parameters, unique_parameters
from workers.training import _backward, learning

PROJECTOR = {"kind": "mlp", "stack": 2, "hidden": 48}
TINY = {
    "name": "tiny",
    "models": [{"decoder": "lab:llama-tiny"}],
    "encoders": [{"encoder": "lab:whisper-tiny", "projector": PROJECTOR}],
    "tasks": [{"task": "asr", "language": "en", "data": "lab:speech-tiny"}],
    "depths": [0, 2],
    "selectors": ["last"],
    "heal": {"modes": ["none", "projector", "decoder", "joint"], "batch_size": 8},
    "adapt": {"batch_size": 8, "lora": {"rank": 4}},
}
GIB = 2**30


def plan_of(folder, **changes):
    plan = build_plan(parse_sweep({**TINY, **changes}), folder, DigestCache(folder / "d.json"))
    assess(plan, open_store(folder / "empty"))
    return plan


def memory_of(plan, kind, part=""):
    found = stage_memory(plan)
    return next(found[node.id] for node in plan.by_kind(kind) if part in node.id)


def lab_decoder(family):
    generator = torch.Generator().manual_seed(0)
    recipe = RECIPES["tiny"]
    return _new(family, recipe, sum(recipe.shape.copies), len(tokenizer("tiny")), generator)


def lab_speechllm(family, dtype=torch.float32):
    config = SpeechLLMConfig(
        encoder_dim=ENCODERS["whisper", "tiny"].width,
        projector=ProjectorConfig(**PROJECTOR),
        lora=LoraSettings(rank=4),
    )
    return SpeechLLM.create(lab_decoder(family).to(dtype), tokenizer("tiny"), config, 0)


def examples(count=8):
    """Utterances as long as the lab's longest."""
    words = [w for w in tokenizer("tiny").get_vocab() if w.isalpha()][20 : 20 + LONGEST_WORDS - 1]
    frames = torch.randn(round(LONGEST_SECONDS * FRAME_RATE), ENCODERS["whisper", "tiny"].width)
    condition = Condition(task="asr", source_language="en")
    text = " ".join(words)
    return [Example(str(i), condition, frames, text, text, LONGEST_SECONDS) for i in range(count)]


# --- what is counted --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize("mode", ["projector", "decoder", "joint"])
def test_weights_adapter_gradients_and_optimizer_are_exactly_those_of_the_real_model(
    tmp_path, family, mode
):
    plan = plan_of(tmp_path, models=[{"decoder": f"lab:{family}-tiny"}])
    found = memory_of(plan, "heal", f"/d2/{mode}")
    decoder = lab_decoder(family)
    assert found.weights == unique_parameters(decoder)[1]
    model = lab_speechllm(family)
    assert found.adapter == sum(4 * p.numel() for p in model.adapter_parameters()) + sum(
        4 * p.numel() for p in model.projector.parameters()
    )
    with pruned(model.decoder, (4, 5)):
        parameters = [p for part in TRAINED[mode] for p in model.parameters_of(part)]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert found.gradients == sum(p.grad.nbytes for p in parameters)
    kept = [value for state in optimizer.state.values() for value in state.values()]
    assert found.optimizer == sum(value.nbytes for value in kept)


def test_half_precision_halves_the_decoder_and_not_the_adapter(tmp_path):
    whole = memory_of(plan_of(tmp_path), "adapt")
    half = memory_of(
        plan_of(tmp_path, models=[{"decoder": "lab:llama-tiny", "dtype": "bfloat16"}]), "adapt"
    )
    assert half.weights == whole.weights // 2
    assert (half.adapter, half.optimizer) == (whole.adapter, whole.optimizer)
    model = lab_speechllm("llama", torch.bfloat16)
    assert half.adapter == sum(
        p.nbytes for part in ("decoder", "projector") for p in model.parameters_of(part)
    )


@pytest.mark.parametrize("targets", ["attention", ["down_proj"]])
def test_adapters_on_some_modules_are_counted_where_they_sit(tmp_path, targets):
    adapt = {"lora": {"rank": 4, "targets": targets}}
    found = memory_of(plan_of(tmp_path, adapt=adapt), "adapt")
    config = SpeechLLMConfig(
        encoder_dim=64,
        projector=ProjectorConfig(**PROJECTOR),
        lora=LoraSettings(rank=4, targets=targets),
    )
    model = SpeechLLM.create(lab_decoder("llama"), tokenizer("tiny"), config, 0)
    parts = model.parameters_of("decoder") + model.parameters_of("projector")
    assert found.gradients == sum(p.nbytes for p in parts)


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv", "qformer"])
def test_every_projector_is_counted(tmp_path, kind):
    settings = {"kind": kind, "stack": 3, "hidden": 16, "queries": 2}
    encoder = {"encoder": "lab:whisper-tiny", "projector": settings}
    heal = {"modes": ["projector"]}
    found = memory_of(plan_of(tmp_path, encoders=[encoder], heal=heal), "heal")
    model = build_projector(ProjectorConfig(**settings), 64, DECODERS["tiny"].hidden, 1.0)
    assert found.gradients == sum(p.nbytes for p in model.parameters())
    assert found.optimizer == 2 * found.gradients + 4 * len(list(model.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_is_read_from_its_config_alone_or_from_its_files(tmp_path, family):
    model = tiny_lm(family)
    folder = tmp_path / "llm"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    shared = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    real = {name: tuple(p.shape) for name, p in model.state_dict().items() if name not in shared}
    if family != "gemma2":  # tied by default: its file says nothing
        assert config_shapes(config) == real
    models = [{"decoder": "llm"}]
    exact = unique_parameters(model)[1]
    stored = memory_of(plan_of(tmp_path, models=models), "adapt")
    assert stored.weights == exact
    (folder / "model.safetensors").unlink()
    assert memory_of(plan_of(tmp_path, models=models), "adapt") == stored


def test_what_cannot_be_read_is_unknown_and_never_a_guess(tmp_path):
    folder = tmp_path / "llm"
    folder.mkdir()
    config = {"model_type": "nobody-knows", "num_hidden_layers": 6, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    plan = plan_of(tmp_path, models=[{"decoder": "llm"}])
    found = stage_memory(plan)
    assert {found[n.id] for n in plan.by_kind("heal")} == {None}
    assert found["encode/whisper-tiny/speech-tiny.en.train"].total > 0


@pytest.mark.parametrize("make", [tiny_released.qwen2_audio, tiny_released.granite_speech])
def test_a_released_speechllm_is_counted_whole(tmp_path, make):
    folder = tmp_path / "audio-llm"
    make(folder)
    plan = plan_of(tmp_path, models=[{"speechllm": "audio-llm"}], encoders=[])
    found = memory_of(plan, "heal", "/d2/joint")
    released = open_released(str(folder), dtype=torch.float32)
    parts = [released.decoder, released.encoder.model, released.projector]
    assert found.weights == count_parameters(p for part in parts for p in part.parameters())[1]
    condition = Condition(task="asr", source_language="en")
    model = released.speechllm([condition], lora=LoraSettings(rank=4))
    with pruned(model.decoder, (2, 3)):
        trained = model.parameters_of("decoder") + model.parameters_of("projector")
    assert found.gradients == sum(p.nbytes for p in trained)
    assert memory_of(plan, "encode").weights == found.weights


def test_the_labs_sizes_are_those_of_what_it_makes():
    for (kind, size), of in ENCODERS.items():
        recipe = encoders.RECIPES[kind, size]
        make = acoustics.Whisper if kind == "whisper" else acoustics.Conformer
        front = make(recipe.width, recipe.layers, recipe.feed_forward)
        assert of.width == recipe.width
        assert of.parameters == sum(p.numel() for p in front.model.parameters())
    for size, of in DECODERS.items():
        assert of.vocabulary == len(tokenizer(size))


# --- what is estimated ------------------------------------------------------------------------


def kept_for_backward(model, batch):
    """Bytes of everything autograd keeps for one backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    encoded = encode(model, batch)
    with (
        learning(
            model, [p for part in ("decoder", "projector") for p in model.parameters_of(part)]
        ),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        fused_lora(model.decoder),
    ):
        _backward(model, encoded, 1, 0)
    return sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_near_what_the_backward_pass_really_keeps(tmp_path, family, dtype):
    models = [{"decoder": f"lab:{family}-tiny", "dtype": dtype}]
    found = memory_of(plan_of(tmp_path, models=models), "adapt")
    model = lab_speechllm(family, getattr(torch, dtype))
    kept = kept_for_backward(model, examples())
    assert kept <= found.activations + found.logits <= 1.25 * kept


def test_a_smaller_micro_batch_and_fewer_layers_need_less(tmp_path):
    plan = plan_of(tmp_path)
    deep, cut = (memory_of(plan, "heal", f"/{d}/joint") for d in ("d0", "d2"))
    assert cut.weights == deep.weights  # the removed layers stay loaded
    assert cut.gradients < deep.gradients
    assert cut.activations < deep.activations
    heal = {**TINY["heal"], "micro_batch": 2}
    small = memory_of(plan_of(tmp_path, heal=heal), "heal", "/d0/joint")
    assert small.activations == deep.activations / 4
    assert memory_of(plan, "heal", "/d0/none").activations == 0


def test_the_cache_grows_with_rows_tokens_and_layers(tmp_path):
    plan = plan_of(tmp_path)
    whole, cut = (memory_of(plan, "evaluate", f"/{d}/none") for d in ("d0", "d2"))
    assert 0 < cut.cache < whole.cache
    longer = plan_of(tmp_path, evaluate={"tokens_per_second": 80})
    assert memory_of(longer, "evaluate", "/d0/").cache > whole.cache
    fewer = plan_of(tmp_path, evaluate={"batch_size": 12})  # of 24 utterances
    assert memory_of(fewer, "evaluate", "/d0/").cache == whole.cache / 2


def test_a_block_still_undetermined_has_the_memory_of_its_depth(tmp_path):
    chosen = stage_memory(plan_of(tmp_path))
    open_ = stage_memory(plan_of(tmp_path, selectors=["consensus"]))
    name = "heal/llama-tiny+whisper-tiny/asr-en/{}/d2/joint/s0"
    assert open_[name.format("consensus")] == chosen[name.format("last")]


# --- shares of a card -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gib", "share"),
    [(1, 1 / 8), (8, 1 / 8), (9, 1 / 6), (15, 1 / 4), (20, 1 / 3), (30, 1 / 2), (36, 1.0), (99, 1.0)],
)  # fmt: skip
def test_as_many_jobs_share_a_card_as_fit_with_room_to_spare(gib, share):
    card = 80 * GIB
    assert card_share(gib * GIB, card) == share
    if share < 1:
        assert (gib * GIB + CONTEXT_BYTES) / share <= (1 - HEADROOM) * card


def test_the_total_is_the_sum_of_the_parts():
    assert Memory(1, 2, 3, 4, 5, 6, 7).total == 28
