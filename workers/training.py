"""Training the projector and the adapter: adapting a base, healing a pruned decoder.

The effective batch never depends on how it is split into micro-batches: the loss is the mean over
all target tokens of the whole batch. Logits are computed at target positions alone.
"""

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

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
)
from workers.checkpoints import Checkpoints, place_of
from workers.config import TrainSettings
from workers.errors import InvalidInput, NotFinite, Stopped
from workers.lora import fused_lora
from workers.ranks import ALONE, Ranks
from workers.recompute import recomputed
from workers.relief import NO_RELIEF, Relief
from workers.speechllm import Part, SpeechLLM

Progress = Callable[[int, int, float], None]
"""Called with steps done, steps in all, and the last step's loss."""


RANK_SEED = 1_000_003
"""Between the seeds of two ranks' dropout."""


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
    checkpoints: Checkpoints | None = None,
    relief: Relief = NO_RELIEF,
    ranks: Ranks = ALONE,
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
        progress: called every `log_every` steps, after the last, and where it goes on from a checkpoint.
        log_every: steps between calls.
        checkpoints: kept as it goes. Where there is one of this run on this device, it goes on from
            there, and ends with the weights, bit for bit, of a run that was never interrupted.
        relief: how to need less memory than the settings ask for.
        ranks: this process among those that train together; each takes its share of every batch.

    Raises:
        InvalidInput: no examples, nothing to train, or examples that cannot be encoded.
        NotFinite: the loss or the gradient became NaN or infinite; names step and utterances.
        Stopped: `checkpoints` was asked to stop, and holds what was done.
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
    order = endless_batches([item.length for item in encoded], settings.batch_size, seed)
    run = _Run(model.device, parameters, optimizer, ranks)
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        learning(model, parameters),
        fused_lora(model.decoder),
        recomputed(model.causal_lm, relief.activation_checkpointing),
    ):
        torch.manual_seed(seed + RANK_SEED * ranks.rank)
        ranks.agree(parameters)
        if checkpoints is not None:
            run.resume(checkpoints)
        if progress and run.step:
            progress(run.step, settings.steps, run.losses[-1])
        order = itertools.islice(order, run.step, None)
        micro_batch = settings.micro_batch or -(-settings.batch_size // ranks.size)
        kept = time.monotonic()
        for step in range(run.step, settings.steps):
            factor = learning_rate_factor(settings, step)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            batch = [encoded[i] for i in next(order)]
            count = sum(int(np.count_nonzero(item.next_ids != IGNORED)) for item in batch)
            loss = 0.0
            for micro in _split(ranks.share(batch), relief.size(micro_batch)):
                loss += _backward(model, micro, count, step)
            due = checkpoints is not None and time.monotonic() - kept >= checkpoints.seconds
            stop = checkpoints is not None and checkpoints.asked_to_stop()
            # Ranks act as one: a checkpoint is due as soon as one of them says so.
            loss, dues, stops = ranks.add_up(parameters, [loss, due, stop])
            norm = float(nn.utils.clip_grad_norm_(parameters, settings.clip, foreach=True))
            if not math.isfinite(norm):
                raise NotFinite(
                    f"the gradient is {norm} at step {step + 1} (utterances {_ids(batch)})",
                    remedy="lower the learning rates, or look at these utterances",
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.losses.append(loss)
            run.norms.append(norm)
            run.tokens += count
            run.positions += sum(item.length for item in batch)
            done = step + 1
            if checkpoints is not None and (dues or stops) and done < settings.steps:
                run.keep(checkpoints)
                kept = time.monotonic()
                if stops:
                    raise Stopped(f"stopped after step {done} of {settings.steps}")
            if progress and (done % log_every == 0 or done == settings.steps):
                progress(done, settings.steps, loss)
    seconds = time.monotonic() - began
    return TrainReport(run.losses, run.norms, seconds, run.tokens, run.positions)


def resumable(model: SpeechLLM, checkpoints: Checkpoints | None, ranks: Ranks = ALONE) -> bool:
    """Whether `train` would go on from a checkpoint, and not begin anew."""
    place = _place(model.device, ranks)
    return checkpoints is not None and checkpoints.newest(**place) is not None


def _place(device: torch.device, ranks: Ranks) -> dict[str, object]:
    return {**place_of(device), "ranks": ranks.size}


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


@dataclass
class _Run:
    """What a training run has come to: all that its next step depends on, apart from its input."""

    device: torch.device
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tokens: int = 0
    positions: int = 0

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    def keep(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint."""
        tensors = {f"parameter.{i}": p.data for i, p in enumerate(self.parameters)}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        for rank, state in enumerate(self.ranks.gather(torch.get_rng_state())):
            tensors[f"random.{rank}"] = state
        if self.device.type == "cuda":
            for rank, state in enumerate(self.ranks.gather(torch.cuda.get_rng_state(self.device))):
                tensors[f"random.cuda.{rank}"] = state
        if self.ranks.rank:
            return  # the parameters are the same everywhere
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["norms"] = torch.tensor(self.norms, dtype=torch.float64)
        counts = {"tokens": self.tokens, "positions": self.positions}
        checkpoints.write(self.step, tensors, {**counts, **_place(self.device, self.ranks)})

    def resume(self, checkpoints: Checkpoints) -> None:
        """Go on from the newest checkpoint of this device, if there is one."""
        saved = checkpoints.newest(**_place(self.device, self.ranks))
        if saved is None:
            return
        tensors = saved.tensors
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"parameter.{i}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            if part == "optimizer":
                number, _, what = rest.partition(".")
                state.setdefault(int(number), {})[what] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        torch.set_rng_state(tensors[f"random.{self.ranks.rank}"])
        if self.device.type == "cuda":
            cuda = tensors[f"random.cuda.{self.ranks.rank}"]
            torch.cuda.set_rng_state(cuda, self.device)
        self.losses, self.norms = tensors["losses"].tolist(), tensors["norms"].tolist()
        self.tokens, self.positions = saved.record["tokens"], saved.record["positions"]


class learning:  # noqa: N801
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


def endless_batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """`batches`, epoch after epoch."""
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
