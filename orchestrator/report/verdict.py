"""From scores and consensus to a decision: what to remove, at what cost, how sure that is."""

import math
from dataclasses import dataclass

import pandas as pd

from orchestrator.consensus import chance_jaccard
from orchestrator.report.scores import (
    HIGHER_IS_BETTER,
    Change,
    changes,
    metric_name,
    of_selector,
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


def recommendations(
    cells: pd.DataFrame, consensus: pd.DataFrame, tolerance: float
) -> list[Recommendation]:
    """The best-healed pruning per model and depth, by the first selector at hand.

    Selectors go `consensus` first (one block for all conditions). Healing mode: of those scored on
    the most units, the one with the lowest in-domain error (WER, and 100 − BLEU), each compared
    with the unpruned control under the same mode.

    Args:
        cells: primary cells of all models (`scores.primary_cells`).
        consensus: the `consensus` table.
        tolerance: points a mean score may lose.
    """
    result = []
    for model, of_model in cells.groupby("model", sort=True):
        names = selectors(of_model)
        layers = of_model["layers"].max()
        if not names or pd.isna(layers):
            continue
        rows = of_selector(of_model, names[0])
        expected = rows.loc[rows["in_domain"] == True, "unit"].nunique()  # noqa: E712
        for depth in sorted(int(d) for d in rows["depth"].dropna().unique() if d > 0):
            best = _best_heal(rows, depth)
            if best is not None:
                heal, found = best
                agreed = _agreement(consensus, str(model), depth)
                at_depth = rows[(rows["depth"] == depth) & (rows["heal"] == heal)]
                starts = tuple(sorted({int(s) for s in at_depth["block_start"].dropna()}))
                result.append(
                    _recommend(
                        str(model),
                        int(layers),
                        depth,
                        starts,
                        names[0],
                        heal,
                        found,
                        agreed,
                        tolerance,
                        expected,
                    )  # fmt: skip
                )
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
    points = f"{tolerance:g} point{'s' if tolerance != 1 else ''}"
    good = [r for r in of_model if r.within]
    chosen = max(good, key=lambda r: r.depth) if good else min(of_model, key=_mean_loss)
    costs = ", ".join(
        f"{metric_name(c.metric)} {c.control.value:.1f} → {c.pruned}" for c in chosen.in_domain
    )
    share = f"{chosen.block} of {chosen.layers} ({chosen.fraction:.0%})"
    if good:
        sentence = f"Remove {share}: {costs}."
    else:
        sentence = (
            f"No tested depth stays within {points} of the unpruned control; the mildest cut, "
            f"{share}, costs {costs}."
        )
    return sentence, " ".join(_notes(chosen, points))


def _notes(chosen: Recommendation, points: str) -> list[str]:
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
                f"The mean loss is within {points}, but its 95 % interval reaches {reach:.1f}: "
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
    for heal in sorted(rows["heal"].dropna().unique()):
        found = changes(rows, depth, str(heal))
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


def _agreement(consensus: pd.DataFrame, model: str, depth: int) -> pd.Series | None:
    found = consensus[
        (consensus["model"] == model)
        & (consensus["depth"] == depth)
        & (consensus["scope"] == "all")
    ]
    return None if found.empty else found.iloc[0]


def _recommend(
    model: str,
    layers: int,
    depth: int,
    starts: tuple[int, ...],
    selector: str,
    heal: str,
    found: list[Change],
    agreed: pd.Series | None,
    tolerance: float,
    expected: int,
) -> Recommendation:
    inside = [c for c in found if c.in_domain]
    # The consensus row speaks of the minimax block; another selector's block has another regret.
    same = agreed is not None and starts == (_integer(agreed["block_start"]),)
    return Recommendation(
        model=model,
        layers=layers,
        depth=depth,
        starts=starts,
        selector=selector,
        heal=heal,
        changes=tuple(found),
        within=all(c.loss <= tolerance for c in inside),
        established=all(c.loss_high <= tolerance for c in inside),
        missing=expected - sum(c.pruned.units for c in inside),
        regret_max=_number(agreed, "regret_max") if same else math.nan,
        regret_mean=_number(agreed, "regret_mean") if same else math.nan,
        jaccard=_number(agreed, "jaccard"),
        chance=chance_jaccard(layers - depth + 1, depth) if depth <= layers else math.nan,
        p_value=_number(agreed, "p_value"),
        coverage=_number(agreed, "coverage"),
    )


def _integer(value: object) -> int | None:
    return None if pd.isna(value) else int(value)  # type: ignore[call-overload]


def _number(row: pd.Series | None, column: str) -> float:
    return math.nan if row is None or pd.isna(row[column]) else float(row[column])
