"""Small decoders for the lab, trained on the spot: text copying and translation through the prompts.

A few layers learn the tasks first; each is then copied several times over, with its output
projections divided by the number of copies, and the deep decoder is trained on. So the redundancy
that sweeps over these decoders find is partly built in, and whoever shows such figures has to say so.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.config import Condition
from workers.lab.lexicon import Size
from workers.lab.muon import Muon
from workers.lab.prompts import Batch, PromptedText
from workers.lab.shapes import DECODERS, DecoderSize, decoder_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Family = Literal["llama", "qwen"]
Progress = Callable[[float, str], None]

CONDITIONS = {
    Condition(task="asr", source_language="en"): 0.15,
    Condition(task="asr", source_language="de"): 0.27,
    Condition(task="asr", source_language="fr"): 0.22,
    Condition(task="ast", source_language="de", target_language="en"): 0.19,
    Condition(task="ast", source_language="fr", target_language="en"): 0.17,
}
"""What a decoder learns, with shares: three conditions say English, German has most word forms."""


@dataclass(frozen=True)
class Phase:
    """One stretch of training: full rate until the gate opens, then a linear cool-down.

    Copying appears abruptly, and when it does depends on the seed: so a gate and no fixed length.
    """

    batch_size: int
    rate_vectors: float
    """AdamW's rate, for embeddings and norms."""
    rate_matrices: float
    """Muon's rate, for the matrices of the layers."""
    cool_down: int
    """Steps from the gate to the end."""
    gate: float = 0.0
    """Mean exact match on stuttered development text that opens the gate; 0: it is open."""
    most_steps: int = 0
    """Steps after which the gate opens anyway."""
    ramp: int = 0
    """Steps over which stuttering sets in: plain copying is learnt sooner, from shorter prompts."""


@dataclass(frozen=True)
class Recipe:
    """How a decoder of one size is made."""

    shape: DecoderSize
    sentences: int
    first: Phase
    second: Phase
    dev_sentences: int


RECIPES: dict[Size, Recipe] = {
    "full": Recipe(
        shape=DECODERS["full"],
        sentences=8000,
        first=Phase(64, 0.02, 0.02, cool_down=100, gate=0.7, most_steps=300, ramp=100),
        second=Phase(16, 0.002, 0.004, cool_down=30),
        dev_sentences=100,
    ),
    "tiny": Recipe(
        shape=DECODERS["tiny"],
        sentences=600,
        first=Phase(32, 0.02, 0.02, cool_down=40, gate=0.6, most_steps=150, ramp=60),
        second=Phase(16, 0.002, 0.004, cool_down=15),
        dev_sentences=32,
    ),
}
CHECK_EVERY = 10
"""Steps between two looks at the gate."""
STUTTERED = 0.75
"""Share of training sources that are stuttered; the rest are plain text."""
NOISE = 0.2
"""Standard deviation of the noise on source slots, relative to the embeddings' root mean square."""
BLUR = 0.1
"""Share of source slots that are mixed with the slot before them."""


def build_decoder(family: Family, size: Size, seed: int, out: Path, progress: Progress) -> dict:
    """Trains a decoder and writes it, with its tokenizer, as a plain Hugging Face folder.

    Args:
        family: `llama`, or `qwen` (Qwen3: norms on queries and keys, grouped key-value heads).
        size: `full` has 12 layers, `tiny` 6.
        seed: the same seed gives the same bytes.
        out: the folder, made if it is not there.
        progress: called with the share done (0–1) and a line to show.

    Returns:
        `parameters`, `steps`, `seconds` (wall-clock), `copy_exact` and `translation_exact` (mean
        share of development sentences generated without a mistake from plain text), and
        `dev_exact` and `dev_exact_stuttered` by condition.
    """
    started = time.perf_counter()
    threads, recipe = torch.get_num_threads(), RECIPES[size]
    torch.set_num_threads(1)  # sums over several threads would change the bytes
    try:
        counts = {"train": recipe.sentences, "dev": recipe.dev_sentences}
        text = PromptedText(size, seed, CONDITIONS, counts)
        generator = torch.Generator().manual_seed(seed)
        small = _new(family, recipe, len(recipe.shape.copies), len(text.tokenizer), generator)
        steps = _train(small, text, recipe.first, 1, generator, lambda f, s: progress(0.8 * f, s))
        deep = _stacked(small, family, recipe, generator)
        steps += _train(
            deep, text, recipe.second, 2, generator, lambda f, s: progress(0.8 + 0.2 * f, s)
        )
        plain = exact_match(deep, text.development(recipe.dev_sentences, 0.0))
        stuttered = exact_match(deep, text.development(recipe.dev_sentences, 1.0))
        deep.save_pretrained(out)
        text.tokenizer.save_pretrained(out)
    finally:
        torch.set_num_threads(threads)

    def mean(task: str) -> float:
        labels = [condition.label for condition in CONDITIONS if condition.task == task]
        return sum(plain[label] for label in labels) / len(labels)

    return {
        "parameters": sum(parameter.numel() for parameter in deep.parameters()),
        "steps": steps,
        "seconds": round(time.perf_counter() - started, 2),
        "copy_exact": mean("asr"),
        "translation_exact": mean("ast"),
        "dev_exact": plain,
        "dev_exact_stuttered": stuttered,
    }


def _new(
    family: Family, recipe: Recipe, layers: int, vocabulary: int, generator: torch.Generator
) -> "PreTrainedModel":
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape = {
        **decoder_config(family, recipe.shape, layers),
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    del shape["model_type"]
    model: PreTrainedModel
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**shape))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.02, generator=generator)
        for layer in model.model.layers:
            _make_mimetic(layer.self_attn, recipe.shape.hidden // recipe.shape.heads)
    return model


def _make_mimetic(attention: Any, head: int) -> None:
    """Queries start equal to keys, and outputs as the transpose of values.

    A trained transformer tends that way (Trockman and Kolter 2023, arXiv 2305.09828); starting
    there, copying appears after about 70 steps instead of 90.
    """
    queries, keys = attention.q_proj.weight, attention.k_proj.weight
    groups = keys.shape[0] // head
    shared = queries.shape[0] // keys.shape[0]

    def for_each_head(weight: Tensor) -> Tensor:
        return weight.view(groups, head, -1).repeat_interleave(shared, 0).flatten(0, 1)

    queries.copy_(for_each_head(keys))
    attention.o_proj.weight.copy_(for_each_head(attention.v_proj.weight).T)


def _stacked(
    small: "PreTrainedModel", family: Family, recipe: Recipe, generator: torch.Generator
) -> "PreTrainedModel":
    """Each layer of the core several times in a row, output projections divided by how often."""
    origin = [layer for layer, copies in enumerate(recipe.shape.copies) for _ in range(copies)]
    deep = _new(family, recipe, len(origin), small.config.vocab_size, generator)
    weights = small.state_dict()
    stacked: dict[str, Tensor] = {}
    for name in deep.state_dict():
        head, layers, rest = name.partition(".layers.")
        if not layers:
            stacked[name] = weights[name]
            continue
        number, _, part = rest.partition(".")
        layer = origin[int(number)]
        weight = weights[f"{head}.layers.{layer}.{part}"]
        outputs = part in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
        stacked[name] = weight / recipe.shape.copies[layer] if outputs else weight
    deep.load_state_dict(stacked)
    return deep


def _scores(model: "PreTrainedModel", batch: Batch, embedded: Tensor) -> Tensor:
    """Logits `[labels, vocabulary]`, at the positions that have a label and nowhere else."""
    states = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return model.lm_head(states.flatten(0, 1)[batch.positions])


def _as_speech(embedded: Tensor, source: Tensor, generator: torch.Generator) -> Tensor:
    """Source slots blurred and noisy, as a projector's output is: `[batch, time, hidden]`."""
    shape = (*source.shape, 1)
    share = torch.rand(shape, generator=generator) * 0.5
    share *= torch.rand(shape, generator=generator) < BLUR
    blurred = embedded + share * (embedded.roll(1, 1) - embedded)
    scale = NOISE * embedded.detach().square().mean().sqrt()
    noise = torch.randn(embedded.shape, generator=generator) * scale
    return torch.where(source.unsqueeze(-1), blurred + noise, embedded)


def _train(
    model: "PreTrainedModel",
    text: PromptedText,
    phase: Phase,
    stream: int,
    generator: torch.Generator,
    progress: Progress,
) -> int:
    """Trains in place; returns the steps it took."""
    inside = {id(p) for p in model.model.layers.parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in inside]
    vectors = [p for p in model.parameters() if id(p) not in inside]
    muon = Muon(matrices, phase.rate_matrices, weight_decay=0.0)
    adam = torch.optim.AdamW(
        vectors, lr=phase.rate_vectors, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    table = model.get_input_embeddings()
    batches: Iterator[Batch] = text.training(phase.batch_size, STUTTERED, phase.ramp, stream)
    checked = text.development(24, 1.0)
    opened: int | None = None if phase.gate else 0
    step = 0
    while opened is None or step < opened + phase.cool_down:
        factor = min(1.0, (step + 1) / 5)
        if opened is not None:
            factor = 1 - (step - opened) / phase.cool_down
        adam.param_groups[0]["lr"] = phase.rate_vectors * factor
        muon.param_groups[0]["lr"] = phase.rate_matrices * factor
        batch = next(batches)
        embedded = _as_speech(table(batch.tokens), batch.source, generator)
        loss = functional.cross_entropy(_scores(model, batch, embedded), batch.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(vectors, 1.0)
        adam.step()
        muon.step()
        model.zero_grad()
        step += 1
        if step % CHECK_EVERY:
            continue
        shown = f"step {step}, loss {loss.item():.2f}"
        if opened is None:
            matches = exact_match(model, checked)
            mean = math.fsum(matches.values()) / len(matches)
            opened = step if mean >= phase.gate or step >= phase.most_steps else None
            shown += f", exact {mean:.2f}"
        progress(step / (phase.cool_down + (phase.most_steps if opened is None else opened)), shown)
    return step


@torch.no_grad()
def exact_match(model: "PreTrainedModel", batches: dict[str, Batch]) -> dict[str, float]:
    """Share of examples whose every target token is the likeliest, by condition.

    The same as the exact match of greedy decoding, from one forward pass.
    """
    table = model.get_input_embeddings()
    matches = {}
    for label, batch in batches.items():
        scores = _scores(model, batch, table(batch.tokens))
        right = (scores.argmax(-1) == batch.labels).split(batch.lengths)
        matches[label] = sum(bool(row.all()) for row in right) / len(batch.lengths)
    return matches
