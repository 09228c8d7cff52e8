"""The damage map: the loss on target tokens with each block of layers skipped, before any healing.

Exact, and affordable by sharing. What enters layer `s` is the same for every block that starts
there, so it is computed once. A block is closed where its last layer would have been: from there on
its run is one more row in the batch of the next layer, beside all the runs closed before. All
L(L+1)/2 blocks so cost (L³-L)/6 layer passes, about L²/6 forward passes, instead of L²/3 in as many
separate runs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from workers.batches import IGNORED
from workers.errors import InvalidInput, NotFinite
from workers.maps.measure import MapBatch, note_seen, run_body, stream_of
from workers.maps.redundancy import Measure, RedundancyMap, Values, blocks_of
from workers.surgery.decoder_parts import DecoderParts, decoder_parts, evaluating

_CALL_TOKENS = (1024, 65536)
"""Tokens in one call of a layer, on a CPU (what its cache holds) and on an accelerator."""
_RUN_BYTES = 1 << 30
"""States of all open runs on a CPU; an accelerator gives half of what it has free."""
_LOGIT_BYTES = (64 << 20, 1 << 30)
"""Float32 logits at a time."""
_REPLAYED = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far a layer called by itself may be from the same layer in the forward pass, relative to the
size of its output; 5 % in half precision."""


@dataclass(frozen=True, eq=False)
class _Call:
    """One layer as the decoder itself called it."""

    layer: nn.Module
    given: Tensor
    """What entered it, `[batch, time, dim]`."""
    args: tuple[Any, ...]
    """Further positional arguments."""
    kwargs: Mapping[str, Any]
    rest: tuple[Any, ...] | None
    """What it returned beside the stream; None: the stream alone, not in a tuple."""
    by_name: bool
    """Whether the stream came as the keyword `hidden_states`."""

    def run(self, stream: Tensor, times: int) -> Tensor:
        """The layer on `times` copies of the batch, `[times * batch, time, dim]`."""
        batch = len(self.given)
        kwargs = {name: _repeated(value, times, batch) for name, value in self.kwargs.items()}
        if self.by_name:
            output = self.layer(**{**kwargs, "hidden_states": stream})
        else:
            output = self.layer(stream, *_repeated(self.args, times, batch), **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def damage_map(
    decoder: PreTrainedModel | PeftModel,
    batches: Iterable[MapBatch],
    depths: Sequence[int] | None = None,
    progress: Callable[[float, str], None] | None = None,
    *,
    samples: int | None = None,
) -> RedundancyMap:
    """Measures what skipping each block does to the loss on target tokens.

    An utterance's damage is the mean over its target tokens of the cross-entropy without the block,
    minus the same with every layer in place, in nats per token; negative where the loss falls.

    Args:
        decoder: a causal LM, plain or wrapped by peft (its adapter counts unless it is disabled).
        batches: with labels; read one at a time.
        depths: measured; None: all, 1 to L (at L no layer is left).
        progress: called often with the fraction done (0 where the number of utterances is not
            known) and a few words.
        samples: number of utterances that will come.

    Returns:
        A map whose only measure is `damage` in pool `target`.

    Raises:
        NotFinite: a loss is NaN or infinite with every layer in place; names the sample.
        InvalidInput: no labels, a depth the decoder does not have, or layers that can't be called
            one by one.
    """
    parts = decoder_parts(decoder)
    causal_lm = decoder.get_base_model() if isinstance(decoder, PeftModel) else decoder
    layers = len(parts.layers)
    blocks = _blocks(layers, depths)
    cells = {block: i for i, block in enumerate(blocks_of(layers))}
    rows: dict[str, np.ndarray] = {}
    unpruned: dict[str, float] = {}
    seen: set[str] = set()
    for batch in batches:
        note_seen(seen, batch)
        if batch.labels is None or not bool((batch.labels != IGNORED).any(1).all()):
            raise InvalidInput(
                f"an utterance of {', '.join(batch.ids[:3])} … has no target token",
                "data",
                "give every utterance a text to predict",
            )

        def tell(fraction: float, size: int = len(batch.ids)) -> None:
            if progress:
                done = (len(seen) - size * (1 - fraction)) / samples if samples else 0.0
                progress(min(done, 1.0), f"{len(seen) - size} utterances, {len(blocks)} blocks")

        with evaluating(causal_lm), torch.no_grad():
            whole, skipped = _losses(parts, causal_lm, batch, blocks, not rows, tell)
        for row, name in enumerate(batch.ids):
            if not np.isfinite(whole[row]):
                raise NotFinite(
                    f"the loss of the unpruned decoder is {whole[row]} for sample {name!r}",
                    "damage",
                    "check the weights and the sample; half precision can overflow",
                )
            values = np.full(len(cells), np.nan, dtype=np.float32)
            values[[cells[block] for block in blocks]] = skipped[row] - whole[row]
            rows[name], unpruned[name] = values, float(whole[row])
    if not rows:
        raise InvalidInput("there are no utterances to measure damage on", "data")
    names = tuple(sorted(rows))
    measured = Values(names, np.stack([rows[name] for name in names]))
    return RedundancyMap(
        layers,
        {Measure("damage", "target"): measured},
        np.array([unpruned[name] for name in names], dtype=np.float32),
    )


def _blocks(layers: int, depths: Sequence[int] | None) -> list[tuple[int, int]]:
    """The blocks asked for, those that close first at the front."""
    wrong = [depth for depth in depths or () if not 1 <= depth <= layers]
    if wrong or (depths is not None and not depths):
        raise InvalidInput(
            f"there are no blocks of depth {wrong[0] if wrong else '(none given)'}",
            "depths",
            f"choose 1 to {layers}",
        )
    chosen = [block for block in blocks_of(layers) if depths is None or block[1] in depths]
    return sorted(chosen, key=lambda block: (sum(block), block))


def _losses(
    parts: DecoderParts,
    causal_lm: PreTrainedModel,
    batch: MapBatch,
    blocks: Sequence[tuple[int, int]],
    check: bool,
    tell: Callable[[float], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss per utterance with all layers `[batch]`, and without each block `[batch, blocks]`."""
    assert batch.labels is not None
    with _captured_calls(parts) as calls:
        run_body(parts, batch)
    states = [call.given for call in calls]
    device = states[0].device
    calls.pop()  # it held what left the top layer
    if check:
        _check_replay(parts, calls, states[-1], batch)
    places = (batch.labels != IGNORED).to(device)
    head = _Head(parts, causal_lm, calls, batch.labels.to(device), places)
    whole = head.losses(states[-1][None])[0]

    rows, time, dim = states[0].shape
    one = states[0].numel() * states[0].element_size()
    size = max(1, _budget(device) // one)
    per_call = max(1, _CALL_TOKENS[device.type != "cpu"] // (rows * time))
    skipped = np.empty((rows, len(blocks)))
    work = sum(len(calls) - sum(block) for block in blocks) or 1
    done = 0
    # Runs do not depend on one another: where memory holds only some, these go first.
    for first in range(0, len(blocks), size):
        group = blocks[first : first + size]
        runs = torch.empty(len(group), rows, time, dim, dtype=states[0].dtype, device=device)
        closed = 0
        for index in range(len(calls) + 1):
            while closed < len(group) and sum(group[closed]) == index:
                runs[closed] = states[group[closed][0]]
                closed += 1
            if index == len(calls):
                break
            for low in range(0, closed, per_call):
                some = runs[low : min(low + per_call, closed)]
                some.copy_(calls[index].run(some.flatten(0, 1), len(some)).view_as(some))
            done += closed
            tell(done / work)
        skipped[:, first : first + len(group)] = head.losses(runs).T
    return whole, skipped


class _Head:
    """What follows the top layer: the final norm, the head and the loss on labels.

    What a family does to its logits (soft caps, scales) is part of it.
    """

    def __init__(
        self,
        parts: DecoderParts,
        causal_lm: PreTrainedModel,
        calls: Sequence[_Call],
        labels: Tensor,
        places: Tensor,
    ) -> None:
        self.parts, self.causal_lm, self.calls = parts, causal_lm, calls
        self.places, self.labels = places, labels[places]
        self.rows = places.nonzero()[:, 0]
        self.counts = places.sum(1).double()
        vocabulary = causal_lm.get_output_embeddings().weight.shape[0]
        self.step = max(1, _LOGIT_BYTES[labels.device.type != "cpu"] // (4 * vocabulary))

    def losses(self, runs: Tensor) -> np.ndarray:
        """Mean loss per utterance of states `[runs, batch, time, dim]`: float64 `[runs, batch]`."""
        states = runs[:, self.places]
        count, targets, dim = states.shape
        flat, labels = states.reshape(-1, dim), self.labels.repeat(count)
        losses = torch.empty(len(flat), dtype=torch.float64, device=flat.device)
        for start in range(0, len(flat), self.step):
            here = slice(start, start + self.step)
            logits = self._logits(flat[here])
            losses[here] = functional.cross_entropy(logits.float(), labels[here], reduction="none")
        sums = torch.zeros(count, len(self.counts), dtype=torch.float64, device=flat.device)
        sums.index_add_(1, self.rows, losses.view(count, targets))
        result: np.ndarray = (sums / self.counts).cpu().numpy()
        return result

    def _logits(self, states: Tensor) -> Tensor:
        """`[tokens, dim]` to `[tokens, vocabulary]`: the model itself, its layers stood in for."""
        with ExitStack() as undo:
            for call in self.calls:
                top = call is self.calls[-1]
                call.layer.__dict__["forward"] = _StandIn(call, states[:, None] if top else None)
                undo.callback(call.layer.__dict__.pop, "forward")
            output = self.causal_lm(inputs_embeds=states[:, None], use_cache=False)
        logits: Tensor = output.logits[:, 0]
        return logits


class _StandIn:
    """A layer that passes its input on, or gives `result` in its place."""

    def __init__(self, call: _Call, result: Tensor | None) -> None:
        self.call, self.result = call, result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        result = stream if self.result is None else self.result
        return result if self.call.rest is None else (result, *self.call.rest)


@contextmanager
def _captured_calls(parts: DecoderParts) -> Iterator[list[_Call]]:
    """Records how the decoder calls its layers; last, what leaves the top one as one more call."""
    calls: list[_Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        by_name = not args
        stream = stream_of(kwargs.get("hidden_states") if by_name else args[0], parts)
        others = {k: v for k, v in kwargs.items() if k != "hidden_states" or not by_name}
        rest = out[1:] if isinstance(out, tuple) else None
        calls.append(_Call(module, stream, args[1:], others, rest, by_name))
        if module is parts.layers[-1]:
            calls.append(_Call(module, stream_of(out, parts), (), {}, None, False))

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in parts.layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _check_replay(
    parts: DecoderParts, calls: Sequence[_Call], top: Tensor, batch: MapBatch
) -> None:
    """Makes sure that a layer called by itself, on several copies at once, is the layer."""
    real = batch.attention_mask.bool().to(top.device)
    for index, call in enumerate(calls):
        expected = calls[index + 1].given if index + 1 < len(calls) else top
        try:
            answer = call.run(call.given.repeat(2, 1, 1), 2)[len(expected) :]
            gap = (answer.float() - expected.float())[real].abs().max()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a layer needs that it was not given
            raise InvalidInput(
                f"layer {index} of {type(parts.body).__name__} cannot be called by itself: "
                f"{str(error).strip().partition(chr(10))[0]}",
                "decoder",
                "damage cannot be measured on this decoder; the other criteria can",
            ) from error
        size = expected.float()[real].abs().max()
        if not bool(gap <= _REPLAYED.get(expected.dtype, 5e-2) * size):
            raise InvalidInput(
                f"layer {index} of {type(parts.body).__name__} does something else when it is "
                f"called by itself: its output differs by {float(gap):.2g} of {float(size):.2g}",
                "decoder",
                "damage cannot be measured on this decoder; the other criteria can",
            )


def _repeated(value: Any, times: int, batch: int) -> Any:
    """Arguments of a layer for `times` copies of the batch: masks and positions of each row."""
    if isinstance(value, Tensor):
        # One row for all broadcasts as it is; a table of one dimension belongs to no row.
        if value.ndim < 2 or len(value) != batch or (times == 1):
            return value
        return value.repeat(times, *[1] * (value.ndim - 1))
    if isinstance(value, tuple | list):
        return type(value)(_repeated(item, times, batch) for item in value)
    if isinstance(value, dict):
        return {name: _repeated(item, times, batch) for name, item in value.items()}
    return value


def _budget(device: torch.device) -> int:
    """Bytes that the states of open runs may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return _RUN_BYTES
