"""Training the projector and the adapter: adapting a base, healing a pruned decoder.

The effective batch never depends on how it is split into micro-batches: the loss is the mean over
all target tokens of the whole batch. Logits are computed at target positions alone.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.batches import (
    IGNORED,
    Encoded,
    Example,
    Inputs,
    Modality,
    batches,
    collate,
    encode,
    pad_frames,
)
from workers.config import TrainSettings
from workers.errors import InvalidInput, NotFinite
from workers.lora import fused_lora
from workers.speechllm import Part, SpeechLLM

Progress = Callable[[int, int, float], None]
"""Called with steps done, steps in all, and the last step's loss."""


@dataclass(frozen=True)
class TrainReport:
    """How a training run went."""

    losses: list[float]
    """Mean cross-entropy per target token, a value for each step."""
    grad_norms: list[float]
    """Gradient norm before clipping, a value for each step."""
    seconds: float
    target_tokens: int
    """Target tokens learnt from, repeats counted."""
    positions: int
    """Decoder positions computed, padding not counted."""

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return len(self.losses)


def train(
    model: SpeechLLM,
    examples: Sequence[Example],
    settings: TrainSettings,
    *,
    seed: int,
    trainable: Collection[Part],
    modality: Modality = "speech",
    progress: Progress | None = None,
    log_every: int = 10,
) -> TrainReport:
    """Trains in place what `trainable` names and nothing else.

    Args:
        model: the SpeechLLM, its decoder pruned or not.
        examples: conditions may be mixed; they share batches.
        settings: steps, batch, learning rates.
        seed: of the order of the data (and of dropout). Which parts train does not change the
            order.
        trainable: `projector`, `decoder` (its LoRA weights) or both.
        modality: what stands in the audio's place.
        progress: called every `log_every` steps and after the last.
        log_every: steps between calls.

    Raises:
        InvalidInput: no examples, nothing to train, or examples that cannot be encoded.
        NotFinite: the loss or the gradient became NaN or infinite; names step and utterances.
    """
    if not examples:
        raise InvalidInput("there are no training examples", "data.train")
    if not trainable:
        raise InvalidInput("nothing is to be trained", "trainable", "name projector or decoder")
    began = time.monotonic()
    encoded = encode(model, examples, modality)
    parts: dict[Part, float] = {
        "decoder": settings.lr_decoder,
        "projector": settings.lr_projector,
    }
    groups = [
        {"params": model.parameters_of(part), "lr": lr, "peak": lr}
        for part, lr in parts.items()
        if part in trainable
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)
    parameters = [p for group in groups for p in _parameters(group)]
    order = _endless_batches([item.length for item in encoded], settings.batch_size, seed)
    losses, norms = [], []
    tokens = positions = 0
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _learning(model, parameters), fused_lora(model.decoder):
        torch.manual_seed(seed)
        for step in range(settings.steps):
            factor = learning_rate_factor(settings, step)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            batch = [encoded[i] for i in next(order)]
            count = sum(int(np.count_nonzero(item.next_ids != IGNORED)) for item in batch)
            loss = 0.0
            for micro in _split(batch, settings.micro_batch):
                loss += _backward(model, micro, count, step)
            norm = float(nn.utils.clip_grad_norm_(parameters, settings.clip, foreach=True))
            if not math.isfinite(norm):
                raise NotFinite(
                    f"the gradient is {norm} at step {step + 1} (utterances {_ids(batch)})",
                    remedy="lower the learning rates, or look at these utterances",
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            norms.append(norm)
            tokens += count
            positions += sum(item.length for item in batch)
            done = step + 1
            if progress and (done % log_every == 0 or done == settings.steps):
                progress(done, settings.steps, loss)
    return TrainReport(losses, norms, time.monotonic() - began, tokens, positions)


def learning_rate_factor(settings: TrainSettings, step: int) -> float:
    """Learning rate of step `step` (from 0) as a fraction of the peak.

    Rises over the warm-up, reaches the peak, then falls to `final_lr` at the last step.
    """
    warmup = int(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, settings.steps - 1 - warmup)
    if settings.schedule == "constant":
        return 1.0
    fall = progress if settings.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - (1.0 - settings.final_lr) * fall


def logits_at(model: SpeechLLM, inputs: Inputs, mask: Tensor) -> Tensor:
    """The decoder's logits at chosen positions only.

    The head sees nothing but the chosen states, and what a family does to its logits afterwards
    (soft caps, scales) is kept.

    Args:
        model: the SpeechLLM.
        inputs: a batch.
        mask: positions wanted, `[batch, length]`.

    Returns:
        `[positions, vocabulary]`, row by row.
    """
    head = model.causal_lm.get_output_embeddings()

    def choose(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        return (arguments[0][mask][None],)

    hook = head.register_forward_pre_hook(choose)
    try:
        output = model.causal_lm(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            use_cache=False,
        )
    finally:
        hook.remove()
    return output.logits[0]


def align_projector(
    model: SpeechLLM,
    examples: Sequence[Example],
    *,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> list[float]:
    """Warms the projector up from word times, without running the decoder.

    Each embedding whose time falls into a word is drawn towards the mean of that word's frozen
    token embeddings: `1 - cosine` plus the squared error relative to the size of the target.

    Args:
        model: whose projector is trained in place.
        examples: with frames, duration and words (`word, start, end` in seconds).
        steps: optimizer steps, with a cosine from `lr` to 0.
        lr: peak learning rate.
        batch_size: utterances per step.
        seed: of the order of the data.

    Returns:
        The loss of each step.

    Raises:
        InvalidInput: no example has words.
        NotFinite: the loss became NaN or infinite.
    """
    # The same audio under several conditions teaches the same thing once.
    distinct = list(
        {(e.id, e.source_text): e for e in examples if e.words and e.frames is not None}.values()
    )
    if not distinct:
        raise InvalidInput(
            "no training example has word times",
            "adapt.alignment_steps",
            "set it to 0, or give the data a words column",
        )
    targets, vocabulary = _word_embeddings(model, distinct)
    rows = [_aligned_words(model, example, vocabulary) for example in distinct]
    size = targets.square().mean(-1).clamp(min=1e-12)
    parameters = model.parameters_of("projector")
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    order = _endless_batches([len(row) for row in rows], batch_size, seed)
    losses = []
    with _learning(model, parameters):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            chosen = next(order)
            embeddings, _ = model.projector(
                *pad_frames([distinct[i] for i in chosen], model.device)
            )
            words = np.full(embeddings.shape[:2], -1, dtype=np.int64)
            for row, i in enumerate(chosen):
                words[row, : len(rows[i])] = rows[i]
            word = torch.from_numpy(words).to(model.device)
            covered = word >= 0
            predicted, index = embeddings[covered], word[covered]
            target = targets[index]
            cosine = functional.cosine_similarity(predicted, target, dim=-1)
            error = (predicted - target).square().mean(-1) / size[index]
            loss = (1 - cosine + error).mean()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise NotFinite(
                    f"the alignment's loss is {losses[-1]} at step {step + 1} (utterances "
                    f"{', '.join(distinct[i].id for i in chosen)})",
                    "adapt.alignment_lr",
                    "lower it, or look at these utterances",
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return losses


class _learning:  # noqa: N801
    """Gradients for some parameters while the block runs; LoRA's dropout is on, the rest is not."""

    def __init__(self, model: SpeechLLM, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.dropouts = [m for n, m in model.decoder.named_modules() if "lora_dropout" in n]

    def __enter__(self) -> None:
        self._set(True)

    def __exit__(self, *_: object) -> None:
        self._set(False)
        for parameter in self.parameters:
            parameter.grad = None

    def _set(self, on: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(on)
        for dropout in self.dropouts:
            dropout.train(on)


def _backward(model: SpeechLLM, batch: Sequence[Encoded], count: int, step: int) -> float:
    """Adds the gradient of one micro-batch; returns its share of the loss."""
    inputs = collate(model, batch, "right")
    mask = inputs.labels != IGNORED
    logits = logits_at(model, inputs, mask).float()
    total = functional.cross_entropy(logits, inputs.labels[mask], reduction="sum") / count
    value = total.item()
    if not math.isfinite(value):
        each = functional.cross_entropy(logits.detach(), inputs.labels[mask], reduction="none")
        bad = mask.nonzero()[:, 0][~each.isfinite()].unique().tolist()
        raise NotFinite(
            f"the loss is {value} at step {step + 1} (utterances "
            f"{_ids([batch[i] for i in bad] or batch)})",
            remedy="lower the learning rates, or look at these utterances",
        )
    total.backward()
    return value


def _endless_batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    epoch = 0
    while True:
        yield from batches(lengths, batch_size, seed, epoch)
        epoch += 1


def _split(batch: list[Encoded], size: int | None) -> list[list[Encoded]]:
    size = size or len(batch)
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def _parameters(group: dict[str, object]) -> list[nn.Parameter]:
    found = group["params"]
    assert isinstance(found, list)
    return found


def _ids(batch: Sequence[Encoded]) -> str:
    shown = ", ".join(item.example.id for item in batch[:8])
    return shown + (f" and {len(batch) - 8} more" if len(batch) > 8 else "")


def _word_embeddings(
    model: SpeechLLM, examples: Sequence[Example]
) -> tuple[Tensor, dict[str, int]]:
    """The mean embedding of each distinct word `[words, decoder_dim]`, and the words' rows."""
    vocabulary = {w: i for i, w in enumerate(sorted({w for e in examples for w, _, _ in e.words}))}
    tokens = model.tokenizer([f" {word}" for word in vocabulary], add_special_tokens=False)
    table = model.causal_lm.get_input_embeddings().weight.detach()
    means = [
        table[torch.tensor(ids, device=table.device)].float().mean(0)
        if ids
        else table.new_zeros(table.shape[1], dtype=torch.float32)
        for ids in tokens["input_ids"]
    ]
    return torch.stack(means), vocabulary


def _aligned_words(model: SpeechLLM, example: Example, vocabulary: dict[str, int]) -> np.ndarray:
    """Row of the word that covers the middle of each of an utterance's embeddings; -1 for none."""
    assert example.frames is not None
    frames = len(example.frames)
    positions = model.projector.output_length(frames)
    # The last window may reach beyond the audio.
    windows = -(-frames // model.projector.stack) * model.projector.stack
    seconds = example.duration * windows / frames / positions
    middles = (np.arange(positions) + 0.5) * seconds
    covering = np.full(positions, -1, dtype=np.int64)
    for word, start, end in example.words:
        inside = (middles >= start) & (middles < end)
        if not inside.any():
            inside[int(np.abs(middles - (start + end) / 2).argmin())] = True
        covering[inside] = vocabulary[word]
    return covering
