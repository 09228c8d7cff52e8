"""How well cheap distances foretell damage, as figures: every block, and rank correlation by depth."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from orchestrator.consensus import MapCondition, ModelMaps, condition_of
from orchestrator.mapgrid import DAMAGE, wording
from orchestrator.pictures.validation import validation_curves
from orchestrator.report.figures import (
    ACCENT,
    AMBER,
    GREEN,
    GREY,
    LINE,
    MOST_NUMBERS,
    ORANGE,
    PINK,
    Control,
    Figure,
    axis,
    layout,
    numbers,
    panel_title,
    plain,
)
from orchestrator.report.heatmaps import Choice, map_controls, thinned

_LOOKS = {
    "all": (ACCENT, "circle"), "target": (PINK, "triangle-down"), "audio": (GREEN, "diamond"),
    "prompt": (AMBER, "triangle-up"), "last": (ORANGE, "square"),
}  # fmt: skip
_STARTS = [[0, ACCENT], [0.5, "#b9b9a5"], [1, AMBER]]
"""Blue to amber: neither is lost on light or on dark paper."""
_MEAN = "mean over all conditions"
_MOST_PANELS = 8


def curves_figure(model: str, validation: pd.DataFrame, most: int = MOST_NUMBERS) -> Figure | None:
    """Rank correlation and regret against depth, a line a pool.

    Args:
        model: its name in the tables.
        validation: the `validation` table.
        most: values the figure may hold; the mean over conditions is always there.
    """
    of_model = validation[validation["model"] == model]
    if of_model.empty:
        return None
    chosen: dict[str, pd.DataFrame] = {_MEAN: of_model}
    conditions = of_model.groupby(list(MapCondition._fields), dropna=False, sort=True)
    if conditions.ngroups > 1 and 8 * len(of_model) <= most:
        for key, rows in conditions:
            chosen[condition_of(key).label] = rows
    criteria = list(dict.fromkeys(c for c, _ in validation_curves(of_model)))
    views = {}
    for label, rows in chosen.items():
        curves = validation_curves(rows)
        for criterion in criteria:
            of_criterion = {pool: f for (c, pool), f in curves.items() if c == criterion}
            if of_criterion:
                views[f"{label}|{criterion}"] = _curves_view(of_criterion)
    caption = (
        "Left: rank correlation of the criterion with damage over the starts of one depth; solid: "
        "blocks that leave layer 0 in place, dotted: all. Right: what the block it would choose "
        "costs more than the one of least damage, unhealed, with 95 % intervals."
    )
    if len(chosen) == 1 and conditions.ngroups > 1:
        caption += " To keep the page small, single conditions are in validation.parquet alone."
    return Figure(
        identity=f"validation-{model}",
        title="Rank correlation and regret by depth",
        summary=f"Rank correlation of distances of {model} with damage, and regret, against depth",
        caption=caption,
        views=views,
        controls=[
            Control("view", "Show", list(chosen)),
            Control("criterion", "Criterion", criteria),
        ],
    )


def _curves_view(curves: dict[str, pd.DataFrame]) -> dict[str, Any]:
    shape = layout(
        320, margin={"l": 56, "r": 16, "t": 56, "b": 48}, annotations=[], showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1.12, "yanchor": "bottom"},
    )  # fmt: skip
    data: list[dict[str, Any]] = []
    everything = sorted({int(d) for frame in curves.values() for d in frame.index})
    for index, (domain, title) in enumerate(
        [
            ((0, 0.475), "rank correlation with damage"),
            ((0.54, 1), "regret (nats per target token)"),
        ]
    ):
        (x_name, x), (y_name, y) = axis("x", index), axis("y", index)
        shape[x_name] = {
            "domain": list(domain), "anchor": y, "showgrid": False, "zeroline": False,
            "fixedrange": True, "title": {"text": "layers removed", "standoff": 4},
            "range": [everything[0] - 0.5, everything[-1] + 0.5],
        }  # fmt: skip
        if len(everything) <= 10:
            shape[x_name]["tickvals"] = everything
        shape[y_name] = {
            "domain": [0, 1], "anchor": x, "gridcolor": LINE, "fixedrange": True,
            "zeroline": True, "zerolinecolor": GREY, "rangemode": "tozero",
        }  # fmt: skip
        shape["annotations"].append(panel_title(f"<b>{title}</b>", sum(domain) / 2, 1, yshift=4))
    for place, (pool, frame) in enumerate(curves.items()):
        colour, symbol = _LOOKS.get(pool, (GREY, "circle"))
        offset = 0.012 * (everything[-1] - everything[0] + 1) * (place - (len(curves) - 1) / 2)
        shared = {
            "type": "scatter", "mode": "lines+markers", "legendgroup": pool, "name": plain(pool),
            "marker": {"color": colour, "symbol": symbol, "size": 6}, "connectgaps": False,
        }  # fmt: skip
        depths = [int(d) for d in frame.index]
        for column, dash, what in (
            ("spearman_without_layer_0", "solid", "without layer 0"),
            ("spearman", "dot", "all starts"),
        ):
            data.append(shared | {
                "x": depths, "y": numbers(frame[column], 3), "showlegend": dash == "solid",
                "line": {"color": colour, "width": 2 if dash == "solid" else 1, "dash": dash},
                "mode": "lines+markers" if dash == "solid" else "lines",
                "hovertemplate": f"{plain(pool)}, {what}<br>depth %{{x}}: %{{y:.2f}}<extra></extra>",
            })  # fmt: skip
        data.append(shared | {
            "xaxis": "x2", "yaxis": "y2", "x": [round(d + offset, 3) for d in depths],
            "y": numbers(frame["regret"]), "showlegend": False, "customdata": depths,
            "line": {"color": colour, "width": 1.5},
            "error_y": {
                "type": "data", "symmetric": False, "thickness": 1, "width": 0, "color": colour,
                "array": numbers(frame["regret_ci_high"] - frame["regret"]),
                "arrayminus": numbers(frame["regret"] - frame["regret_ci_low"]),
            },
            "hovertemplate": f"{plain(pool)}<br>depth %{{customdata}}: %{{y:.4f}} nats<extra></extra>",
        })  # fmt: skip
    return {"data": data, "layout": shape}


def scatter_figure(
    model: str,
    measured: Mapping[Choice, ModelMaps],
    depths: Sequence[int],
    most: int = MOST_NUMBERS,
) -> Figure | None:
    """Distance against damage, a panel a depth and a dot a block, all conditions in one.

    Args:
        model: its name.
        measured: its maps (`heatmaps.measured_maps`), those of damage among them.
        depths: depths to show where damage was measured; at most eight, evenly chosen.
        most: values the figure may hold; the first criterion and pool are always there.
    """
    damage = next((maps for (name, _), maps in measured.items() if name == DAMAGE), None)
    if damage is None:
        return None
    whole = [
        d
        for d in range(1, damage.layers - 1)  # with three starts or more
        if any(damage.row(condition, d) is not None for condition in damage.distances)
    ]
    asked = [d for d in whole if d in set(depths)] or whole
    if not asked:
        return None
    picked = np.linspace(0, len(asked) - 1, min(_MOST_PANELS, len(asked))).round().astype(int)
    shown = [asked[i] for i in picked]
    views: dict[str, dict[str, Any]] = {}
    left, found = most, 0
    for (criterion, name), maps in measured.items():
        if criterion == DAMAGE:
            continue
        view, cost = _scatter_view(maps, damage, criterion, shown)
        if not cost:
            continue
        found += 1
        if not views or cost <= left:
            views[f"{criterion}|{name}"] = view
            left -= cost
    if not views:
        return None
    caption = (
        "A dot is a block that leaves layer 0 in place, under one condition: right is further "
        "turned, up is more damage. Blue dots begin low in the decoder, amber ones high. Rings: the block that the "
        "distance would choose; where it foretells damage, they lie at the foot of the panel."
    )
    if len(shown) < len(asked):
        caption += f" {len(shown)} of {len(asked)} depths are shown."
    caption += thinned(1, found - len(views))
    return Figure(
        identity=f"damage-{model}",
        title="Every block: distance against damage",
        summary=f"Damage of blocks of {model} against their distance, a panel a depth",
        caption=caption,
        views=views,
        controls=map_controls(views),
    )


def _scatter_view(
    measured: ModelMaps, damage: ModelMaps, criterion: str, depths: Sequence[int]
) -> tuple[dict[str, Any], int]:
    """The view, and how many values it holds."""
    per_row = min(4, len(depths))
    bands = math.ceil(len(depths) / per_row)
    name, unit = wording(criterion)
    height = 230 * bands + 60
    shape = layout(
        height, margin={"l": 62, "r": 76, "t": 30, "b": 46}, annotations=[],
        coloraxis={"colorscale": _STARTS, "cmin": 1, "cmax": damage.layers - 1, "colorbar": {
            "thickness": 10, "outlinewidth": 0, "x": 1.01, "len": min(1.0, 240 / height * 1.1),
            "y": 1, "yanchor": "top", "title": {"text": "first layer removed", "side": "right"}}},
    )  # fmt: skip
    data: list[dict[str, Any]] = []
    cost = 0
    for index, depth in enumerate(depths):
        band, column = divmod(index, per_row)
        left = column / per_row + (0.024 if column else 0)
        right = (column + 1) / per_row - (0.016 if column + 1 < per_row else 0)
        top = 1 - band / bands
        bottom = 1 - (band + 1) / bands + (58 / height if band + 1 < bands else 0)
        (x_name, x), (y_name, y) = axis("x", index), axis("y", index)
        last = index + per_row >= len(depths)
        shape[x_name] = {
            "domain": [left, right], "anchor": y, "gridcolor": LINE, "zeroline": False,
            "fixedrange": True, "nticks": 4,
            "title": {"text": f"{name} ({unit})" if last and per_row < 3 else name if last else "",
                      "standoff": 4, "font": {"size": 11}},
        }  # fmt: skip
        shape[y_name] = {
            "domain": [bottom, top], "anchor": x, "gridcolor": LINE, "zeroline": True,
            "zerolinecolor": GREY, "fixedrange": True, "nticks": 5,
            "title": {"text": "damage (nats)" if column == 0 else "", "standoff": 4},
        }  # fmt: skip
        title = f"<b>{depth} layer{'s' if depth > 1 else ''}</b>"
        shape["annotations"].append(panel_title(title, (left + right) / 2, top, yshift=2))
        blocks = _blocks(measured, damage, depth)
        cost += 4 * len(blocks)
        data += _dots(blocks, x, y)
    return {"data": data, "layout": shape}, cost


def _blocks(measured: ModelMaps, damage: ModelMaps, depth: int) -> pd.DataFrame:
    """The blocks of one depth that leave layer 0 in place, with both figures; a row a condition."""
    parts = []
    for condition in damage.distances:
        distance, cost = measured.row(condition, depth), damage.row(condition, depth)
        if distance is None or cost is None:
            continue
        chosen = np.zeros(len(cost) - 1, dtype=bool)
        chosen[distance[1:].argmin()] = True
        parts.append(
            pd.DataFrame(
                {
                    "start": range(1, len(cost)),
                    "distance": distance[1:],
                    "damage": cost[1:],
                    "chosen": chosen,
                    "condition": condition.label,
                }
            )
        )
    columns = ["start", "distance", "damage", "chosen", "condition"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _dots(blocks: pd.DataFrame, x: str, y: str) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = []
    for condition, rows in blocks.groupby("condition", sort=True):
        traces.append({
            "type": "scatter", "mode": "markers", "xaxis": x, "yaxis": y,
            "x": numbers(rows["distance"]), "y": numbers(rows["damage"]),
            "marker": {"color": [int(s) for s in rows["start"]], "coloraxis": "coloraxis", "size": 5},
            "hovertemplate": f"{plain(condition)}<br>from layer %{{marker.color}}: distance "
            "%{x:.4f}, damage %{y:.4f}<extra></extra>",
        })  # fmt: skip
    chosen = blocks[blocks["chosen"].astype(bool)]
    traces.append({
        "type": "scatter", "mode": "markers", "xaxis": x, "yaxis": y, "hoverinfo": "skip",
        "x": numbers(chosen["distance"]), "y": numbers(chosen["damage"]),
        "marker": {"symbol": "circle-open", "size": 11, "color": PINK, "line": {"width": 2}},
    })  # fmt: skip
    return traces
