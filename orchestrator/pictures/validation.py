"""How well distances foretell damage, as a picture: rank correlation and regret per depth."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from orchestrator.mapgrid import CRITERIA, wording
from orchestrator.pictures.drawing import check_picture, new_figure, save, styled, whole_ticks
from workers.config import POOLS
from workers.errors import InvalidInput

_POOL_COLOURS: dict[str, str] = dict(
    zip(POOLS, ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#333333"), strict=True)
)  # Okabe and Ito's
_POOL_MARKERS: dict[str, str] = dict(zip(POOLS, "s^Dvo", strict=True))


@styled
def draw_validation(validation: pd.DataFrame, out: Path, title: str = "") -> Path:
    """How well each criterion ranks blocks as their damage does, a column a criterion.

    Per depth and pool: rank correlation without and with layer 0, and what the criterion's choice
    costs more than the best block does. Several conditions are averaged.

    Args:
        validation: rows of the validation table (docs: definitions).
        out: the file; its suffix says the format.
        title: such as the model and the condition.

    Raises:
        InvalidInput: the table is empty, or nowhere to draw it.
    """
    check_picture(out)
    curves = validation_curves(validation)
    if not curves:
        raise InvalidInput("no validation to draw", str(out), "measure damage first")
    criteria = list(dict.fromkeys(criterion for criterion, _ in curves))
    figure = new_figure((4.2 * len(criteria) + 1.0, 8.4), title)
    axes = figure.subplots(3, len(criteria), squeeze=False, sharex=True, sharey="row")
    lines: dict[str, Any] = {}
    pools = list(dict.fromkeys(pool for _, pool in curves))
    for (criterion, pool), rows in curves.items():
        column = axes[:, criteria.index(criterion)]
        depths = rows.index.to_numpy()
        style: dict[str, Any] = {
            "color": _POOL_COLOURS.get(pool, "#888888"), "marker": _POOL_MARKERS.get(pool, "o"),
            "markersize": 4 if len(depths) <= 40 else 2, "linewidth": 1.3,
        }  # fmt: skip
        column[0].plot(depths, rows["spearman_without_layer_0"], **style)
        column[1].plot(depths, rows["spearman"], **style)
        beside = depths + 0.12 * (pools.index(pool) - (len(pools) - 1) / 2)
        lines[pool] = column[2].plot(beside, rows["regret"], **style)[0]
        column[2].vlines(
            beside, rows["regret_ci_low"], rows["regret_ci_high"], style["color"], linewidth=0.8
        )
    for column, criterion in zip(axes.T, criteria, strict=True):
        column[0].set_title(wording(criterion).name)
        column[2].set_xlabel("layers removed")
        for place in column:
            place.axhline(0, color="#999999", linewidth=0.8)
            place.grid(axis="y", color="#dddddd", linewidth=0.6)
            whole_ticks(place.xaxis)
    for place, text in zip(
        axes[:, 0],
        ("rank correlation with damage,\nlayer 0 left in place", "rank correlation with damage,\nall starts",
         "regret of its choice\n(nats per target token)"), strict=True,
    ):  # fmt: skip
        place.set_ylabel(text)
    lowest = min(
        rows[["spearman", "spearman_without_layer_0"]].min().min() for rows in curves.values()
    )
    for row in (0, 1):  # one scale, so that layer 0's share of the correlation shows
        axes[row, 0].set_ylim(min(-0.05, float(np.nan_to_num(lowest)) - 0.05), 1.05)
    every = [depth for rows in curves.values() for depth in rows.index]
    axes[0, 0].set_xlim(min(every) - 0.6, max(every) + 0.6)
    figure.legend(
        lines.values(), [f"pool {pool}" for pool in lines], loc="outside lower center",
        ncols=len(lines), frameon=False,
    )  # fmt: skip
    return save(figure, out)


def validation_curves(validation: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """A frame a (criterion, pool), indexed by depth: the mean of each figure over conditions."""
    order = [*CRITERIA, *sorted(set(validation["criterion"]) - set(CRITERIA))]
    figures = ["spearman", "spearman_without_layer_0", "regret", "regret_ci_low", "regret_ci_high"]
    curves = {}
    for criterion in order:
        of_criterion = validation[validation["criterion"] == criterion]
        for pool in sorted(
            set(of_criterion["pool"]),
            key=[*POOLS, *sorted(set(of_criterion["pool"]) - set(POOLS))].index,
        ):
            rows = of_criterion[of_criterion["pool"] == pool]
            curves[criterion, pool] = rows.groupby("depth")[figures].mean().astype("float64")
    return curves
