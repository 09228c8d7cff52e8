"""Two maps beside each other on the page, with their difference: text and speech, before and after.

One figure per scope that is made of such pairs; what it says of a pair is `compare`'s.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from orchestrator.compare import Comparison, compare, summary_lines
from orchestrator.consensus import MapCondition, ModelMaps, scope_pairs
from orchestrator.mapgrid import MapGrid
from orchestrator.report.figures import (
    MOST_NUMBERS,
    Control,
    Figure,
    axis,
    layout,
    panel_title,
    plain,
)
from orchestrator.report.heatmaps import (
    SCALE,
    Choice,
    allotted,
    best_marks,
    colour_axis,
    depth_axis,
    drawn_depths,
    heat,
    map_controls,
    start_axis,
    thinned,
)
from orchestrator.shades import difference_limits, shade_limits
from workers.errors import InvalidInput

DIVERGING = [[0, "#542788"], [0.25, "#998ec3"], [0.5, "#f7f7f7"], [0.75, "#f1a340"], [1, "#b35806"]]
"""Purple to orange by way of white, which any colour vision tells apart."""


class Scope(NamedTuple):
    """Pairs of maps that a figure shows."""

    name: str
    """As in the consensus table."""
    title: str
    names: tuple[str, str]
    """What to call the first and the second map."""


PAIRED = (
    Scope("modalities", "Text beside speech", ("text", "speech")),
    Scope("adapted", "Before beside after adapting", ("before", "after")),
)


def pair_figure(
    model: str,
    scope: Scope,
    measured: Mapping[Choice, ModelMaps],
    depths: Sequence[int],
    most: int = MOST_NUMBERS,
) -> Figure | None:
    """A pair of maps at a time: both on one colour scale, the second less the first, and in words.

    Args:
        model: its name.
        scope: which pairs.
        measured: its maps (`heatmaps.measured_maps`), the one shown first at the front.
        depths: what the agreement of best blocks is over; depths not measured are passed over, and
            it is over all where none is left.
        most: values the figure may hold (see `heatmaps.allotted`).
    """
    found: dict[Choice, dict[str, Comparison]] = {}
    for choice, maps in measured.items():
        if pairs := _comparisons(scope, maps, *choice, depths):
            found[choice] = pairs
    if not found:
        return None
    costs = {
        choice: 3 * sum(int(np.isfinite(pair.difference).sum()) for pair in pairs.values())
        for choice, pairs in found.items()
    }
    every, shown = allotted(costs, next(iter(measured.values())).layers, most)
    views = {
        f"{label}|{criterion}|{name}": _view(comparison, scope.names, every)
        for criterion, name in shown
        for label, comparison in found[criterion, name].items()
    }
    labels = list(dict.fromkeys(key.rsplit("|", 2)[0] for key in views))
    return Figure(
        identity=f"{scope.name}-{model}",
        title=scope.title,
        summary=f"Maps of {model} {scope.names[0]} and {scope.names[1]}, and their difference",
        caption=(
            "Both maps on one scale, and the second less the first, centred on 0; dots mark the best "
            "block of each depth. The scales end with the blocks that leave layer 0 in place. For "
            "the correlation each depth is centred on its mean; contrast is how sharply the second "
            "tells blocks of one depth apart, over how sharply the first does."
            + thinned(every, len(found) - len(shown))
        ),
        views=views,
        controls=[Control("pair", "Condition", labels), *map_controls(views)],
    )


def _comparisons(
    scope: Scope, measured: ModelMaps, criterion: str, pool: str, depths: Sequence[int]
) -> dict[str, Comparison]:
    found = {}
    for pair in scope_pairs(scope.name, list(measured.distances))[1]:
        first, second = sorted(pair, key=lambda c: (c.adapted, c.modality != "text"))
        a, b = (
            MapGrid(criterion, pool, measured.layers, measured.distances[condition])
            for condition in (first, second)
        )
        whole = [d for d in depths if a.row(d) is not None and b.row(d) is not None]
        try:
            found[_label(scope, second)] = compare(a, b, whole)
        except InvalidInput:  # no depth that both have whole: nothing to show of this pair
            continue
    return dict(sorted(found.items()))


def _label(scope: Scope, second: MapCondition) -> str:
    work = "-".join(p for p in second[1:4] if p)
    kind = second.modality if scope.name == "adapted" else ""
    return " · ".join(part for part in (work, kind, second.encoder) if part)


def _view(found: Comparison, names: tuple[str, str], every: int) -> dict[str, Any]:
    criterion, layers = found.a.criterion, found.a.layers
    depths = drawn_depths([found.a.distances, found.b.distances], every)
    limits = shade_limits([found.a.distances, found.b.distances])
    shape = layout(
        450, margin={"l": 52, "r": 78, "t": 30, "b": 128}, annotations=[],
        coloraxis=colour_axis(criterion, limits, SCALE, x=0.57),
        coloraxis2=colour_axis(criterion, difference_limits(found.difference), DIVERGING, x=1.005),
    )  # fmt: skip
    for name in ("coloraxis", "coloraxis2"):
        shape[name]["colorbar"]["title"]["font"] = {"size": 11}
    panels = [
        (found.a.distances, names[0], (0, 0.27), "coloraxis"),
        (found.b.distances, names[1], (0.295, 0.565), "coloraxis"),
        (found.difference, f"{names[1]} − {names[0]}", (0.725, 0.995), "coloraxis2"),
    ]
    data = []
    for index, (table, title, domain, colours) in enumerate(panels):
        (x_name, x), (y_name, y) = axis("x", index), axis("y", index)
        shape[x_name] = start_axis(layers, domain, y)
        shape[y_name] = depth_axis(depths, (0, 1), x) | {"showticklabels": index != 1}
        middle = sum(domain) / 2
        shape["annotations"].append(panel_title(f"<b>{plain(title)}</b>", middle, 1, yshift=4))
        shape["annotations"].append(panel_title("first layer removed", middle, 0, yshift=-38))
        data.append(heat(table, None, criterion, depths, x, y, colours))
        if colours == "coloraxis":
            data.append(best_marks(table, depths, x, y))
        else:
            data[-1]["hovertemplate"] = data[-1]["hovertemplate"].replace("<br>", "<br>change: ")
    shape["yaxis"]["title"] = {"text": "layers removed", "standoff": 4}
    text = "<br>".join(plain(line) for line in summary_lines(found, names))
    shape["annotations"].append(
        panel_title(text, 0, 0, xanchor="left", yanchor="top", yshift=-52, align="left")
    )
    return {"data": data, "layout": shape}
