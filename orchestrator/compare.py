"""Two maps of decoders with equally many layers, side by side: text and speech, before and after.

What they agree on per depth, and over all blocks whether the second is the first shifted,
stretched, or another shape. Pure functions on `MapGrid`s (docs: definitions).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from orchestrator.consensus import (
    Floats,
    chance_jaccard,
    jaccard_by_shift,
    mean_rank_correlation,
)
from orchestrator.mapgrid import ANGULAR, MapGrid, map_choices
from workers.errors import InvalidInput

_FLAT = 1e-12
"""Far below what a float32 distance can tell apart."""


@dataclass(frozen=True)
class DepthComparison:
    """What two maps `a` and `b` say of the blocks of one depth."""

    depth: int
    start_a: int
    """Start of a's best block."""
    start_b: int
    jaccard: float
    """Layers the two best blocks have in common, over layers in either of them."""
    jaccard_by_chance: float
    """Its mean for two blocks placed at random."""
    spearman: float | None
    """Rank correlation over starts; None with fewer than three, or where a row is flat."""
    spearman_without_layer_0: float | None
    """The same over the starts that leave layer 0 in place."""
    regret_a: float
    """What a loses by b's block: `d_a(start_b) - d_a(start_a)`, in the criterion's unit."""
    regret_b: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two maps `a` and `b` by one criterion in one pool."""

    a: MapGrid
    b: MapGrid
    depths: tuple[DepthComparison, ...]
    """The depths asked for; the figures below are over all blocks that both maps have."""
    correlation: float | None
    """Pearson over all blocks, each depth centred on its mean first: deeper blocks turn the
    residual stream further in any map, which alone would correlate. None where a map is flat."""
    correlation_without_layer_0: float | None
    mean_difference: float
    """Mean of `b - a`."""
    contrast: float | None
    """Spread of b over spread of a, the spread being the root mean square after centring: above 1,
    b tells the blocks of one depth apart more sharply. None where a is flat."""
    contrast_without_layer_0: float | None

    @property
    def jaccard(self) -> float:
        """Mean Jaccard over `depths`."""
        return float(np.mean([depth.jaccard for depth in self.depths]))

    @property
    def jaccard_by_chance(self) -> float:
        """What it is in the mean for blocks placed at random."""
        return float(np.mean([depth.jaccard_by_chance for depth in self.depths]))

    @property
    def difference(self) -> Floats:
        """`b - a`, `[depth, start]`; NaN where either was not measured."""
        return self.b.distances - self.a.distances


def common_choice(
    first: pd.DataFrame, second: pd.DataFrame, criterion: str | None, pool: str | None
) -> tuple[str, str]:
    """Criterion and pool two tables are compared by: what was asked for, else what suggests itself.

    Of criteria, `angular` where both have it; of pools, `all`; otherwise the only one there is.

    Raises:
        InvalidInput: they have none in common, not the one asked for, or several and none of
            those.
    """
    held = map_choices(second)
    common = [pair for pair in map_choices(first) if pair in held]
    if not common:
        raise InvalidInput(
            "the maps have no criterion and pool in common",
            "compare",
            f"the first has {_listed(map_choices(first))}; the second {_listed(held)}",
        )
    chosen = _choose("criterion", list(dict.fromkeys(c for c, _ in common)), criterion, ANGULAR)
    return chosen, _choose("pool", [p for c, p in common if c == chosen], pool, "all")


def compare(a: MapGrid, b: MapGrid, depths: Sequence[int] = ()) -> Comparison:
    """Compare two maps of equally many layers.

    Args:
        a: one map.
        b: the other, by the same criterion.
        depths: depths to tell about; empty: all that both maps have whole.

    Raises:
        InvalidInput: different numbers of layers or criteria, or a depth that one of them lacks.
    """
    if a.layers != b.layers:
        raise InvalidInput(
            f"the maps are of decoders with {a.layers} and {b.layers} layers",
            "compare",
            "give two maps of one decoder, or of two with equally many layers; how far different "
            "decoders agree on relative depth stands in the report of a sweep with both",
        )
    if a.criterion != b.criterion:
        raise InvalidInput(f"one map is of {a.criterion}, the other of {b.criterion}", "compare")
    whole = [depth for depth in a.depths if b.row(depth) is not None]
    if not whole:
        raise InvalidInput(
            "no depth has all its blocks in both maps", "compare", "measure both at one depth"
        )
    for depth in depths:
        if depth not in whole:
            raise InvalidInput(
                f"depth {depth} is not whole in both maps", "--depth", f"they have {spans(whole)}"
            )
    shown = sorted(set(depths)) or whole
    centred = {first: (_centred(a, whole, first), _centred(b, whole, first)) for first in (0, 1)}
    common = (b.distances - a.distances)[whole]
    return Comparison(
        a=a,
        b=b,
        depths=tuple(_at_depth(a, b, depth) for depth in shown),
        correlation=_correlation(*centred[0]),
        correlation_without_layer_0=_correlation(*centred[1]),
        mean_difference=float(np.nanmean(common)),
        contrast=_contrast(*centred[0]),
        contrast_without_layer_0=_contrast(*centred[1]),
    )


def span(start: int, depth: int) -> str:
    """A block's layers: `5–8`, or `5`."""
    return str(start) if depth == 1 else f"{start}–{start + depth - 1}"


def summary_lines(found: Comparison, names: tuple[str, str]) -> list[str]:
    """Agreement, correlation, difference and contrast in words, a line each."""

    def pair(value: float | None, without: float | None) -> str:
        return f"{_figure(value)} ({_figure(without)} without layer 0)"

    named = spans([depth.depth for depth in found.depths])
    jaccard, chance = _figure(found.jaccard), _figure(found.jaccard_by_chance)
    correlation = pair(found.correlation, found.correlation_without_layer_0)
    contrast = pair(found.contrast, found.contrast_without_layer_0)
    return [
        f"Best blocks at depth {named}: mean Jaccard {jaccard} ({chance} by chance)",
        f"Correlation over blocks, each depth centred: {correlation}",
        f"Mean difference, {names[1]} − {names[0]}: {_signed(found.mean_difference)}",
        f"Contrast, {names[1]} over {names[0]}: {contrast}",
    ]


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _at_depth(a: MapGrid, b: MapGrid, depth: int) -> DepthComparison:
    rows = np.stack([a.distances[depth], b.distances[depth]])[:, : a.layers - depth + 1]
    (start_a, start_b), starts = rows.argmin(axis=1), rows.shape[1]
    left, right = np.array([0]), np.array([1])
    return DepthComparison(
        depth=depth,
        start_a=int(start_a),
        start_b=int(start_b),
        jaccard=float(jaccard_by_shift(starts, depth)[abs(start_a - start_b)]),
        jaccard_by_chance=chance_jaccard(starts, depth),
        spearman=mean_rank_correlation(rows, left, right),
        spearman_without_layer_0=mean_rank_correlation(rows[:, 1:], left, right),
        regret_a=float(rows[0, start_b] - rows[0, start_a]),
        regret_b=float(rows[1, start_a] - rows[1, start_b]),
    )


def _centred(grid: MapGrid, depths: Sequence[int], first: int) -> Floats:
    """All blocks from start `first` on, each depth's mean taken off; `[blocks]`."""
    rows = [grid.distances[d, first : grid.layers - d + 1] for d in depths]
    return np.concatenate([row - row.mean() for row in rows if len(row)] or [np.empty(0)])


def _correlation(a: Floats, b: Floats) -> float | None:
    one, two = _spread(a), _spread(b)
    return None if one is None or two is None else float(np.mean(a * b)) / (one * two)


def _contrast(a: Floats, b: Floats) -> float | None:
    spread = _spread(a)
    return None if spread is None else (_spread(b) or 0.0) / spread


def _spread(centred: Floats) -> float | None:
    """Root mean square; None where all is flat, or no more than rounding left it."""
    value = math.sqrt(float(np.mean(centred**2))) if len(centred) else 0.0
    return value if value > _FLAT else None


def _choose(what: str, common: list[str], asked: str | None, usual: str) -> str:
    if asked is not None:
        if asked not in common:
            raise InvalidInput(
                f"not both maps have the {what} {asked!r}",
                f"--{what}",
                f"both have {', '.join(common)}",
            )
        return asked
    if usual in common:
        return usual
    if len(common) > 1:
        raise InvalidInput(f"the maps have more than one {what}", f"--{what}",
                           f"name one of {', '.join(common)}")  # fmt: skip
    return common[0]


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{criterion} in {pool}" for criterion, pool in pairs)


def spans(depths: Sequence[int]) -> str:
    """`1–4, 6` for 1, 2, 3, 4, 6."""
    found: list[list[int]] = []
    for depth in depths:
        if found and depth == found[-1][-1] + 1:
            found[-1].append(depth)
        else:
            found.append([depth])
    return ", ".join(span(run[0], len(run)) for run in found)
