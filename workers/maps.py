"""Redundancy maps: how far the residual stream turns across every block of layers.

One pass over the data gives all L(L+1)/2 blocks: layer inputs are caught by hooks, the last layer's
output before the final norm, and no language-model head runs. Kept are one value per utterance and
block, which is what errors, bootstrap and near-ties need; which block to remove where maps disagree
is decided elsewhere.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from workers.config import POOLS, Pool
from workers.errors import InvalidInput, NotFinite
from workers.surgery import DecoderParts, decoder_parts, evaluating

FORMAT = 1
_STATE_BYTES = 2 << 30
"""States of one forward pass kept at a time; larger batches are split by rows."""
_CHUNK_BYTES = (4 << 20, 256 << 20)
"""Float64 copies of states worked on at a time: what a CPU's cache holds, and an accelerator."""
_CHUNK_TOKENS = 64
"""The least, however wide the decoder."""


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
        )


@dataclass(frozen=True, eq=False)
class RedundancyMap:
    """Distances of every block, per utterance and token pool."""

    layers: int
    """Layers of the decoder, L."""
    ids: dict[Pool, tuple[str, ...]]
    """Utterances counted in each pool, sorted."""
    utterance_values: dict[Pool, np.ndarray]
    """Float32 `[samples, cells]` per pool, 0 to 1: the mean over the utterance's tokens. Cells are
    ordered as `blocks`, rows as `ids`."""
    _drawn: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def pools(self) -> tuple[Pool, ...]:
        """Pools that have at least one utterance."""
        return tuple(self.utterance_values)

    @cached_property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Start and depth of each cell."""
        return blocks_of(self.layers)

    def distances(self, depth: int, pool: Pool) -> np.ndarray:
        """Float32 `[samples, starts]`: what each utterance says of each block of this depth.

        Raises:
            InvalidInput: there is no such depth or pool.
        """
        if not 1 <= depth <= self.layers:
            raise InvalidInput(
                f"the map has no blocks of depth {depth}",
                "depth",
                f"choose 1 to {self.layers}",
            )
        if pool not in self.utterance_values:
            raise InvalidInput(
                f"the map has no pool {pool!r}", "pool", f"choose among {', '.join(self.pools)}"
            )
        columns = [i for i, (_, n) in enumerate(self.blocks) if n == depth]
        return self.utterance_values[pool][:, columns]

    def table(self) -> pd.DataFrame:
        """One row a cell: pool, start, depth, distance, std_error, samples.

        `distance` is the mean over utterances, `std_error` that mean's standard error (null for a
        single utterance); both are summed in float64.
        """
        starts, depths = zip(*self.blocks, strict=True)
        parts = []
        for pool, values in self.utterance_values.items():
            count = len(values)
            wide = values.astype(np.float64)
            spread = wide.std(axis=0, ddof=1) if count > 1 else np.full(wide.shape[1], np.nan)
            parts.append(
                pd.DataFrame(
                    {
                        "pool": pool,
                        "start": starts,
                        "depth": depths,
                        "distance": wide.mean(axis=0),
                        "std_error": spread / np.sqrt(count),
                        "samples": count,
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def best(self, depth: int, pool: Pool) -> int:
        """Start of the block with the smallest distance; the lowest one where several have it."""
        return int(_means(self.distances(depth, pool)).argmin())

    def stability(
        self, depth: int, pool: Pool, resamples: int = 1000, seed: int = 0
    ) -> dict[int, float]:
        """How often each start is the best one when utterances are drawn again with replacement.

        Returns:
            Fraction of `resamples` for every start, in order; they add up to 1.
        """
        values = self.distances(depth, pool)
        winners = self._resampled(values, resamples, seed).argmin(axis=1)
        counts = np.bincount(winners, minlength=values.shape[1])
        return {start: int(count) / resamples for start, count in enumerate(counts)}

    def near_ties(
        self, depth: int, pool: Pool, resamples: int = 1000, seed: int = 0
    ) -> tuple[int, ...]:
        """Starts that these utterances can't tell from the best one, without the best itself.

        Those whose paired difference to the best block has 0 within its 95 % bootstrap interval
        (percentiles, utterances drawn with replacement).
        """
        values = self.distances(depth, pool).astype(np.float64)
        best = self.best(depth, pool)
        paired = self._resampled(values - values[:, [best]], resamples, seed)
        low, high = np.percentile(paired, [2.5, 97.5], axis=0)
        return tuple(
            start
            for start in range(values.shape[1])
            if start != best and low[start] <= 0 <= high[start]
        )

    def save(self, folder: Path) -> None:
        """Writes `map.parquet` (the table), `values.safetensors` and `map.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.table().to_parquet(folder / "map.parquet", index=False)
        save_file(
            {str(k): v for k, v in self.utterance_values.items()}, folder / "values.safetensors"
        )
        described = {
            "format": FORMAT,
            "layers": self.layers,
            "pools": list(self.pools),
            "ids": {pool: list(ids) for pool, ids in self.ids.items()},
        }
        (folder / "map.json").write_text(json.dumps(described, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "RedundancyMap":
        """Reads what `save` wrote.

        Raises:
            InvalidInput: not such a folder, or damaged.
        """
        try:
            described = json.loads((folder / "map.json").read_text())
            if described["format"] != FORMAT:
                raise InvalidInput(
                    f"the layout {described['format']!r} is not known",
                    str(folder),
                    f"this version reads layout {FORMAT}",
                )
            stored = load_file(folder / "values.safetensors")
            ids = {pool: tuple(described["ids"][pool]) for pool in described["pools"]}
            values = {pool: stored[pool] for pool in described["pools"]}
            layers = int(described["layers"])
        except FileNotFoundError as error:
            raise InvalidInput(
                f"this is no redundancy map: there is no {Path(error.filename or 'file').name}",
                str(folder),
                "name a folder written by a map stage",
            ) from None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InvalidInput(f"the map cannot be read: {error}", str(folder)) from error
        for pool, array in values.items():
            if array.shape != (len(ids[pool]), len(blocks_of(layers))):
                raise InvalidInput(
                    f"pool {pool!r} has values of shape {array.shape} for {len(ids[pool])} "
                    f"utterances and {layers} layers",
                    str(folder),
                )
        return cls(layers, ids, values)

    def _resampled(self, values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
        """Means `[resamples, starts]` over utterances drawn with replacement."""
        samples = len(values)
        if (samples, resamples, seed) not in self._drawn:
            draws = np.random.default_rng(seed).multinomial(
                samples, np.full(samples, 1 / samples), size=resamples
            )
            self._drawn[samples, resamples, seed] = draws / samples
        return self._drawn[samples, resamples, seed] @ values.astype(np.float64)


def blocks_of(layers: int) -> tuple[tuple[int, int], ...]:
    """All blocks (start, depth) of a decoder, by start and then by depth: the cells of a map."""
    return tuple((start, n) for start in range(layers) for n in range(1, layers - start + 1))


def redundancy_map(
    decoder: nn.Module,
    batches: Iterable[MapBatch],
    pools: Sequence[Pool] = POOLS,
    progress: Callable[[float, str], None] | None = None,
    *,
    samples: int | None = None,
) -> RedundancyMap:
    """Measures the distance of every block: arccos of the cosine, over π, between its two ends.

    Cosines are taken in float64 of the states upcast: near 1 float32 can't resolve angles below
    about 3e-4, and the answer would depend on how utterances are batched. (On devices without
    float64: float32.)

    Args:
        decoder: as for `surgery.decoder_parts`: a causal LM, also one wrapped by peft (its adapter
            counts unless it is disabled) or one inside a multimodal model. It runs in evaluation
            mode, and is left as it was.
        batches: read one at a time; memory does not grow with their number.
        pools: measured; pools no batch has are left out of the map.
        progress: called after each batch with the fraction done (0 where the number of utterances
            is not known) and a few words.
        samples: number of utterances that will come.

    Raises:
        NotFinite: a state is NaN, infinite or all zero at a counted token; names layer and sample.
        InvalidInput: nothing to measure, an utterance twice, or a decoder whose layers don't pass
            on one stream `[batch, time, dim]`.
    """
    parts = decoder_parts(decoder)
    count = len(batches) if samples is None and isinstance(batches, Sized) else 0
    rows: dict[Pool, dict[str, np.ndarray]] = {pool: {} for pool in pools}
    seen: set[str] = set()
    for number, batch in enumerate(batches, start=1):
        for part in _split(batch, len(parts.layers)):
            for pool, measured in _measure(parts, part, pools).items():
                rows[pool].update(measured)
        doubled = seen.intersection(batch.ids)
        if doubled or len(set(batch.ids)) != len(batch.ids):
            name = min(doubled) if doubled else max(batch.ids, key=batch.ids.count)
            raise InvalidInput(f"utterance {name!r} comes twice", "data", "make the ids unique")
        seen.update(batch.ids)
        if progress:
            done = len(seen) / samples if samples else number / count if count else 0.0
            progress(min(done, 1.0), f"{len(seen)} utterances")
    # Sorted, so that neither the map's bytes nor its bootstrap depend on how batches were formed.
    ids = {pool: tuple(sorted(found)) for pool, found in rows.items() if found}
    if not ids:
        raise InvalidInput(
            f"no utterance has a token in {', '.join(pools) or 'no pool'}",
            "data",
            "give the map utterances, and pools that they have",
        )
    values = {
        pool: np.stack([rows[pool][name] for name in names]).astype(np.float32)
        for pool, names in ids.items()
    }
    return RedundancyMap(len(parts.layers), ids, values)


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
        stream = hidden[0] if isinstance(hidden, tuple) else hidden
        if not isinstance(stream, Tensor) or stream.ndim != 3:
            raise InvalidInput(
                f"the layers of {type(parts.body).__name__} do not pass on one residual stream",
                "decoder",
                "choose a decoder whose layers read and write [batch, time, dim]",
            )
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


def _split(batch: MapBatch, layers: int) -> Iterator[MapBatch]:
    """Batches whose states fit the bound."""
    rows = len(batch.ids)
    one = batch.inputs_embeds[:1].numel() * batch.inputs_embeds.element_size() * (layers + 1)
    step = max(1, min(rows, _STATE_BYTES // max(one, 1)))
    for start in range(0, rows, step):
        yield batch.rows(start, start + step) if step < rows else batch


def _measure(
    parts: DecoderParts, batch: MapBatch, pools: Sequence[Pool]
) -> dict[Pool, dict[str, np.ndarray]]:
    """Float64 `[cells]` per pool and utterance."""
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
    means = torch.zeros(len(present), len(batch.ids), len(cells), dtype=precision, device=device)
    squares = torch.empty(len(keep), ends, dtype=precision, device=device)
    step = max(_CHUNK_TOKENS, _CHUNK_BYTES[device.type != "cpu"] // (ends * states[0].shape[1] * 8))
    for start in range(0, len(keep), step):
        here = slice(start, start + step)
        chunk = torch.stack([state[here] for state in states], dim=1).to(precision)
        products = chunk @ chunk.mT
        squares[here] = products.diagonal(dim1=1, dim2=2)
        # Scaled last, and by the root of the product: equal states give exactly 1.
        scales = (squares[here][:, upper[0]] * squares[here][:, upper[1]]).sqrt_()
        cosines = products.flatten(1).index_select(1, cells).div_(scales)
        means += weights[:, :, here] @ cosines.clamp_(-1, 1).arccos_().div_(torch.pi)
    _check_states(squares, states, rows, batch)

    found, measured = counts.cpu(), means.double().cpu().numpy()
    return {
        pool: {name: measured[p, row] for row, name in enumerate(batch.ids) if found[p, row] > 0}
        for p, pool in enumerate(present)
    }


def _run(parts: DecoderParts, batch: MapBatch, keep: Tensor) -> list[Tensor]:
    given: dict[str, Any] = {
        "inputs_embeds": batch.inputs_embeds,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
    if "position_ids" in inspect.signature(parts.body.forward).parameters:
        given["position_ids"] = batch.position_ids
    with captured_states(parts, keep) as states, evaluating(parts.body), torch.no_grad():
        try:
            parts.body(**given)
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


def _means(values: np.ndarray) -> np.ndarray:
    means: np.ndarray = values.astype(np.float64).mean(axis=0)
    return means
