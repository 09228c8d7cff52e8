"""From scores and consensus to a decision: what to remove, at what cost, how sure that is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from orchestrator.consensus import ModelMaps, block_regret, chance_jaccard
from orchestrator.report.scores import (
    HIGHER_IS_BETTER,
    Change,
    changes,
    metric_name,
    of_selector,
    records,
    selectors,
)


@dataclass(frozen=True)
class Recommendation:
    """The block for one depth of one model, and its cost. `None` and NaN: not known."""

    model: str
    layers: int
    depth: int
    starts: tuple[int, ...]
    """First removed layer; several where conditions were given different blocks."""
    selector: str
    heal: str
    changes: tuple[Change, ...]
    within: bool
    """Every in-domain mean loss is within the tolerance."""
    established: bool
    """So is the upper end of each loss's interval."""
    missing: int
    """In-domain units expected but not scored on both sides."""
    regret_max: float
    regret_mean: float
    jaccard: float
    chance: float
    p_value: float
    coverage: float

    @property
    def fraction(self) -> float:
        """Fraction of the decoder's layers removed."""
        return self.depth / self.layers

    @property
    def block(self) -> str:
        """`layers 5–8`, or how many where the block differs between conditions."""
        if len(self.starts) != 1:
            return f"{self.depth} layers (each condition its own block)"
        return layers_text(self.starts[0], self.depth)

    @property
    def in_domain(self) -> tuple[Change, ...]:
        """Changes on in-domain test sets."""
        return tuple(change for change in self.changes if change.in_domain)


def layers_text(start: int, depth: int) -> str:
    """`layers 5–8` (or `layer 5`)."""
    return f"layer {start}" if depth == 1 else f"layers {start}–{start + depth - 1}"


def percent(fraction: float) -> str:
    """`33 %`, the space unbreakable."""
    return f"{100 * fraction:.0f}\u00a0%"


def points(tolerance: float) -> str:
    """`1 point`, `0.5 points`."""
    return f"{tolerance:g} point{'s' if tolerance != 1 else ''}"


def recommendations(
    cells: pd.DataFrame,
    consensus: pd.DataFrame,
    maps: Mapping[str, ModelMaps],
    tolerance: float,
) -> list[Recommendation]:
    """The best-healed pruning per model and depth, by the first selector at hand.

    Selectors go `consensus` first (one block for all conditions). Healing mode: of those scored on
    the most units, the one with the lowest in-domain error (WER, and 100 − BLEU), each compared
    with the unpruned control under the same mode.

    Args:
        cells: primary cells of all models (`scores.primary_cells`).
        consensus: the `consensus` table.
        maps: every model's maps in the pool of the consensus (`consensus.model_maps`).
        tolerance: points a mean score may lose.
    """
    result = []
    for model, of_model in cells.groupby("model", sort=True):
        names = selectors(of_model)
        if not names or of_model["layers"].isna().all():
            continue
        rows = of_selector(of_model, names[0])
        for depth in sorted(int(d) for d in rows["depth"].dropna().unique() if d > 0):
            agreed = consensus[(consensus["model"] == model) & (consensus["depth"] == depth)]
            agreed = agreed[agreed["scope"] == "all"]
            found = _recommend(
                rows,
                depth,
                selector=names[0],
                agreed=agreed.iloc[0] if len(agreed) else None,
                measured=maps.get(str(model)),
                tolerance=tolerance,
            )
            if found is not None:
                result.append(found)
    return result


def verdict(of_model: list[Recommendation], tolerance: float) -> tuple[str, str]:
    """The first sentence about a model, and what to bear in mind with it.

    Args:
        of_model: the model's recommendations; empty: nothing is scored yet.
        tolerance: points a mean score may lose.
    """
    if not of_model:
        return (
            "No verdict yet: no depth is scored together with its control.",
            "It takes the unpruned control and one pruned model under the same healing.",
        )
    allowed = points(tolerance)
    good = [r for r in of_model if r.within]
    chosen = max(good, key=lambda r: r.depth) if good else min(of_model, key=_mean_loss)
    costs = ", ".join(
        f"{metric_name(c.metric)} {c.control.value:.1f} → {c.pruned}" for c in chosen.in_domain
    )
    share = f"{chosen.block} of {chosen.layers} ({percent(chosen.fraction)})"
    if good:
        sentence = f"Remove {share}: {costs}."
    else:
        sentence = (
            f"No tested depth stays within {allowed} of the unpruned control; the mildest cut, "
            f"{share}, costs {costs}."
        )
    return sentence, " ".join(_notes(chosen, allowed))


def _notes(chosen: Recommendation, allowed: str) -> list[str]:
    notes = []
    healing = "without healing" if chosen.heal == "none" else f"after {chosen.heal} healing"
    notes.append(f"Both scores {healing}: the control is unpruned and healed equally.")
    if len(chosen.starts) == 1 and math.isfinite(chosen.regret_max):
        everyone = "every condition’s" if chosen.coverage >= 1 else "every measured condition’s"
        notes.append(f"The same block is within {chosen.regret_max:.3f} of {everyone} own best.")
    if chosen.within and not chosen.established:
        reach = max(c.loss_high for c in chosen.in_domain)
        if math.isfinite(reach):
            notes.append(
                f"The mean loss is within {allowed}, but its 95 % interval reaches {reach:.1f}: "
                "more test data would be needed to be sure."
            )
    worst = max(chosen.in_domain, key=lambda c: c.worst_loss)
    notes.append(
        f"Worst single condition: {worst.worst}, {worst.worst_loss:+.1f} points of "
        f"{metric_name(worst.metric)} lost."
        if worst.worst_loss > 0
        else "No single condition loses."
    )
    if chosen.missing:
        notes.append(f"{chosen.missing} in-domain scores are missing from these means.")
    return notes


def _best_heal(rows: pd.DataFrame, depth: int) -> tuple[str, list[Change]] | None:
    options = []
    cells = records(rows)
    for heal in sorted(rows["heal"].dropna().unique()):
        found = changes(cells, depth, str(heal))
        inside = [c for c in found if c.in_domain]
        if inside:
            units = sum(c.pruned.units for c in inside)
            options.append((-units, _error(inside), str(heal), found))
    if not options:
        return None
    _, _, heal, found = min(options, key=lambda option: option[:3])
    return heal, found


def _error(inside: list[Change]) -> float:
    return sum(
        (100 - c.pruned.value if c.metric in HIGHER_IS_BETTER else c.pruned.value) for c in inside
    ) / len(inside)


def _mean_loss(recommendation: Recommendation) -> float:
    return sum(c.loss for c in recommendation.in_domain) / len(recommendation.in_domain)


def _recommend(
    rows: pd.DataFrame,
    depth: int,
    *,
    selector: str,
    agreed: pd.Series | None,
    measured: ModelMaps | None,
    tolerance: float,
) -> Recommendation | None:
    best = _best_heal(rows, depth)
    if best is None:
        return None
    heal, found = best
    layers = int(rows["layers"].max())
    chosen = rows.loc[(rows["depth"] == depth) & (rows["heal"] == heal), "block_start"].dropna()
    starts = tuple(sorted({int(start) for start in chosen}))
    regret_mean = regret_max = math.nan
    if measured is not None and len(starts) == 1:
        regret_mean, regret_max = block_regret(measured, depth, starts[0])
    inside = [c for c in found if c.in_domain]
    expected = rows.loc[rows["in_domain"].fillna(False).astype(bool), "unit"].nunique()
    return Recommendation(
        model=str(rows["model"].iloc[0]),
        layers=layers,
        depth=depth,
        starts=starts,
        selector=selector,
        heal=heal,
        changes=tuple(found),
        within=all(c.loss <= tolerance for c in inside),
        established=all(c.loss_high <= tolerance for c in inside),
        missing=expected - sum(c.pruned.units for c in inside),
        regret_max=regret_max,
        regret_mean=regret_mean,
        jaccard=_number(agreed, "jaccard"),
        chance=chance_jaccard(layers - depth + 1, depth) if depth <= layers else math.nan,
        p_value=_number(agreed, "p_value"),
        coverage=_number(agreed, "coverage"),
    )


def _number(row: pd.Series | None, column: str) -> float:
    return math.nan if row is None or pd.isna(row[column]) else float(row[column])
