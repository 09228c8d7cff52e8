"""Scores against depth as a figure: a line a healing mode, the control, and holes shown as holes."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from orchestrator.report.figures import (
    ACCENT,
    AMBER,
    GREEN,
    GREY,
    LINE,
    ORANGE,
    PINK,
    Control,
    Figure,
    axis,
    layout,
    numbers,
    panel_title,
    plain,
)  # fmt: skip
from orchestrator.report.scores import (
    HIGHER_IS_BETTER,
    Cell,
    mean_score,
    metric_name,
    of_selector,
    records,
    selectors,
)
from orchestrator.report.verdict import percent, points

_STYLES = {
    "none": (ORANGE, "x", "solid"),
    "patch": (PINK, "diamond", "dashdot"),
    "projector": (AMBER, "triangle-up", "dash"),
    "decoder": (ACCENT, "square", "solid"),
    "joint": (GREEN, "circle", "solid"),
}
_MEAN = "mean over all conditions"


def curve_figure(model: str, cells: pd.DataFrame, tolerance: float) -> Figure | None:
    """Score against number of layers removed for one model.

    A mean is taken over conditions scored at every (depth, mode) drawn, so that all its points
    speak of the same ones; a point for which fewer than half are scored is a hole, marked at the
    foot of its panel.

    Args:
        model: its name in the tables.
        cells: primary cells (`scores.primary_cells`).
        tolerance: points the control may be missed by.
    """
    of_model = cells[cells["model"] == model]
    names = selectors(of_model)
    if not names or not of_model["scored"].any():
        return None
    encoders = sorted(of_model["encoder"].dropna().unique())
    pairs = (
        of_model[["encoder", "condition"]].drop_duplicates().sort_values(["encoder", "condition"])
    )
    choices: list[tuple[str, pd.Series]] = [(_MEAN, pd.Series(True, index=of_model.index))]
    if len(encoders) > 1:
        choices += [(f"mean, {e}", of_model["encoder"] == e) for e in encoders]
    if len(pairs) > 1:
        choices += [
            (
                f"{encoder} · {condition}",
                (of_model["encoder"] == encoder) & (of_model["condition"] == condition),
            )
            for encoder, condition in pairs.itertuples(index=False)
        ]
    views = {}
    for selector in names:
        rows = of_selector(of_model, selector)
        for label, chosen in choices:
            view = _view(rows[chosen.loc[rows.index]], tolerance)
            if view is not None:
                views[f"{selector}|{label}"] = view
    return Figure(
        identity=f"curves-{model}",
        title="WER and BLEU against layers removed",
        summary=f"WER and BLEU of {model} against layers removed, a line a healing mode",
        caption=(
            "Bars are 95 % intervals over test utterances, averaged over seeds (smaller marks: "
            "single seeds). Dotted lines: the unpruned control under the same healing; the grey "
            f"band lies within {points(tolerance)} of the best control. ✕ at the foot: no score; "
            "hover for the reason."
        ),
        views=views,
        controls=[
            Control("selector", "Block chosen by", names),
            Control("view", "Show", [label for label, _ in choices]),
        ],
    )


def _view(rows: pd.DataFrame, tolerance: float) -> dict[str, Any] | None:
    cells: dict[tuple[str, bool], list[Cell]] = defaultdict(list)
    for cell in records(rows):
        cells[cell.metric, bool(cell.in_domain)].append(cell)
    panels = [
        (metric, in_domain)
        for metric in sorted(
            {metric for metric, _ in cells}, key=lambda m: (m in HIGHER_IS_BETTER, m)
        )
        for in_domain in (True, False)
        if (metric, in_domain) in cells
    ]
    if not panels:
        return None
    metrics = list(dict.fromkeys(metric for metric, _ in panels))
    columns = [flag for flag in (True, False) if any(panel[1] == flag for panel in panels)]
    height = 270 * len(metrics) + 90
    shape = layout(
        height, margin={"l": 60, "r": 16, "t": 64, "b": 56}, annotations=[], shapes=[],
        showlegend=True, legend={"orientation": "h", "x": 0, "y": 1 + 40 / (height - 120),
                                 "yanchor": "bottom", "font": {"size": 12}},
    )  # fmt: skip
    data: list[dict[str, Any]] = []
    depths = sorted(int(d) for d in rows["depth"].dropna().unique())
    layers = rows["layers"].max()
    heals = sorted(rows["heal"].dropna().unique(), key=_heal_order)
    named: set[str] = set()
    for index, (metric, in_domain) in enumerate(panels):
        row, column = metrics.index(metric), columns.index(in_domain)
        left = column / len(columns) + (0.035 if column else 0)
        right = (column + 1) / len(columns) - (0.015 if column + 1 < len(columns) else 0)
        bottom = 1 - (row + 1) / len(metrics) + (0.14 if row + 1 < len(metrics) else 0)
        top = 1 - row / len(metrics)
        (x_name, x), (y_name, y) = axis("x", index), axis("y", index)
        shape[x_name] = {
            "domain": [left, right], "anchor": y, "tickvals": depths,
            "ticktext": [_depth_text(d, layers) for d in depths], "showgrid": False,
            "zeroline": False, "fixedrange": True, "range": [depths[0] - 0.4, depths[-1] + 0.4],
            "title": {"text": "layers removed" if row + 1 == len(metrics) else "", "standoff": 4},
        }  # fmt: skip
        shape[y_name] = {
            "domain": [bottom, top], "anchor": x, "gridcolor": LINE, "zeroline": False,
            "fixedrange": True, "rangemode": "tozero" if metric not in HIGHER_IS_BETTER else "normal",
            "title": {"text": metric_name(metric) + " (%)", "standoff": 4},
        }  # fmt: skip
        of_panel = cells[metric, in_domain]
        complete, expected = _complete_units(of_panel)
        where = "in domain" if in_domain else "out of domain"
        note = "" if len(complete) == expected else f", {len(complete)} of {expected} conditions"
        title = f"<b>{metric_name(metric)}, {where}</b>{note}"
        shape["annotations"].append(panel_title(title, (left + right) / 2, top, yshift=4))
        controls = []
        for place, heal in enumerate(heals):
            offset = (place - (len(heals) - 1) / 2) * 0.05 * max(1, depths[-1] / 6)
            of_heal = [cell for cell in of_panel if cell.heal == heal]
            line = _line(of_heal, complete, depths, offset, heal, x, y)
            holes = line.pop("holes")
            line["showlegend"] = heal not in named
            named.add(heal)
            data.append(line)
            data += _seeds(of_heal, complete, offset, heal, x, y)
            if depths[0] == 0 and line["y"] and line["y"][0] is not None:
                controls.append(line["y"][0])
                data.append(_control(line["y"][0], depths, heal, x, y))
            shape["annotations"] += [
                {
                    "text": "✕", "x": depth + offset, "xref": x, "y": 0.03, "yref": f"{y} domain",
                    "showarrow": False, "hovertext": plain(f"{heal}, depth {depth}: {reason}"),
                    "captureevents": True, "font": {"size": 12},
                    "opacity": 0.9,
                }
                for depth, reason in holes
            ]  # fmt: skip
        if controls:
            shape["shapes"].append(_tolerance_band(controls, metric, tolerance, x, y))
    return {"data": data, "layout": shape}


def _complete_units(cells: Sequence[Cell]) -> tuple[set[str], int]:
    """Units scored at each (depth, mode) where at least half of them are, and how many there are."""
    expected = len({cell.unit for cell in cells})
    scored: dict[tuple[int, str], set[str]] = defaultdict(set)
    for cell in cells:
        if cell.scored:
            scored[cell.depth, cell.heal].add(cell.unit)
    enough = [units for units in scored.values() if 2 * len(units) >= expected]
    return (set.intersection(*enough) if enough else set()), expected


def _line(
    cells: Sequence[Cell],
    complete: set[str],
    depths: Sequence[int],
    offset: float,
    heal: str,
    x: str,
    y: str,
) -> dict[str, Any]:
    colour, symbol, dash = _STYLES.get(heal, (GREY, "circle", "solid"))
    values, above, below, texts, holes = [], [], [], [], []
    for depth in depths:
        at_depth = [cell for cell in cells if cell.depth == depth]
        scored = [cell for cell in at_depth if cell.scored]
        if not complete or not complete <= {cell.unit for cell in scored}:
            values.append(math.nan)
            above.append(math.nan)
            below.append(math.nan)
            texts.append("")
            if at_depth:
                holes.append((depth, _why(at_depth)))
            continue
        used = [cell for cell in scored if cell.unit in complete]
        score = mean_score(used)
        values.append(score.value)
        above.append(score.high - score.value)
        below.append(score.value - score.low)
        runs = sum(cell.unit in complete for cell in at_depth)
        texts.append(f"{score}<br>{score.units} conditions, {len(used)} of {runs} runs")
    return {
        "type": "scatter", "mode": "lines+markers", "xaxis": x, "yaxis": y, "name": _heal_name(heal),
        "legendgroup": heal, "x": [d + offset for d in depths], "y": numbers(values, 3),
        "error_y": {"type": "data", "symmetric": False, "array": numbers(above, 3),
                    "arrayminus": numbers(below, 3), "thickness": 1.2, "width": 3, "color": colour},
        "line": {"color": colour, "width": 2, "dash": dash},
        "marker": {"color": colour, "symbol": symbol, "size": 8}, "connectgaps": False,
        "customdata": [[d, text] for d, text in zip(depths, texts, strict=True)],
        "hovertemplate": f"{plain(_heal_name(heal))}, depth %{{customdata[0]}}<br>%{{customdata[1]}}"
        "<extra></extra>", "holes": holes,
    }  # fmt: skip


def _seeds(
    cells: Sequence[Cell], complete: set[str], offset: float, heal: str, x: str, y: str
) -> list[dict[str, Any]]:
    runs: dict[tuple[int, int], dict[str, float]] = defaultdict(dict)
    for cell in cells:
        if cell.scored and cell.unit in complete and not pd.isna(cell.seed):
            runs[cell.depth, cell.seed][cell.unit] = cell.value
    points = [(key, fmean(v.values())) for key, v in sorted(runs.items()) if set(v) == complete]
    if len({seed for _, seed in runs}) < 2:
        return []
    colour = _STYLES.get(heal, (GREY, "", ""))[0]
    return [{
        "type": "scatter", "mode": "markers", "xaxis": x, "yaxis": y, "legendgroup": heal,
        "showlegend": False, "x": [float(depth) + offset for (depth, _), _ in points],
        "y": numbers((mean for _, mean in points), 3), "customdata": [int(s) for (_, s), _ in points],
        "marker": {"color": colour, "size": 4, "opacity": 0.6},
        "hovertemplate": "seed %{customdata}: %{y:.1f}<extra></extra>",
    }]  # fmt: skip


def _control(value: float, depths: Sequence[int], heal: str, x: str, y: str) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines", "xaxis": x, "yaxis": y, "legendgroup": heal,
        "showlegend": False, "hoverinfo": "skip", "opacity": 0.7,
        "x": [depths[0] - 0.4, depths[-1] + 0.4], "y": [value, value],
        "line": {"color": _STYLES.get(heal, (GREY, "", ""))[0], "width": 1, "dash": "dot"},
    }  # fmt: skip


def _tolerance_band(
    controls: Sequence[float], metric: str, tolerance: float, x: str, y: str
) -> dict[str, Any]:
    higher = metric in HIGHER_IS_BETTER
    best = max(controls) if higher else min(controls)
    return {
        "type": "rect", "xref": f"{x} domain", "yref": y, "x0": 0, "x1": 1, "y0": best,
        "y1": best - tolerance if higher else best + tolerance, "line": {"width": 0},
        "fillcolor": GREY, "opacity": 0.22, "layer": "below",
    }  # fmt: skip


def _why(cells: Sequence[Cell]) -> str:
    missing = [cell for cell in cells if not cell.scored]
    if not missing:
        return "too few conditions are scored"
    texts = [next((t for t in (c.reason, c.status) if isinstance(t, str)), "") for c in missing]
    reason = Counter(texts).most_common(1)[0][0] or "no score"
    units = len({cell.unit for cell in missing})
    return f"{units} of {len({cell.unit for cell in cells})} without a score: {reason}"


def _heal_order(heal: str) -> tuple[int, str]:
    known = list(_STYLES)
    return (known.index(heal) if heal in known else len(known), heal)


def _heal_name(heal: str) -> str:
    return "not healed" if heal == "none" else f"{heal} healing"


def _depth_text(depth: int, layers: float) -> str:
    return f"{depth}<br>{percent(depth / layers)}" if layers and not pd.isna(layers) else str(depth)
