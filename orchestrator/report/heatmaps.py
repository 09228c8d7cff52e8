"""All maps of a model as heat maps on the page, and the colours that every heat map has."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from orchestrator.consensus import (
    Floats,
    MapCondition,
    ModelMaps,
    model_maps,
    whole_row,
)
from orchestrator.mapgrid import CRITERIA, DAMAGE, wording
from orchestrator.report.figures import (
    MOST_NUMBERS,
    Control,
    Figure,
    axis,
    layout,
    numbers,
    panel_title,
    plain,
    tick,
)
from orchestrator.report.scores import task_label
from orchestrator.shades import DAMAGE_WIDTH, Limits, damage_ticks, shade_limits

SCALE = "Cividis"
"""Dark is redundant."""


Choice = tuple[str, str]
"""Criterion and pool."""


def measured_maps(model: str, maps: pd.DataFrame, pool: str) -> dict[Choice, ModelMaps]:
    """A model's maps by criterion and pool, in the order in which a full page can spare them.

    First each criterion's foremost pool (`pool` where it has that), then the others.

    Args:
        model: its name in the tables.
        maps: the `maps` table, with criteria.
        pool: the pool that selectors read.
    """
    of_model = maps[maps["model"] == model]
    known = list(CRITERIA)
    places: list[tuple[tuple[int, int, str], Choice]] = []
    for criterion in sorted(map(str, of_model["criterion"].unique())):
        rows = of_model[of_model["criterion"] == criterion]
        rank = known.index(criterion) if criterion in known else len(known)
        pools = sorted(rows["pool"].unique(), key=lambda name: (name != pool, name))
        places += [((i, rank, name), (criterion, name)) for i, name in enumerate(pools)]
    return {
        choice: model_maps(of_model, pool=choice[1], criterion=choice[0])[model]
        for _, choice in sorted(places)
    }


def map_figure(
    model: str,
    measured: Mapping[Choice, ModelMaps],
    conditions: Sequence[MapCondition],
    hole: Callable[..., str],
    most: int = MOST_NUMBERS,
) -> Figure | None:
    """All maps of one model as heat maps: a row a task and language, text beside speech.

    Args:
        model: its name.
        measured: its maps (`measured_maps`), the one shown first at the front.
        conditions: those that should have a map (`consensus.expected_conditions`).
        hole: reason why a map of (encoder, task, source, target) is not there.
        most: distances the figure may hold (see `allotted`).
    """
    if not measured:
        return None
    kinds = sorted(
        {(c.encoder, c.modality, c.adapted) for c in conditions},
        key=lambda k: (k[0] or "", k[1] != "text", k[2]),
    )
    tasks = list(dict.fromkeys(c[1:4] for c in conditions))
    costs = {
        choice: sum(int(np.isfinite(table).sum()) for table in maps.distances.values())
        for choice, maps in measured.items()
    }
    every, shown = allotted(costs, next(iter(measured.values())).layers, most)
    views = {
        f"{criterion}|{pool}": _map_view(
            measured[criterion, pool], criterion, kinds, tasks, hole, every
        )
        for criterion, pool in shown
    }
    caption = (
        "Distance between the states before and after a block (start × number of layers); dark is "
        "redundant, dots mark the best block of each depth. The scale ends at the largest distance "
        "among blocks that leave layer 0 in place; blocks from layer 0 may lie beyond it."
    )
    if any(criterion == DAMAGE for criterion, _ in measured):
        caption += " Damage is what skipping the block adds to the loss, without healing."
    return Figure(
        identity=f"maps-{model}",
        title="Redundancy maps",
        summary=f"{len(tasks)} by {len(kinds)} heat maps of block distance for {model}",
        caption=caption + thinned(every, len(measured) - len(views)),
        views=views,
        controls=map_controls(views),
    )


def allotted(costs: Mapping[Choice, int], layers: int, most: int) -> tuple[int, list[Choice]]:
    """What a page of bearable size has room for: one depth in how many, and which choices.

    The first choice is always there. The first pool of every criterion is too, so far as drawing
    fewer depths makes room and some two dozen of them are left; whatever else fits is added.

    Args:
        costs: values that each (criterion, pool) takes, in order of importance (`measured_maps`).
        layers: of the decoder.
        most: values there is room for.
    """
    order = list(costs)
    main = [pair for i, pair in enumerate(order) if pair[0] not in {c for c, _ in order[:i]}]
    wanted = math.ceil(sum(costs[pair] for pair in main) / most)
    every = max(1, math.ceil(costs[order[0]] / most), min(wanted, math.ceil(layers / 24)))
    shown, left = [order[0]], most - costs[order[0]] // every
    for pair in order[1:]:
        if costs[pair] // every <= left:
            shown.append(pair)
            left -= costs[pair] // every
    return every, shown


def map_controls(views: dict[str, dict[str, Any]]) -> list[Control]:
    """Choice of criterion and pool, the last two parts of the views' keys."""
    parts = [key.split("|")[-2:] for key in views]
    return [
        Control("criterion", "Criterion", list(dict.fromkeys(criterion for criterion, _ in parts))),
        Control("pool", "Tokens", list(dict.fromkeys(pool for _, pool in parts))),
    ]


def thinned(every: int, left_out: int) -> str:
    """What a caption says of maps that a page of bearable size has no room for."""
    text = ""
    if every > 1:
        text += f" To keep the page small, one depth in {every} is drawn."
    if left_out:
        text += f" {left_out} further choices of criterion and tokens are in maps.parquet."
    return text


def colour_axis(criterion: str, limits: Limits, scale: Any, **bar: Any) -> dict[str, Any]:
    """A layout's colour axis for distances as `shaded` gives them."""
    name, unit = wording(criterion)
    axis_of = {
        "colorscale": scale,
        "cmin": round(float(shaded(limits.low, criterion)), 4),
        "cmax": round(float(shaded(limits.high, criterion)), 4),
        "colorbar": {
            "thickness": 10, "outlinewidth": 0, "y": 1, "yanchor": "top",
            "title": {"text": f"{plain(name)} ({plain(unit)})", "side": "right"},
        } | bar,
    }  # fmt: skip
    ticks = damage_ticks(limits)
    if criterion == DAMAGE and len(ticks) > 2:
        axis_of["colorbar"] |= {
            "tickvals": numbers(shaded(np.array(ticks), criterion)),
            "ticktext": [f"{value:g}".replace("-", "−") for value in ticks],
        }
    return axis_of


def shaded(distances: Any, criterion: str) -> Any:
    """Distances on the colour scale: as they are, damage by `arcsinh`."""
    return np.arcsinh(distances / DAMAGE_WIDTH) if criterion == DAMAGE else distances


def drawn_depths(tables: Sequence[Floats], every: int) -> range:
    """The depths a view draws: up to the deepest measured, one in `every`.

    Where most depths were not measured at all, as with damage of a few, there is nothing to thin.
    """
    measured = sorted({int(d) for t in tables for d in np.flatnonzero(np.isfinite(t).any(axis=1))})
    deepest = measured[-1] if measured else 1
    return range(1, deepest + 1, every if len(measured) * every > deepest else 1)


def heat(
    table: Floats,
    errors: Floats | None,
    criterion: str,
    depths: range,
    x: str,
    y: str,
    colours: str,
) -> dict[str, Any]:
    """A heat map of start by depth (`drawn_depths`), with the values to hover over."""
    layers = table.shape[1]
    measured = np.asarray(np.isfinite(table).any(axis=1))
    ends = {d: layers - d + 1 if measured[d] else 0 for d in depths}
    trace: dict[str, Any] = {
        "type": "heatmap", "xaxis": x, "yaxis": y, "coloraxis": colours, "y0": 1,
        "dy": depths.step, "z": [numbers(shaded(table[d, :end], criterion)) for d, end in ends.items()],
        "hoverongaps": False, "xgap": 0.5 if layers <= 16 else 0, "ygap": 0.5 if layers <= 16 else 0,
    }  # fmt: skip
    value = "%{z:.4f}"
    if criterion == DAMAGE:
        trace["text"] = [
            [None if value is None else f"{value:.4f}" for value in numbers(table[d, :end])]
            for d, end in ends.items()
        ]
        value = "%{text}"
    if errors is not None:
        trace["customdata"] = [numbers(errors[d, :end]) for d, end in ends.items()]
        value += " ± %{customdata:.4f}"
    name = plain(wording(criterion).name)
    trace["hovertemplate"] = f"from layer %{{x}}, %{{y}} removed<br>{name} {value}<extra></extra>"
    return trace


def best_marks(table: Floats, depths: range, x: str, y: str) -> dict[str, Any]:
    """Dots on the best block of each depth drawn that was measured whole."""
    rows = {depth: whole_row(table, depth) for depth in depths}
    best = {depth: int(row.argmin()) for depth, row in rows.items() if row is not None}
    return {
        "type": "scatter", "mode": "markers", "xaxis": x, "yaxis": y, "hoverinfo": "skip",
        "x": list(best.values()), "y": list(best),
        "marker": {"size": 4 if len(depths) <= 40 else 3, "color": "#fff",
                   "line": {"width": 1 if len(depths) <= 40 else 0.5, "color": "#222"}},
    }  # fmt: skip


def start_axis(layers: int, domain: Sequence[float], y: str) -> dict[str, Any]:
    """The axis of a block's first layer."""
    return {
        "domain": list(domain), "anchor": y, "range": [-0.5, layers - 0.5], "dtick": tick(layers),
        "tick0": 0, "showgrid": False, "zeroline": False, "fixedrange": True, "ticks": "",
    }  # fmt: skip


def depth_axis(depths: range, domain: Sequence[float], x: str) -> dict[str, Any]:
    """The axis of a block's number of layers."""
    return {
        "domain": list(domain), "anchor": x, "range": [1 - depths.step / 2, depths[-1] + depths.step / 2],
        "dtick": tick(depths[-1]),
        "tick0": 0, "showgrid": False, "zeroline": False, "fixedrange": True, "ticks": "",
    }  # fmt: skip


def _map_view(
    measured: ModelMaps,
    criterion: str,
    kinds: Sequence[tuple[str | None, str, bool]],
    tasks: Sequence[tuple[str, str, str | None]],
    hole: Callable[..., str],
    every: int,
) -> dict[str, Any]:
    layers = measured.layers
    limits = shade_limits(list(measured.distances.values()))
    depths = drawn_depths(list(measured.distances.values()), every)
    height = 148 * len(tasks) + 96
    unit = height - 96
    data: list[dict[str, Any]] = []
    shape = layout(
        height,
        margin={"l": 48 + 8 * max(len(task_label(*t)) for t in tasks), "r": 76, "t": 44, "b": 52},
        annotations=[],
        coloraxis=colour_axis(criterion, limits, SCALE, len=min(1.0, 296 / unit), x=1.01),
    )
    shape["annotations"].append(panel_title("first layer removed", 0.5, 0, yshift=-42))
    gap_x, gap_y = 0.02, 22 / unit
    for row, task in enumerate(tasks):
        bottom = 1 - (row + 1) / len(tasks) + (gap_y if row + 1 < len(tasks) else 0)
        top_edge = 1 - row / len(tasks)
        middle = (bottom + top_edge) / 2
        shape["annotations"].append(
            panel_title(f"<b>{plain(task_label(*task))}</b>", 0, middle, xanchor="right",
                        yanchor="middle", xshift=-34)
        )  # fmt: skip
        for column, (encoder, modality, adapted) in enumerate(kinds):
            left = column / len(kinds) + (gap_x / 2 if column else 0)
            right = (column + 1) / len(kinds) - (gap_x / 2 if column + 1 < len(kinds) else 0)
            index = row * len(kinds) + column
            (x_name, x), (y_name, y) = axis("x", index), axis("y", index)
            condition = MapCondition(encoder, *task, modality=modality, adapted=adapted)
            below = [
                MapCondition(encoder, *t, modality=modality, adapted=adapted)
                for t in tasks[row + 1 :]
            ]
            lowest = not any(other in measured.distances for other in below)
            shape[x_name] = start_axis(layers, (left, right), y) | {"showticklabels": lowest}
            shape[y_name] = depth_axis(depths, (bottom, top_edge), x)
            shape[y_name]["showticklabels"] = column == 0
            if row == 0:
                title = [plain(encoder)] if encoder else []
                title.append(modality if adapted else f"{modality}, before adapting")
                shape["annotations"].append(
                    panel_title("<br>".join(title), (left + right) / 2, 1, yshift=4)
                )
            table = measured.distances.get(condition)
            if table is None:
                shape["annotations"].append(
                    _hole_note(hole(encoder, *task), (left + right) / 2, middle)
                )
            else:
                errors = measured.errors[condition]
                data.append(heat(table, errors, criterion, depths, x, y, "coloraxis"))
                data.append(best_marks(table, depths, x, y))
    return {"data": data, "layout": shape}


def _hole_note(reason: str, x: float, y: float) -> dict[str, Any]:
    words = textwrap.wrap(reason, 24, max_lines=4, placeholder=" …")
    return panel_title(
        "<br>".join(["<b>no map</b>", *map(plain, words)]), x, y, yanchor="middle",
        hovertext=plain(reason), font={"size": 10},
    )  # fmt: skip
