"""`layersweep prune`: one model, some layers fewer, into a folder that opens as before."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from orchestrator.cli.options import (
    AsJson,
    ModelReference,
    Revision,
    TrustRemoteCode,
    app,
    console,
    print_json,
)

if TYPE_CHECKING:
    from workers.surgery.prune import PruneReport


@app.command()
def prune(
    model: ModelReference,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to; a new or empty folder.")],
    start: Annotated[int | None, typer.Option(min=0, help="First layer of the block.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Layers in the block.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="3,7-9", help="The layers by number, from 0; in place of a block."),
    ] = None,
    revision: Revision = None,
    dtype: Annotated[
        str,
        typer.Option(help="Of the weights written: auto (as stored), float32, bfloat16, float16."),
    ] = "auto",
    streamed: Annotated[
        bool | None,
        typer.Option(
            "--streamed/--in-memory",
            help="Copy from file to file, or open the model; default: the first wherever it is possible.",
        ),
    ] = None,
    merge_adapter: Annotated[
        bool, typer.Option("--merge-adapter", help="Merge an adapter into the model first.")
    ] = False,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="stored|full",
            help="Compare what was written, or run it too; default: full if the model is in memory.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Remove decoder layers from a model, check the result, and save it as a folder that opens as before."""
    chosen = parse_layers(start, depth, layers)
    from workers.surgery.prune import PruneSettings
    from workers.surgery.prune import prune as run_prune

    settings = PruneSettings(
        revision=revision,
        dtype=dtype,
        streamed=streamed,
        merge_adapter=merge_adapter,
        check=check,  # type: ignore[arg-type]
        trust_remote_code=trust_remote_code,
    )
    with _telling() as step:
        report = run_prune(model, chosen, out, settings, step)
    if as_json:
        print_json(asdict(report))
    else:
        _show(report, console())


def parse_layers(start: int | None, depth: int | None, layers: str | None) -> list[int]:
    """The layers that `--start` with `--depth`, or `--layers`, name.

    Raises:
        InvalidInput: neither, both, half of a block, or no list of numbers.
    """
    from workers.errors import InvalidInput

    block = start is not None or depth is not None
    if block == (layers is not None):
        raise InvalidInput(
            "name the layers either as a block or one by one",
            "--layers" if block else "prune",
            "use --start 8 --depth 4, or --layers 3,7-9",
        )
    if layers is None:
        if start is None or depth is None:
            missing = "--start" if start is None else "--depth"
            raise InvalidInput("a block has a start and a depth", missing, f"add {missing}")
        return list(range(start, start + depth))
    chosen: list[int] = []
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        last = int(match[2] or match[1]) if match else -1
        if not match or last < int(match[1]):
            raise InvalidInput(
                f"{part.strip()!r} is neither a number nor a range",
                "--layers",
                "write numbers and ranges with commas between them, such as 3,7-9",
            )
        chosen += range(int(match[1]), last + 1)
    return chosen


@contextmanager
def _telling() -> Iterator[Callable[[str, int, int], None]]:
    """What is being done: a bar on a terminal, elsewhere a line a step; on standard error."""
    if not sys.stderr.isatty():
        yield _Lines().tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(
            task, description=what, completed=done, total=total or None
        )


class _Lines:
    """A line when a step begins, and one every ten seconds of it."""

    def __init__(self) -> None:
        self.what, self.last = "", 0.0

    def tell(self, what: str, done: int, total: int) -> None:
        """Print what is new."""
        now = time.monotonic()
        if what == self.what and (not total or now - self.last < 10):
            return
        share = f": {done / total:.0%}" if what == self.what else ""
        print(f"{what}{share}", file=sys.stderr, flush=True)
        self.what, self.last = what, now


def _show(report: "PruneReport", out: Console) -> None:
    from orchestrator.compare import spans

    before, after = report.layers
    out.print(
        f"Removed layers {spans(report.removed)} of {before} "
        f"({100 * (before - after) / before:.0f} %) from {report.source}",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for name in ("", "before", "after", "less"):
        table.add_column(name, justify="right" if name else "left")
    rows: tuple[tuple[str, tuple[int, int], Callable[[int], str]], ...] = (
        ("layers", report.layers, str),
        ("parameters", report.parameters, lambda n: f"{n:,}"),
        ("weights", report.weight_bytes, _in_units(report.weight_bytes[0])),
    )
    for name, pair, text in rows:
        table.add_row(name, text(pair[0]), text(pair[1]), f"{100 * (1 - pair[1] / pair[0]):.1f} %")
    out.print(table)
    if report.in_memory_because:
        out.print(f"In memory, as streaming was not safe: {report.in_memory_because}", markup=False)
    for check in report.checks:
        out.print(f"ok    {check}", markup=False)
    if report.left_out:
        out.print(f"Not taken along: {', '.join(report.left_out)}", markup=False)
    if report.adapter:
        out.print(f"Adapter: {report.adapter}", markup=False)
    out.print(f"Pruned model: {report.out}", markup=False)


def _in_units(largest: int) -> Callable[[int], str]:
    """Writes bytes in the unit that suits the largest of them."""
    size, unit = next(
        (pair for pair in ((1e9, "GB"), (1e6, "MB")) if largest >= pair[0]), (1e3, "kB")
    )
    return lambda count: f"{count / size:.2f} {unit}"
