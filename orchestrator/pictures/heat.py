"""Maps as heat maps of start by depth: those of one table, and two beside their difference.

What is drawn is computed in `mapgrid` and `compare`; here are colours and places.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from orchestrator.compare import Comparison, DepthComparison, span, summary_lines
from orchestrator.consensus import Floats
from orchestrator.mapgrid import DAMAGE, MapGrid, wording
from orchestrator.pictures.drawing import check_picture, new_figure, save, styled, whole_ticks
from orchestrator.shades import (
    DAMAGE_WIDTH,
    Limits,
    damage_ticks,
    difference_limits,
    shade_limits,
)
from workers.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

MAP_COLOURS = "cividis"
"""Dark is redundant. Perceptually even, and the same with any colour vision."""
DIFFERENCE_COLOURS = "PuOr_r"


@styled
def draw_maps(grids: Sequence[MapGrid], out: Path, title: str = "") -> Path:
    """Heat maps of start by depth, a panel a map, the best block of each depth marked.

    Args:
        grids: maps of one decoder; those of one criterion share a colour scale.
        out: the file; its suffix says the format.
        title: such as the model and the condition.

    Raises:
        InvalidInput: nothing to draw, or nowhere to draw it.
    """
    if not grids:
        raise InvalidInput("no map to draw", str(out))
    check_picture(out)
    criteria = list(dict.fromkeys(grid.criterion for grid in grids))
    rows: list[list[MapGrid]] = []
    for criterion in criteria:
        of_criterion = [grid for grid in grids if grid.criterion == criterion]
        wide = len(of_criterion) if len(criteria) > 1 else 3
        rows += [of_criterion[i : i + wide] for i in range(0, len(of_criterion), wide)]
    columns = max(map(len, rows))
    size = (6.4, 5.2) if len(grids) == 1 else (3.6 * columns + 1.2, 3.3 * len(rows) + 0.4)
    figure = new_figure(size, title)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, line in enumerate(rows):
        limits = shade_limits([g.distances for g in grids if g.criterion == line[0].criterion])
        for column in range(columns):
            if column >= len(line):
                axes[row, column].set_axis_off()
                continue
            _heat(axes[row, column], line[column], limits, label_depth=column == 0)
        _bar(
            figure,
            list(axes[row, : len(line)]),
            line[0].criterion,
            limits,
            makes_room=len(line) == columns,
        )
    return save(figure, out)


@styled
def draw_comparison(comparison: Comparison, out: Path, names: tuple[str, str]) -> Path:
    """Two maps on one colour scale, their difference, and in words how far they agree.

    Args:
        comparison: what `compare` found.
        out: the file; its suffix says the format.
        names: what to call the two maps, such as `("text", "speech")`.

    Raises:
        InvalidInput: nowhere to draw it.
    """
    check_picture(out)
    a, b = comparison.a, comparison.b
    names = _short(names[0]), _short(names[1])
    figure = new_figure(
        (11.0, 9.0), f"{wording(a.criterion).name}, pool {a.pool}: {names[0]} and {names[1]}"
    )
    axes = figure.subplots(2, 2)
    limits = shade_limits([a.distances, b.distances])
    for place, grid, name in zip(axes[0], (a, b), names, strict=True):
        _heat(place, grid, limits, title=f"{name}{_samples(grid)}")
    _bar(figure, list(axes[0]), a.criterion, limits)
    _difference(figure, axes[1, 0], comparison, names)
    _words(axes[1, 1], comparison, names)
    return save(figure, out)


def _heat(
    place: "Axes", grid: MapGrid, limits: Limits, title: str = "", label_depth: bool = True
) -> None:
    _triangle(place, grid.distances, MAP_COLOURS, _norm(grid.criterion, limits))
    best = grid.best
    place.scatter(
        list(best.values()), list(best), s=_mark(grid.layers), color="white",
        edgecolors="black", linewidths=0.7, zorder=3, clip_on=False,
    )  # fmt: skip
    place.set_title(title or f"{wording(grid.criterion).name}, pool {grid.pool}{_samples(grid)}")
    if not label_depth:
        place.set_ylabel("")


def _triangle(place: "Axes", values: Floats, colours: str, norm: "Normalize") -> None:
    layers = values.shape[1]
    place.pcolormesh(
        np.arange(layers + 1) - 0.5, np.arange(layers + 1) + 0.5,
        np.ma.masked_invalid(values[1:]), cmap=colours, norm=norm, rasterized=True,
    )  # fmt: skip
    place.set_aspect("equal")
    place.set(xlabel="first layer removed", ylabel="layers removed")
    whole_ticks(place.xaxis)
    whole_ticks(place.yaxis)


def _norm(criterion: str, limits: Limits) -> "Normalize":
    from matplotlib.colors import AsinhNorm, Normalize

    if criterion == DAMAGE:
        return AsinhNorm(DAMAGE_WIDTH, limits.low, limits.high)
    return Normalize(limits.low, limits.high)


def _bar(
    figure: "Figure",
    places: Sequence["Axes"],
    criterion: str,
    limits: Limits,
    colours: str = MAP_COLOURS,
    end: Literal["max", "both"] = "max",
    makes_room: bool = True,
) -> None:
    """A colour bar beside the last of some panels.

    One that ends a short row lies over an empty panel, and must not push the columns apart: it
    makes no room.
    """
    from matplotlib.cm import ScalarMappable

    beside = places[-1].inset_axes((1.03, 0, 0.045, 1))
    beside.set_in_layout(makes_room)
    bar = figure.colorbar(
        ScalarMappable(_norm(criterion, limits), colours), cax=beside,
        extend=end if limits.clipped else "neither", label=wording(criterion).unit,
    )  # fmt: skip
    bar.outline.set_visible(False)
    if criterion == DAMAGE and len(ticks := damage_ticks(limits)) > 2:
        bar.set_ticks(ticks, labels=[f"{tick:g}".replace("-", "−") for tick in ticks])
        bar.minorticks_off()


def _difference(
    figure: "Figure", place: "Axes", comparison: Comparison, names: tuple[str, str]
) -> None:
    limits = difference_limits(comparison.difference)
    criterion = comparison.a.criterion
    _triangle(place, comparison.difference, DIFFERENCE_COLOURS, _norm(criterion, limits))
    place.set_title(f"{names[1]} − {names[0]}")
    place.set_facecolor("#eeeeee")
    _bar(figure, [place], criterion, limits, DIFFERENCE_COLOURS, "both")


def _words(place: "Axes", comparison: Comparison, names: tuple[str, str]) -> None:
    from matplotlib.transforms import Bbox

    place.set_axis_off()
    lines = [
        textwrap.fill(line, 58, subsequent_indent="    ")
        for line in summary_lines(comparison, names)
    ]
    place.text(0, 1, "\n".join(lines), va="top", linespacing=1.5)
    shown = _spread(comparison.depths, 9)
    table = place.table(
        [
            [str(d.depth), span(d.start_a, d.depth), span(d.start_b, d.depth), f"{d.jaccard:.2f}"]
            for d in shown
        ],
        colLabels=["depth", *names, "Jaccard"],
        cellLoc="center", edges="B", bbox=Bbox.from_bounds(0, 0, 1, 0.62),
    )  # fmt: skip
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for cell in table.get_celld().values():
        cell.set_edgecolor("#cccccc")


def _spread(depths: Sequence[DepthComparison], most: int) -> list[DepthComparison]:
    """At most so many of them, the first and the last among them, evenly apart."""
    chosen = np.linspace(0, len(depths) - 1, min(most, len(depths))).round().astype(int)
    return [depths[i] for i in chosen]


def _short(name: str) -> str:
    return name if len(name) <= 20 else name[:19] + "…"


def _samples(grid: MapGrid) -> str:
    return "" if grid.samples is None else f", {grid.samples} samples"


def _mark(layers: int) -> float:
    """Area of a best block's mark in square points, to fit a cell of a panel some 3 inches wide."""
    return max(3.0, min(30.0, (150 / layers) ** 2))
