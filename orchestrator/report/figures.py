"""The page's figures as plain Plotly JSON, from maps and consensus (curves live in `curves`).

Colours of text, axes and grids are the style sheet's, so that one figure serves light, dark and
print. Names that came from data are escaped: Plotly reads a little HTML in its labels.
"""

import html
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from orchestrator.consensus import (
    MapCondition,
    ModelMaps,
    chance_frequency,
    chosen_blocks,
    expected_conditions,
    layer_frequency,
    model_maps,
)
from orchestrator.report.scores import task_label
from orchestrator.report.verdict import layers_text

ACCENT, ORANGE, GREEN, PINK, AMBER, GREY = (
    "#3b82c4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#8a8f98",
)  # fmt: skip
"""Okabe and Ito's palette, its blue lightened to stand on dark paper too."""
_FILL = {  # by (translation?, speech?)
    (False, True): ACCENT, (False, False): "rgba(59,130,196,0.3)",
    (True, True): GREEN, (True, False): "rgba(0,158,115,0.3)",
}  # fmt: skip
LINE = "rgba(128,128,128,0.25)"
MOST_DISTANCES = 100_000  # about 1.5 MB of the page; further pools stay in maps.parquet


@dataclass(frozen=True)
class Control:
    """A drop-down list that picks among a figure's views."""

    name: str
    label: str
    options: Sequence[str]


@dataclass(frozen=True)
class Figure:
    """Plotly views of one figure; a view's key is its controls' choices joined by `|`."""

    identity: str
    title: str
    summary: str
    """What a reader who cannot see it is told."""
    caption: str
    views: dict[str, dict[str, Any]]
    controls: Sequence[Control] = field(default_factory=tuple)


def plain(text: object) -> str:
    """Text from data, safe in a Plotly label."""
    return html.escape(str(text), quote=False)


def numbers(values: Iterable[float], digits: int = 4) -> list[float | None]:
    """Rounded for JSON; null for what is not finite."""
    return [round(float(v), digits) if math.isfinite(v) else None for v in values]


def layout(height: int, **more: Any) -> dict[str, Any]:
    """The layout all figures share."""
    return {
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 40, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "hoverlabel": {"font": {"size": 12}},
        "dragmode": False,
        "modebar": {"bgcolor": "rgba(0,0,0,0)"},
        "showlegend": False,
    } | more


def axis(letter: str, index: int) -> tuple[str, str]:
    """`("xaxis3", "x3")`: an axis' name in a layout and in a trace."""
    suffix = "" if index == 0 else str(index + 1)
    return f"{letter}axis{suffix}", f"{letter}{suffix}"


def panel_title(text: str, x: float, y: float, **more: Any) -> dict[str, Any]:
    """A panel's title as an annotation in paper coordinates."""
    return {
        "text": text, "x": x, "y": y, "xref": "paper", "yref": "paper", "showarrow": False,
        "xanchor": "center", "yanchor": "bottom", "font": {"size": 12},
    } | more  # fmt: skip


def map_figure(
    model: str,
    maps: pd.DataFrame,
    results: pd.DataFrame,
    pool: str,
    hole: Callable[..., str],
    most: int = MOST_DISTANCES,
) -> Figure | None:
    """All maps of one model as heat maps: a row a task and language, text beside speech.

    Args:
        model: its name in the tables.
        maps: the `maps` table.
        results: the `results` table, for conditions still without a map.
        pool: the pool shown first.
        hole: reason why a map of (encoder, task, source, target) is not there.
        most: distances the figure may hold; the first pool is always whole.
    """
    of_model = maps[maps["model"] == model]
    if of_model.empty:
        return None
    conditions = expected_conditions(maps, results, model)
    kinds = sorted(
        {(c.encoder, c.modality, c.adapted) for c in conditions},
        key=lambda k: (k[0] or "", k[1] != "text", k[2]),
    )
    tasks = list(dict.fromkeys(c[1:4] for c in conditions))
    pools = sorted(of_model["pool"].unique(), key=lambda name: (name != pool, name))
    views: dict[str, dict[str, Any]] = {}
    shown = 0
    for name in pools:
        shown += int((of_model["pool"] == name).sum())
        if views and shown > most:
            break
        measured = model_maps(of_model, name)[model]
        views[str(name)] = _map_view(measured, kinds, tasks, hole)
    left_out = len(pools) - len(views)
    caption = (
        "Distance between the states before and after a block (start × number of layers); dark is "
        "redundant, dots mark the best block of each depth. The scale ends at the largest distance "
        "among blocks that leave layer 0 in place; blocks from layer 0 may lie beyond it."
    )
    if left_out:
        caption += f" {left_out} further token pools are in maps.parquet."
    return Figure(
        identity=f"maps-{model}",
        title="Redundancy maps",
        summary=f"{len(tasks)} by {len(kinds)} heat maps of block distance for {model}",
        caption=caption,
        views=views,
        controls=[Control("pool", "Tokens", list(views))],
    )


def _map_view(
    measured: ModelMaps,
    kinds: Sequence[tuple[str | None, str, bool]],
    tasks: Sequence[tuple[str, str, str | None]],
    hole: Callable[..., str],
) -> dict[str, Any]:
    layers = measured.layers
    inner = [table[1:, 1:] for table in measured.distances.values()]
    top = max((float(np.nanmax(t)) for t in inner if np.isfinite(t).any()), default=1.0)
    height = 148 * len(tasks) + 96
    unit = height - 96
    data: list[dict[str, Any]] = []
    shape = layout(
        height,
        margin={"l": 48 + 8 * max(len(task_label(*t)) for t in tasks), "r": 70, "t": 44, "b": 52},
        annotations=[],
    )
    shape["coloraxis"] = {
        "colorscale": "Cividis", "cmin": 0, "cmax": round(top, 4),
        "colorbar": {
            "thickness": 10, "len": min(1.0, 296 / unit), "y": 1, "yanchor": "top", "x": 1.01,
            "outlinewidth": 0, "title": {"text": "distance", "side": "right"},
        },
    }  # fmt: skip
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
            shape[x_name] = {
                "domain": [left, right], "anchor": y, "range": [-0.5, layers - 0.5], "dtick":
                _tick(layers), "tick0": 0, "showgrid": False, "zeroline": False, "fixedrange": True,
                "ticks": "", "showticklabels": lowest,
            }  # fmt: skip
            shape[y_name] = {
                "domain": [bottom, top_edge], "anchor": x, "range": [0.5, layers + 0.5],
                "dtick": _tick(layers), "tick0": 0, "showgrid": False, "zeroline": False,
                "fixedrange": True, "ticks": "", "showticklabels": column == 0,
            }  # fmt: skip
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
                data += _heat(table, measured.errors[condition], layers, x, y)
    return {"data": data, "layout": shape}


def _heat(
    table: np.ndarray, errors: np.ndarray, layers: int, x: str, y: str
) -> list[dict[str, Any]]:
    depths = range(1, layers + 1)
    best = [
        (int(np.argmin(table[d, : layers - d + 1])), d)
        for d in depths
        if np.isfinite(table[d, : layers - d + 1]).all()
    ]
    return [
        {
            "type": "heatmap", "xaxis": x, "yaxis": y, "coloraxis": "coloraxis", "y0": 1, "dy": 1,
            "z": [numbers(table[d, : layers - d + 1]) for d in depths],
            "customdata": [numbers(errors[d, : layers - d + 1]) for d in depths],
            "hoverongaps": False,
            "xgap": 0.5, "ygap": 0.5,
            "hovertemplate": "from layer %{x}, %{y} removed<br>distance %{z:.4f} ± %{customdata:.4f}"
            "<extra></extra>",
        },
        {
            "type": "scatter", "mode": "markers", "xaxis": x, "yaxis": y, "hoverinfo": "skip",
            "x": [start for start, _ in best], "y": [depth for _, depth in best],
            "marker": {"size": 4, "color": "#fff", "line": {"width": 1, "color": "#222"}},
        },
    ]  # fmt: skip


def _hole_note(reason: str, x: float, y: float) -> dict[str, Any]:
    words = textwrap.wrap(reason, 24, max_lines=4, placeholder=" …")
    return panel_title(
        "<br>".join(["<b>no map</b>", *map(plain, words)]), x, y, yanchor="middle",
        hovertext=plain(reason), font={"size": 10},
    )  # fmt: skip


def _tick(layers: int) -> int:
    return next(step for step in (1, 2, 4, 8, 16, 32, 64) if layers / step <= 6 or step == 64)


def strip_figure(
    model: str, maps: pd.DataFrame, consensus: pd.DataFrame, pool: str, depths: Sequence[int]
) -> Figure | None:
    """Where each condition's best block lies, a panel a depth, with the shared block behind."""
    measured = model_maps(maps[maps["model"] == model], pool).get(model)
    if measured is None or not measured.distances:
        return None
    blocks = chosen_blocks(maps[maps["model"] == model], depths, pool)
    blocks["label"] = [
        plain(MapCondition(*key).label)
        for key in blocks[list(MapCondition._fields)]
        .replace({np.nan: None})
        .itertuples(index=False)
    ]
    order = sorted(measured.distances, key=_from_the_top, reverse=True)
    labels = [plain(c.label) for c in order]
    shown = [d for d in depths if 1 <= d <= measured.layers]
    per_row = min(4, max(1, len(shown)))
    bands = math.ceil(len(shown) / per_row)
    band_height = max(120, 17 * len(labels) + 24)
    height = bands * (band_height + 56) + 40
    shape = layout(height, margin={"l": 236, "r": 12, "t": 48, "b": 44}, barmode="overlay",
                   bargap=0.3, annotations=[], shapes=[])  # fmt: skip
    data: list[dict[str, Any]] = []
    for i, depth in enumerate(shown):
        band, column = divmod(i, per_row)
        left = column / per_row + (0.008 if column else 0)
        right = (column + 1) / per_row - (0.008 if column + 1 < per_row else 0)
        top = 1 - band / bands
        bottom = 1 - (band + 1) / bands + (56 / height if band + 1 < bands else 0)
        (x_name, x), (y_name, y) = axis("x", i), axis("y", i)
        shape[x_name] = {
            "domain": [left, right], "anchor": y, "range": [-0.5, measured.layers - 0.5],
            "tick0": 0, "dtick": _tick(measured.layers), "gridcolor": LINE, "zeroline": False,
            "fixedrange": True, "title": {"text": "layer" if band + 1 == bands else ""},
        }  # fmt: skip
        shape[y_name] = {
            "domain": [bottom, top], "anchor": x, "type": "category", "categoryorder": "array",
            "categoryarray": labels, "range": [-0.6, len(labels) - 0.4], "fixedrange": True,
            "showticklabels": column == 0, "gridcolor": LINE, "tickfont": {"size": 11},
        }  # fmt: skip
        title = f"<b>{depth} of {measured.layers} layers</b>"
        row = consensus[
            (consensus["model"] == model)
            & (consensus["depth"] == depth)
            & (consensus["scope"] == "all")
        ]
        if len(row) and pd.notna(row["block_start"].iloc[0]):
            start = int(row["block_start"].iloc[0])
            title += f"<br>shared: {layers_text(start, depth)}"
            shape["shapes"].append({
                "type": "rect", "xref": x, "yref": f"{y} domain", "x0": start - 0.5,
                "x1": start + depth - 0.5, "y0": 0, "y1": 1, "line": {"width": 0},
                "fillcolor": AMBER, "opacity": 0.28, "layer": "below",
            })  # fmt: skip
        shape["annotations"].append(panel_title(title, (left + right) / 2, top, yshift=2))
        data += _bars(blocks[blocks["depth"] == depth], depth, x, y)
    return Figure(
        identity=f"strip-{model}",
        title="Chosen block by condition",
        summary=f"Best block of each condition over the layers of {model}, a panel a depth",
        caption=(
            "Each bar is the block its own map would remove: blue for ASR, green for translation "
            "(hollow: on text). The amber band is the block that all speech conditions share at the "
            "smallest largest regret. Hover for near-ties."
        ),
        views={"": {"data": data, "layout": shape}},
    )


def _from_the_top(condition: MapCondition) -> tuple[object, ...]:
    """Speech above text, ASR above translation, encoders side by side."""
    names = (condition.task, condition.source_language, condition.target_language or "")
    return (not condition.adapted, condition.modality != "speech", *names, condition.encoder or "")


def _bars(blocks: pd.DataFrame, depth: int, x: str, y: str) -> list[dict[str, Any]]:
    speech, tasks = list(blocks["modality"] == "speech"), list(blocks["task"])
    hover = []
    for start, distance, ties in zip(
        blocks["block_start"], blocks["distance"], blocks["near_ties"], strict=True
    ):
        near = ", ".join(f"{s}–{s + depth - 1}" for s in ties[:6]) or "none"
        more = "" if len(ties) <= 6 else f" and {len(ties) - 6} more"
        hover.append(
            f"{layers_text(start, depth)}: distance {distance:.4f}<br>near-ties: {near}{more}"
        )
    return [{
        "type": "bar", "orientation": "h", "xaxis": x, "yaxis": y,
        "y": list(blocks["label"]), "x": [depth] * len(blocks),
        "base": [int(start) - 0.5 for start in blocks["block_start"]],
        "marker": {
            "color": [_FILL[task == "ast", s] for task, s in zip(tasks, speech, strict=True)],
            "line": {"width": 1, "color": [GREEN if t == "ast" else ACCENT for t in tasks]},
        },
        "customdata": hover, "hovertemplate": "%{y}<br>%{customdata}<extra></extra>",
    }]  # fmt: skip


def frequency_figure(
    model: str, maps: pd.DataFrame, pool: str, depths: Sequence[int]
) -> Figure | None:
    """How often each layer falls in a chosen block, beside chance."""
    frequency = layer_frequency(maps[maps["model"] == model], pool, depths)
    if frequency.empty:
        return None
    layers = len(frequency)
    chance = chance_frequency(layers, depths)
    shape = layout(
        260,
        xaxis={"title": {"text": "layer"}, "dtick": _tick(layers) if layers > 16 else 1,
               "fixedrange": True, "showgrid": False, "zeroline": False},
        yaxis={"title": {"text": "share of chosen blocks"}, "tickformat": ".0%", "rangemode":
               "tozero", "gridcolor": LINE, "fixedrange": True, "zeroline": False},
        margin={"l": 64, "r": 16, "t": 16, "b": 44},
    )  # fmt: skip
    data = [
        {
            "type": "bar", "x": list(range(layers)), "y": numbers(frequency["frequency"]),
            "marker": {"color": ACCENT}, "name": "chosen",
            "hovertemplate": "layer %{x}: %{y:.0%}<extra></extra>",
        },
        {
            "type": "scatter", "mode": "lines", "x": list(range(layers)), "y": numbers(chance),
            "line": {"color": ORANGE, "dash": "dot", "width": 2, "shape": "hvh"}, "name": "chance",
            "hovertemplate": "by chance: %{y:.0%}<extra></extra>",
        },
    ]  # fmt: skip
    listed = ", ".join(str(d) for d in depths if 1 <= d <= layers)
    return Figure(
        identity=f"frequency-{model}",
        title="Layer frequency",
        summary=f"Share of chosen blocks that hold each layer of {model}",
        caption=f"Over all speech conditions and depths {listed}. Dotted: blocks placed at random.",
        views={"": {"data": data, "layout": shape}},
    )
