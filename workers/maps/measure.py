"""Measuring redundancy maps: how the residual stream differs between the two ends of every block.

One pass over the data gives all L(L+1)/2 blocks by every criterion: layer inputs are caught by
hooks, the last layer's output before the final norm, and no language-model head runs. What comes
out is a `redundancy.RedundancyMap`; what a block is worth when it is really skipped is `damage`.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workers.config import CHEAP_CRITERIA, POOLS, Criterion, Pool
from workers.errors import InvalidInput, NotFinite
from workers.maps.redundancy import Measure, RedundancyMap, Values, pairs_of
from workers.surgery.decoder_parts import DecoderParts, decoder_parts, evaluating

_STATE_BYTES = 2 << 30
"""States of one forward pass kept at a time; larger batches are split by rows."""
_CHUNK_BYTES = (4 << 20, 256 << 20)
"""Float64 copies of states worked on at a time: what a CPU's cache holds, and an accelerator."""
_CHUNK_TOKENS = 64
"""The least, however wide the decoder."""
CKA_TOKENS = 4
"""The fewest tokens of a pool that an utterance needs for its (unbiased) HSIC."""


@dataclass(frozen=True, eq=False)
class MapBatch:
    """Utterances a map is measured on, padded on either side."""

    ids: list[str]
    """Names of the utterances, each once in a map."""
    inputs_embeds: Tensor
    """`[batch, time, dim]`, in the decoder's dtype."""
    attention_mask: Tensor
    """`[batch, time]`, 1 at real positions."""
    pools: dict[Pool, Tensor]
    """Boolean `[batch, time]`: the tokens of each pool. Padding never counts. An utterance without
    a token in a pool is not counted there."""
    labels: Tensor | None = None
    """`[batch, time]`: the token each position should predict, `batches.IGNORED` where none; only
    `damage` needs them."""

    @property
    def position_ids(self) -> Tensor:
        """`[batch, time]`, counted from each row's first real position."""
        return (self.attention_mask.long().cumsum(1) - 1).clamp(min=0)

    def rows(self, start: int, stop: int) -> "MapBatch":
        """Some of the utterances."""
        return MapBatch(
            self.ids[start:stop],
            self.inputs_embeds[start:stop],
            self.attention_mask[start:stop],
            {pool: mask[start:stop] for pool, mask in self.pools.items()},
            None if self.labels is None else self.labels[start:stop],
        )


def redundancy_map(
    decoder: nn.Module,
    batches: Iterable[MapBatch],
    pools: Sequence[Pool] = POOLS,
    progress: Callable[[float, str], None] | None = None,
    *,
    samples: int | None = None,
    criteria: Sequence[Criterion] = ("angular",),
) -> RedundancyMap:
    """Measures every block by the criteria asked for, all from the same states.

    With `x^l` the state entering layer `l` and the cosine between `x^start` and `x^(start+depth)` at
    a token: `angular` is its arccos over π, `influence` one minus it (ShortGPT, arXiv 2403.03853,
    eq. 1); both are means over an utterance's tokens. `cka` keeps each utterance's unbiased HSIC of
    the two states under linear kernels (Song et al. 2012; Nguyen et al. 2021, arXiv 2010.15327,
    eq. 3), centred within the utterance; `RedundancyMap` makes linear CKA of their means.

    Computed in float64 of the states upcast: near 1 float32 can't resolve angles below about 3e-4,
    and the answer would depend on how utterances are batched. (On devices without float64: float32.)

    Args:
        decoder: as for `surgery.decoder_parts`: a causal LM, also one wrapped by peft (its adapter
            counts unless it is disabled) or one inside a multimodal model. It runs in evaluation
            mode, and is left as it was.
        batches: read one at a time; memory does not grow with their number.
        pools: measured; pools no batch has are left out of the map.
        progress: called after each batch with the fraction done (0 where the number of utterances
            is not known) and a few words.
        samples: number of utterances that will come.
        criteria: `angular`, `influence`, `cka`. For `cka`, utterances with fewer than four tokens
            in a pool are not counted, so that pool `last` has none.

    Raises:
        NotFinite: a state is NaN, infinite or all zero at a counted token; names layer and sample.
        InvalidInput: nothing to measure, an utterance twice, or a decoder whose layers don't pass
            on one stream `[batch, time, dim]`.
    """
    unknown = set(criteria) - set(CHEAP_CRITERIA)
    if unknown or not criteria:
        raise InvalidInput(
            f"{min(unknown) if unknown else 'nothing'} cannot be measured from states alone",
            "criteria",
            f"choose among {', '.join(CHEAP_CRITERIA)}",
        )
    parts = decoder_parts(decoder)
    count = len(batches) if samples is None and isinstance(batches, Sized) else 0
    rows: dict[Measure, dict[str, np.ndarray]] = {
        Measure(criterion, pool): {} for criterion in criteria for pool in pools
    }
    seen: set[str] = set()
    for number, batch in enumerate(batches, start=1):
        for part in _split(batch, len(parts.layers)):
            for measure, measured in _measure(parts, part, pools, criteria).items():
                rows[measure].update(measured)
        note_seen(seen, batch)
        if progress:
            done = len(seen) / samples if samples else number / count if count else 0.0
            progress(min(done, 1.0), f"{len(seen)} utterances")
    # Sorted, so that neither the map's bytes nor its bootstrap depend on how batches were formed.
    measures = {
        measure: Values(tuple(sorted(found)), np.stack([found[name] for name in sorted(found)]))
        for measure, found in rows.items()
        if found
    }
    if not measures:
        few = f"{CKA_TOKENS} tokens" if set(criteria) == {"cka"} else "a token"
        raise InvalidInput(
            f"no utterance has {few} in {', '.join(pools) or 'no pool'}",
            "data",
            "give the map utterances, and pools that they have",
        )
    _check_cka(measures, len(parts.layers))
    return RedundancyMap(len(parts.layers), measures)


def note_seen(seen: set[str], batch: MapBatch) -> None:
    """Adds a batch's utterances to those seen.

    Raises:
        InvalidInput: one comes twice.
    """
    doubled = seen.intersection(batch.ids)
    if doubled or len(set(batch.ids)) != len(batch.ids):
        name = min(doubled) if doubled else max(batch.ids, key=batch.ids.count)
        raise InvalidInput(f"utterance {name!r} comes twice", "data", "make the ids unique")
    seen.update(batch.ids)


@contextmanager
def captured_states(parts: DecoderParts, keep: Tensor) -> Iterator[list[Tensor]]:
    """Catches the residual stream in every forward pass of `parts.body` inside the block.

    Args:
        parts: the decoder.
        keep: int64 `[tokens]`, positions to keep in the flattened `[batch * time]`.

    Yields:
        A list that fills up to L+1 states `[tokens, dim]`, in the decoder's dtype: what enters each
        layer, and last what leaves the top layer, before the final norm.
    """
    states: list[Tensor] = []

    def take(hidden: Any) -> None:
        stream = stream_of(hidden, parts)
        states.append(stream.detach().flatten(0, 1).index_select(0, keep.to(stream.device)))

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        take(args[0] if args else kwargs.get("hidden_states"))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        take(output)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in parts.layers]
    handles.append(parts.layers[-1].register_forward_hook(after))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def stream_of(hidden: Any, parts: DecoderParts) -> Tensor:
    """The residual stream `[batch, time, dim]` in what a layer was given or gave.

    Raises:
        InvalidInput: there is none.
    """
    stream = hidden[0] if isinstance(hidden, tuple) else hidden
    if not isinstance(stream, Tensor) or stream.ndim != 3:
        raise InvalidInput(
            f"the layers of {type(parts.body).__name__} do not pass on one residual stream",
            "decoder",
            "choose a decoder whose layers read and write [batch, time, dim]",
        )
    return stream


def _split(batch: MapBatch, layers: int) -> Iterator[MapBatch]:
    """Batches whose states fit the bound."""
    rows = len(batch.ids)
    one = batch.inputs_embeds[:1].numel() * batch.inputs_embeds.element_size() * (layers + 1)
    step = max(1, min(rows, _STATE_BYTES // max(one, 1)))
    for start in range(0, rows, step):
        yield batch.rows(start, start + step) if step < rows else batch


def _measure(
    parts: DecoderParts, batch: MapBatch, pools: Sequence[Pool], criteria: Sequence[Criterion]
) -> dict[Measure, dict[str, np.ndarray]]:
    """Float32 `[columns]` per measure and utterance."""
    device = batch.inputs_embeds.device
    real = batch.attention_mask.bool()
    present = [pool for pool in pools if pool in batch.pools]
    if not present:
        return {}
    masks = torch.stack([batch.pools[pool].to(device).bool() & real for pool in present])
    keep = masks.any(0).flatten().nonzero().flatten()
    if not len(keep):
        return {}
    states = _run(parts, batch, keep)
    rows = keep // real.shape[1]
    precision = torch.float32 if device.type == "mps" else torch.float64

    # One weight per pool, utterance and token: means over tokens become one matrix product.
    counts = masks.sum(2)
    weights = torch.zeros(len(present), len(batch.ids), len(keep), dtype=precision, device=device)
    weights[:, rows, torch.arange(len(keep), device=device)] = masks.flatten(1)[:, keep].to(
        precision
    )
    weights /= counts.clamp(min=1).unsqueeze(2)

    ends = len(states)
    upper = torch.triu_indices(ends, ends, offset=1, device=device)
    cells = upper[0] * ends + upper[1]
    of_cosines = [criterion for criterion in criteria if criterion != "cka"]
    means = torch.zeros(
        len(of_cosines), len(present), len(batch.ids), len(cells), dtype=precision, device=device
    )
    squares = torch.empty(len(keep), ends, dtype=precision, device=device)
    step = max(_CHUNK_TOKENS, _CHUNK_BYTES[device.type != "cpu"] // (ends * states[0].shape[1] * 8))
    for start in range(0, len(keep), step):
        here = slice(start, start + step)
        chunk = torch.stack([state[here] for state in states], dim=1).to(precision)
        if not of_cosines:
            squares[here] = chunk.square().sum(2)
            continue
        products = chunk @ chunk.mT
        squares[here] = products.diagonal(dim1=1, dim2=2)
        # Scaled last, and by the root of the product: equal states give exactly 1.
        scales = (squares[here][:, upper[0]] * squares[here][:, upper[1]]).sqrt_()
        cosines = products.flatten(1).index_select(1, cells).div_(scales).clamp_(-1, 1)
        for i, criterion in enumerate(of_cosines):
            away = cosines.arccos().div_(torch.pi) if criterion == "angular" else 1 - cosines
            means[i] += weights[:, :, here] @ away
    _check_states(squares, states, rows, batch)

    found = counts.cpu()
    measured: dict[Measure, dict[str, np.ndarray]] = {}
    for i, criterion in enumerate(of_cosines):
        values = means[i].float().cpu().numpy()
        for p, pool in enumerate(present):
            measured[Measure(criterion, pool)] = {
                name: values[p, row] for row, name in enumerate(batch.ids) if found[p, row] > 0
            }
    if "cka" in criteria:
        for p, pool in enumerate(present):
            inside = masks[p].flatten()[keep]
            measured[Measure("cka", pool)] = {
                name: _hsic([state[inside & (rows == row)] for state in states], precision)
                for row, name in enumerate(batch.ids)
                if found[p, row] >= CKA_TOKENS
            }
    return measured


def _hsic(states: Sequence[Tensor], precision: torch.dtype) -> np.ndarray:
    """Unbiased HSIC of every pair of states `[tokens, dim]`, linear kernels: float32 `[pairs]`.

    Song et al. 2012, eq. 4: with `K`, `L` the Gram matrices without their diagonals and `n` tokens,
    `(tr KL + (1'K1)(1'L1) / ((n-1)(n-2)) - 2 (1'KL1) / (n-2)) / (n (n-3))`.
    """
    stacked = torch.stack(list(states)).to(precision)
    ends, tokens, _ = stacked.shape
    traces = torch.zeros(ends, ends, dtype=precision, device=stacked.device)
    sums = torch.empty(ends, tokens, dtype=precision, device=stacked.device)
    # A few rows of all the Gram matrices at a time: whole ones would grow with tokens squared.
    step = max(1, _CHUNK_BYTES[stacked.device.type != "cpu"] // (ends * tokens * 8))
    for start in range(0, tokens, step):
        grams = stacked[:, start : start + step] @ stacked.mT
        grams.diagonal(offset=start, dim1=1, dim2=2).zero_()
        sums[:, start : start + step] = grams.sum(2)
        flat = grams.flatten(1)
        traces += flat @ flat.T
    total = sums.sum(1)
    hsic = (
        traces
        + torch.outer(total, total) / ((tokens - 1) * (tokens - 2))
        - 2 / (tokens - 2) * (sums @ sums.T)
    ) / (tokens * (tokens - 3))
    first, second = torch.triu_indices(ends, ends)
    pairs: np.ndarray = hsic[first, second].float().cpu().numpy()
    return pairs


def run_body(parts: DecoderParts, batch: MapBatch) -> None:
    """One forward pass of the layers, from embeddings to the final norm; hooks take what they want."""
    given: dict[str, Any] = {
        "inputs_embeds": batch.inputs_embeds,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
    if "position_ids" in inspect.signature(parts.body.forward).parameters:
        given["position_ids"] = batch.position_ids
    with evaluating(parts.body), torch.no_grad():
        parts.body(**given)


def _run(parts: DecoderParts, batch: MapBatch, keep: Tensor) -> list[Tensor]:
    with captured_states(parts, keep) as states:
        try:
            run_body(parts, batch)
        except Exception as error:
            # The class stays what it is: out of memory is handled differently from bad input.
            layer = (
                f"layer {min(len(states), len(parts.layers)) - 1}" if states else "the embeddings"
            )
            error.add_note(f"in {layer} on sample {batch.ids[0]!r} and {len(batch.ids) - 1} more")
            raise
    return states


def _check_states(squares: Tensor, states: Sequence[Tensor], rows: Tensor, batch: MapBatch) -> None:
    """Refuses states that have no direction; `squares` are their squared lengths."""
    good = squares.isfinite() & (squares > 0)
    if bool(good.all()):
        return
    state = int((~good).any(0).nonzero()[0])
    token = int((~good[:, state]).nonzero()[0])
    value = states[state][token]
    fault = "all zero" if bool(value.isfinite().all()) else "not finite (NaN or infinite)"
    place = f"the output of layer {state - 1}" if state else "the embedding entering layer 0"
    raise NotFinite(
        f"{place} is {fault} for sample {batch.ids[int(rows[token])]!r}",
        f"layer {max(state - 1, 0)}",
        "check the weights and the sample; half precision can overflow: try float32 or bfloat16",
    )


def _check_cka(measures: dict[Measure, Values], layers: int) -> None:
    """Refuses a CKA that divides by nothing: states that do not vary within any utterance."""
    own = [i for i, (first, second) in enumerate(pairs_of(layers)) if first == second]
    for measure, values in measures.items():
        if measure.criterion != "cka":
            continue
        flat = np.flatnonzero(values.rows[:, own].mean(axis=0) <= 0)
        if len(flat):
            raise NotFinite(
                f"in pool {measure.pool} the state entering layer {flat[0]} is the same at every "
                "token, so that CKA is not defined",
                f"layer {flat[0]}",
                "leave cka out, or choose other pools",
            )
