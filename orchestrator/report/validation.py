"""How well cheap distances foretell damage: the sentence and the compact table of a model.

Damage is what skipping a block adds to the loss of the target tokens; the distances are judged by it
(docs: definitions). The table comes from elsewhere; here it is averaged over conditions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from orchestrator.compare import spans
from orchestrator.consensus import MapCondition
from orchestrator.mapgrid import ANGULAR, wording

WITHOUT = (
    "No damage maps, so nothing here says how well the distances foretell what removing a block "
    "costs. They are measured with maps.damage: true in the sweep file."
)


@dataclass(frozen=True)
class Judgement:
    """How one criterion in one pool fares against damage, over conditions and depths."""

    criterion: str
    pool: str
    spearman: float
    """Mean rank correlation; NaN where it is nowhere defined."""
    spearman_without_layer_0: float
    regret: float
    """Mean, in nats per target token."""
    worst: float
    """Largest regret, and the interval of that one."""
    worst_low: float
    worst_high: float
    depths: tuple[int, ...]
    conditions: int

    @property
    def name(self) -> str:
        """The criterion as it is written."""
        return wording(self.criterion).name

    @property
    def spans(self) -> str:
        """The depths as they are written."""
        return spans(self.depths)


def judgements(validation: pd.DataFrame, depths: Sequence[int] = ()) -> list[Judgement]:
    """One a criterion and pool, the best foreteller first: by mean regret, then by correlation.

    Args:
        validation: rows of one model in the validation table.
        depths: those to count, where the table has any of them; else all.
    """
    counted = validation[validation["depth"].isin(list(depths))]
    counted = counted if len(counted) else validation
    found = []
    for (criterion, pool), rows in counted.groupby(["criterion", "pool"], sort=True):
        regret = rows["regret"].astype("float64")
        if regret.isna().all():
            continue
        worst = rows.iloc[int(np.nanargmax(regret))]
        found.append(
            Judgement(
                criterion=str(criterion),
                pool=str(pool),
                spearman=float(rows["spearman"].mean()),
                spearman_without_layer_0=float(rows["spearman_without_layer_0"].mean()),
                regret=float(regret.mean()),
                worst=float(worst["regret"]),
                worst_low=float(worst["regret_ci_low"]),
                worst_high=float(worst["regret_ci_high"]),
                depths=tuple(sorted({int(d) for d in rows["depth"]})),
                conditions=len(rows[list(MapCondition._fields)].drop_duplicates()),
            )
        )
    return sorted(
        found,
        key=lambda j: (round(j.regret, 6), -np.nan_to_num(j.spearman_without_layer_0), j.pool),
    )


def in_words(found: Sequence[Judgement], pool: str) -> str:
    """What the table says of the distance that selectors read, and which foretells best.

    Args:
        found: `judgements`; not empty.
        pool: the pool selectors read.
    """
    own = min(found, key=lambda j: (j.criterion != ANGULAR, j.pool != pool, found.index(j)))
    over = f"At depth {own.spans}" if len(own.depths) == 1 else f"Across depths {own.spans}"
    text = (
        f"{over} the {own.name} in pool {own.pool} {_ranks(own)}; its choice costs "
        f"{_nats(own.regret)} nats per token more than the best block in the mean, and "
        f"{_nats(own.worst)} at worst."
    )
    best = found[0]
    if best is own:
        return f"{text} None of the {len(found)} measured does better." if len(found) > 1 else text
    return (
        f"{text} The {best.name} in pool {best.pool} costs least: {_nats(best.regret)} in the mean."
    )


def _ranks(found: Judgement) -> str:
    without, whole = found.spearman_without_layer_0, found.spearman
    if math.isfinite(without):
        return (
            f"ranks blocks as damage does with mean rank correlation {_signed(without)} without "
            f"layer 0 ({_signed(whole)} with it)"
        )
    if math.isfinite(whole):
        return f"ranks blocks as damage does with mean rank correlation {_signed(whole)}"
    return "has too few starts to be correlated with damage"


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _nats(value: float) -> str:
    digits = 2 if value >= 0.095 or value == 0 else 3
    return f"{value:.{digits}f}".replace("-", "−")
