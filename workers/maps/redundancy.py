"""A redundancy map: what every block of layers is worth by one criterion or several.

Kept is one row of numbers per utterance, which is what errors, bootstrap and near-ties need. How
they are measured is `maps` and `damage`; which block to remove where maps disagree is decided
elsewhere.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from workers.config import Criterion, Pool
from workers.errors import InvalidInput

FORMAT = 2
_UNPRUNED = "unpruned_loss"


class Measure(NamedTuple):
    """What was measured over which tokens."""

    criterion: Criterion
    pool: Pool

    def __str__(self) -> str:
        return f"{self.criterion}/{self.pool}"


@dataclass(frozen=True, eq=False)
class Values:
    """One measure, per utterance."""

    ids: tuple[str, ...]
    """Utterances counted, sorted."""
    rows: np.ndarray
    """Float32 `[samples, columns]`, rows as `ids`. `angular`, `influence`, `damage`: a column a
    block, ordered as `blocks_of`, NaN where a block was not measured. `cka`: a column for every
    pair of ends, ordered as `pairs_of`: the utterance's HSIC of the two states."""


@dataclass(frozen=True, eq=False)
class RedundancyMap:
    """Distances of every block, by criterion and token pool. In each, small means redundant."""

    layers: int
    """Layers of the decoder, L."""
    measures: Mapping[Measure, Values]
    unpruned_loss: np.ndarray | None = None
    """Float32 `[samples]` beside `damage`: each utterance's loss with every layer in place, in nats
    per target token."""
    _drawn: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict, repr=False)
    _quotients: dict[tuple[Measure, int, int], np.ndarray] = field(default_factory=dict, repr=False)
    """CKA of resamples `[resamples, cells]`: all depths at once, as they share the pairs."""

    @property
    def pools(self) -> tuple[Pool, ...]:
        """Pools that have at least one utterance."""
        return tuple(dict.fromkeys(measure.pool for measure in self.measures))

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        """Criteria that were measured."""
        return tuple(dict.fromkeys(measure.criterion for measure in self.measures))

    @cached_property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Start and depth of each cell."""
        return blocks_of(self.layers)

    def distances(self, depth: int, pool: Pool, criterion: Criterion = "angular") -> np.ndarray:
        """Float64 `[starts]`: the mean over utterances for each block of this depth.

        Raises:
            InvalidInput: there is no such depth, pool or criterion.
        """
        rows, columns = self._row(depth, pool, criterion)
        whole: np.ndarray = _estimate(criterion, rows.mean(axis=0), self.layers)[columns]
        return whole

    def table(self) -> pd.DataFrame:
        """One row a cell: criterion, pool, start, depth, distance, std_error, samples.

        `distance` is the mean over utterances, summed in float64; for `cka` it is one minus the
        quotient of mean HSICs (Nguyen et al. 2021, arXiv 2010.15327, eq. 2). `std_error` is its
        jackknife standard error (for a mean: the usual one), null for a single utterance.
        """
        starts, depths = (np.array(column) for column in zip(*self.blocks, strict=True))
        parts = []
        for measure, values in self.measures.items():
            rows = values.rows.astype(np.float64)
            count = len(rows)
            distance = _estimate(measure.criterion, rows.mean(axis=0), self.layers)
            error = np.full(len(distance), np.nan)
            if count > 1:
                without = (rows.sum(axis=0) - rows) / (count - 1)
                left = _estimate(measure.criterion, without, self.layers)
                error = np.sqrt((count - 1) / count * ((left - left.mean(axis=0)) ** 2).sum(axis=0))
            measured = ~np.isnan(distance)
            parts.append(
                pd.DataFrame(
                    {
                        "criterion": measure.criterion,
                        "pool": measure.pool,
                        "start": starts[measured],
                        "depth": depths[measured],
                        "distance": distance[measured],
                        "std_error": error[measured],
                        "samples": count,
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def best(self, depth: int, pool: Pool, criterion: Criterion = "angular") -> int:
        """Start of the block with the smallest distance; the lowest one where several have it."""
        return int(self.distances(depth, pool, criterion).argmin())

    def stability(
        self,
        depth: int,
        pool: Pool,
        criterion: Criterion = "angular",
        *,
        resamples: int = 1000,
        seed: int = 0,
    ) -> dict[int, float]:
        """How often each start is the best one when utterances are drawn again with replacement.

        Returns:
            Fraction of `resamples` for every start, in order; they add up to 1.
        """
        drawn = self._resampled(depth, pool, criterion, resamples, seed)
        counts = np.bincount(drawn.argmin(axis=1), minlength=drawn.shape[1])
        return {start: int(count) / resamples for start, count in enumerate(counts)}

    def near_ties(
        self,
        depth: int,
        pool: Pool,
        criterion: Criterion = "angular",
        *,
        resamples: int = 1000,
        seed: int = 0,
    ) -> tuple[int, ...]:
        """Starts that these utterances can't tell from the best one, without the best itself.

        Those whose paired difference to the best block has 0 within its 95 % bootstrap interval
        (percentiles, utterances drawn with replacement).
        """
        best = self.best(depth, pool, criterion)
        drawn = self._resampled(depth, pool, criterion, resamples, seed)
        low, high = np.percentile(drawn - drawn[:, [best]], [2.5, 97.5], axis=0)
        return tuple(
            start
            for start in range(drawn.shape[1])
            if start != best and low[start] <= 0 <= high[start]
        )

    def joined(self, other: "RedundancyMap") -> "RedundancyMap":
        """Both maps' measures as one map of the same decoder."""
        assert self.layers == other.layers
        loss = self.unpruned_loss if other.unpruned_loss is None else other.unpruned_loss
        return RedundancyMap(self.layers, {**self.measures, **other.measures}, loss)

    def save(self, folder: Path, stem: str = "map", about: Mapping[str, Any] | None = None) -> None:
        """Writes `<stem>.parquet` (the table), `<stem>.safetensors` and `<stem>.json`.

        Args:
            folder: made if it isn't there; what it lies in must be.
            stem: name of the files.
            about: plain data for people, kept in the JSON file.
        """
        folder.mkdir(exist_ok=True)
        self.table().to_parquet(folder / f"{stem}.parquet", index=False)
        arrays = {str(measure): values.rows for measure, values in self.measures.items()}
        if self.unpruned_loss is not None:
            arrays[_UNPRUNED] = self.unpruned_loss
        save_file(arrays, folder / f"{stem}.safetensors")
        described = {
            "format": FORMAT,
            "layers": self.layers,
            "measures": [
                {"criterion": m.criterion, "pool": m.pool, "ids": list(v.ids)}
                for m, v in self.measures.items()
            ],
            **({"about": dict(about)} if about else {}),
        }
        text = json.dumps(described, ensure_ascii=False) + "\n"
        (folder / f"{stem}.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, stem: str = "map") -> "RedundancyMap":
        """Reads what `save` wrote.

        Raises:
            InvalidInput: not such a folder, or damaged.
        """
        where = str(folder)
        try:
            described = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
            if described["format"] != FORMAT:
                raise InvalidInput(
                    f"the layout {described['format']!r} is not known",
                    where,
                    f"this version reads layout {FORMAT}",
                )
            stored = load_file(folder / f"{stem}.safetensors")
            layers = int(described["layers"])
            measures = {}
            for entry in described["measures"]:
                measure = Measure(entry["criterion"], entry["pool"])
                measures[measure] = Values(tuple(entry["ids"]), stored[str(measure)])
        except FileNotFoundError as error:
            raise InvalidInput(
                f"this is no redundancy map: there is no {Path(error.filename or 'file').name}",
                where,
                "name a folder written by a map stage",
            ) from None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InvalidInput(f"the map cannot be read: {error}", where) from error
        for measure, values in measures.items():
            width = len(pairs_of(layers) if measure.criterion == "cka" else blocks_of(layers))
            if values.rows.shape != (len(values.ids), width):
                raise InvalidInput(
                    f"{measure} has values of shape {values.rows.shape} for {len(values.ids)} "
                    f"utterances and {layers} layers",
                    where,
                )
        return cls(layers, measures, stored.get(_UNPRUNED))

    def _row(self, depth: int, pool: Pool, criterion: Criterion) -> tuple[np.ndarray, list[int]]:
        """A measure's values in float64, and the cells of one depth."""
        if not 1 <= depth <= self.layers:
            raise InvalidInput(
                f"the map has no blocks of depth {depth}", "depth", f"choose 1 to {self.layers}"
            )
        for name, asked, known in (
            ("criterion", criterion, self.criteria),
            ("pool", pool, [m.pool for m in self.measures if m.criterion == criterion]),
        ):
            if asked not in known:
                raise InvalidInput(
                    f"the map has no {name} {asked!r}", name, f"choose among {', '.join(known)}"
                )
        rows = self.measures[Measure(criterion, pool)].rows.astype(np.float64)
        columns = [i for i, (_, n) in enumerate(self.blocks) if n == depth]
        if criterion == "damage" and np.isnan(rows[:, columns]).any():
            raise InvalidInput(
                f"the damage of blocks of depth {depth} was not measured", "depth", "measure it too"
            )
        return rows, columns

    def _resampled(
        self, depth: int, pool: Pool, criterion: Criterion, resamples: int, seed: int
    ) -> np.ndarray:
        """Distances `[resamples, starts]` over utterances drawn with replacement."""
        rows, columns = self._row(depth, pool, criterion)
        samples = len(rows)
        if (samples, resamples, seed) not in self._drawn:
            draws = np.random.default_rng(seed).multinomial(
                samples, np.full(samples, 1 / samples), size=resamples
            )
            self._drawn[samples, resamples, seed] = draws / samples
        draws = self._drawn[samples, resamples, seed]
        if criterion == "cka":
            key = (Measure(criterion, pool), resamples, seed)
            if key not in self._quotients:
                self._quotients[key] = _estimate(criterion, draws @ rows, self.layers)
            return self._quotients[key][:, columns]
        return draws @ rows[:, columns]


def blocks_of(layers: int) -> tuple[tuple[int, int], ...]:
    """All blocks (start, depth) of a decoder, by start and then by depth: the cells of a map."""
    return tuple((start, n) for start in range(layers) for n in range(1, layers - start + 1))


def pairs_of(layers: int) -> tuple[tuple[int, int], ...]:
    """All pairs of states (l, m), l ≤ m, of the L+1 a decoder has: the columns behind `cka`."""
    return tuple(
        (first, second) for first in range(layers + 1) for second in range(first, layers + 1)
    )


def _estimate(criterion: Criterion, means: np.ndarray, layers: int) -> np.ndarray:
    """Distances `[…, cells]` from means over utterances `[…, columns]`."""
    if criterion != "cka":
        return means
    ends = layers + 1
    first, second = np.triu_indices(ends)
    square = np.empty((*means.shape[:-1], ends, ends))
    square[..., first, second] = means
    own = np.sqrt(np.clip(square[..., range(ends), range(ends)], 0.0, None))
    first, second = np.triu_indices(ends, k=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        similarity = square[..., first, second] / (own[..., first] * own[..., second])
    distance: np.ndarray = 1.0 - similarity
    return distance
