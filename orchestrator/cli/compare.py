"""The command that holds two maps side by side, in figures and as a picture."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from orchestrator.cli.options import AsJson, app, console, print_json

if TYPE_CHECKING:
    from orchestrator.compare import Comparison

_MAP = "A map: map.parquet of one map, or the folder it lies in."


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="MAP", help=_MAP)],
    second: Annotated[Path, typer.Argument(metavar="MAP", help="The map to hold beside it.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PICTURE",
            help="Draw both and their difference: .png, .svg or .pdf.",
        ),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(help="Token pool; without it all, or the only one both have."),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="Criterion; without it angular, or the only one both have."),
    ] = None,
    depth: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=1, help="Tell about this depth only; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two maps of equally many layers: text and speech, before and after adapting."""
    from orchestrator.compare import common_choice
    from orchestrator.compare import compare as compared
    from orchestrator.mapgrid import map_grid, read_map

    if out is not None:
        from orchestrator.pictures import check_picture

        check_picture(out)
    tables = read_map(first), read_map(second)
    chosen = common_choice(*tables, criterion, pool)
    a, b = (map_grid(table, *chosen) for table in tables)
    found = compared(a, b, depth or ())
    names = distinct_names(first, second)
    if out is not None:
        from orchestrator.pictures import draw_comparison

        draw_comparison(found, out, names)
    if as_json:
        print_json(_plain(found, names, out))
    else:
        _show(found, names)
        if out is not None:
            print(f"Picture: {out}")


def distinct_names(first: Path, second: Path) -> tuple[str, str]:
    """What to call two maps: the innermost part in which their paths differ, else A and B."""
    from orchestrator.mapgrid import FILE

    parts = []
    for path in (first.absolute(), second.absolute()):
        place = path.parent if path.name == FILE else path
        name = place.name.removesuffix(".parquet")
        parts.append((name, *reversed(place.parent.parts)))
    return next(((one, two) for one, two in zip(*parts, strict=False) if one != two), ("A", "B"))


def _plain(found: "Comparison", names: tuple[str, str], out: Path | None) -> dict[str, Any]:
    return {
        "a": names[0],
        "b": names[1],
        "criterion": found.a.criterion,
        "pool": found.a.pool,
        "layers": found.a.layers,
        "samples_a": found.a.samples,
        "samples_b": found.b.samples,
        "correlation": found.correlation,
        "correlation_without_layer_0": found.correlation_without_layer_0,
        "mean_difference": found.mean_difference,
        "contrast": found.contrast,
        "contrast_without_layer_0": found.contrast_without_layer_0,
        "jaccard": found.jaccard,
        "jaccard_by_chance": found.jaccard_by_chance,
        "depths": [asdict(depth) for depth in found.depths],
        "picture": None if out is None else str(out),
    }


def _show(found: "Comparison", names: tuple[str, str]) -> None:
    from orchestrator.compare import span, summary_lines
    from orchestrator.mapgrid import wording

    def figure(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    name, unit = wording(found.a.criterion)
    out = console()
    out.print(f"{name} ({unit}) in pool {found.a.pool}, {found.a.layers} layers", markup=False)
    for letter, label, grid in zip("AB", names, (found.a, found.b), strict=True):
        samples = "" if grid.samples is None else f" ({grid.samples} samples)"
        out.print(f"{letter} = {label}{samples}", markup=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("depth", justify="right")
    table.add_column("best A")
    table.add_column("best B")
    for column in ("Jaccard", "chance", "Spearman", "w/o layer 0", "A loses", "B loses"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.depths:
        table.add_row(
            str(row.depth),
            span(row.start_a, row.depth),
            span(row.start_b, row.depth),
            figure(row.jaccard),
            figure(row.jaccard_by_chance),
            figure(row.spearman),
            figure(row.spearman_without_layer_0),
            figure(row.regret_a, 4),
            figure(row.regret_b, 4),
        )
    out.print(table)
    out.print("A loses: what A's distance grows by if it takes B's best block; B loses: likewise")
    for line in summary_lines(found, ("A", "B")):
        out.print(line, markup=False)
