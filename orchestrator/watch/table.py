"""Drawing a board: rows and depths in whatever width there is, and the stages outside that table.

Marks carry the meaning, colours repeat it. On a terminal that cannot show them, plain letters do.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from orchestrator.watch.board import LABELS, Board, Row, Tally
from orchestrator.watch.words import shortened

STYLES = {
    "done": "green",
    "running": "cyan",
    "waiting": "dim",
    "failed": "bold red",
    "blocked": "yellow",
    "stopped": "magenta",
}
MARKS = {"done": "✓", "running": "▸", "waiting": "·", "failed": "✗", "blocked": "⊘", "stopped": "∎"}
ASCII_MARKS = {
    "done": "#",
    "running": ">",
    "waiting": ".",
    "failed": "X",
    "blocked": "!",
    "stopped": "s",
}
URGENCY = ("running", "failed", "blocked", "stopped", "begun", "waiting", "done")
"""Which rows are shown where not all fit."""
GAP = "  "
LABEL_WIDTHS = (40, 16, 10, 6)
"""Widest label, tried in this order until the table fits."""


@dataclass(frozen=True)
class Pen:
    """What a terminal can show.

    Args:
        width: cells a line.
        ascii_only: whether anything else would come out garbled.
    """

    width: int
    ascii_only: bool = False

    @property
    def gap(self) -> str:
        """Stands for what was left out."""
        return "~" if self.ascii_only else "…"

    def mark(self, state: str) -> str:
        """One cell that stands for a state."""
        return (ASCII_MARKS if self.ascii_only else MARKS)[state]

    def bar(self, done: int, total: int, width: int) -> Text:
        """Progress, `width` cells wide."""
        full = width * done // total if total else width
        on, off = ("#", "-") if self.ascii_only else ("━", "─")
        return Text.assemble((on * full, "green"), (off * (width - full), "dim"))


@dataclass(frozen=True)
class _Way:
    """One way to draw cells, from the roomiest to the tightest."""

    width: int
    """Of a cell, without the gap before it."""
    gap: str
    counts: bool
    """Whether counts stand beside the mark."""


class Table:
    """The rows and depths of a sweep, laid out once for one width.

    Args:
        board: the stages' states; read anew for every drawing.
        pen: the width.
    """

    def __init__(self, board: Board, pen: Pen) -> None:
        self.board, self.pen = board, pen
        rows = board.rows
        if not rows:
            return
        places = [i for i in range(len(LABELS)) if len({row.labels[i] for row in rows}) > 1]
        self._places = places or [len(LABELS) - 1]
        common = [
            f"{LABELS[i]} {rows[0].labels[i]}"
            for i in range(len(LABELS))
            if i not in self._places and rows[0].labels[i]
        ]
        self._common = shortened(", ".join(common), pen.width, pen.gap)
        self._counts = max(cell.total for row in rows for cell in row.cells.values())
        self._widths, self._way = self._fit()

    @property
    def height(self) -> int:
        """Lines of the whole table."""
        return len(self.board.rows) + bool(self._common) + 1 if self.board.rows else 0

    def lines(self, most: int | None = None) -> list[Text]:
        """The table now; empty for a sweep without depths.

        Args:
            most: lines there are; rows on which something happens come first, and the last line
                counts the others.
        """
        if not self.board.rows:
            return []
        lines = [Text(self._common, "dim")] if self._common else []
        lines.append(self._header())
        rows = self.board.rows if most is None else _chosen(self.board.rows, most - len(lines))
        above: tuple[str, ...] = ()
        for row in rows:
            lines.append(self._row(row, above))
            above = row.labels
        if len(rows) < len(self.board.rows):
            lines.append(self._rest(rows))
        return lines

    def legend(self) -> Text:
        """What the marks mean, those that occur, and what is counted."""
        line = Text(style="dim")
        for state in MARKS:
            if self.board.all.counts[state] or state in ("done", "waiting"):
                line.append(self.pen.mark(state), STYLES[state])
                line.append(f" {state}{GAP}")
        if self._way.counts:
            line.append("n/m: heals and evaluations")
        line.truncate(self.pen.width, overflow="ellipsis")
        return line

    def _fit(self) -> tuple[list[int], _Way]:
        """Widths of the label columns, and the roomiest way to draw cells beside them."""
        natural = [
            max(cell_len(LABELS[i]), *(cell_len(row.labels[i]) for row in self.board.rows))
            for i in self._places
        ]
        depth_width = max(len(str(depth)) for depth in self.board.depths)
        fraction = 2 * len(str(self._counts)) + 1
        ways = [
            _Way(max(depth_width, fraction + 2), GAP, counts=True),
            _Way(depth_width, " ", counts=False),
            _Way(1, "", counts=False),
        ]
        for way in ways:
            # Counts beside shortened names say more than marks beside long ones.
            for most in LABEL_WIDTHS[:-1]:
                widths = [min(width, most) for width in natural]
                if self._total(widths, way) <= self.pen.width:
                    return widths, way
        return [min(width, LABEL_WIDTHS[-1]) for width in natural], ways[-1]

    def _total(self, widths: Sequence[int], way: _Way) -> int:
        depths = len(self.board.depths)
        labels = sum(widths) + len(GAP) * len(widths)
        return labels + depths * way.width + (depths - 1) * len(way.gap)

    def _header(self) -> Text:
        depths, way, line = self.board.depths, self._way, Text(style="bold")
        for i, width in zip(self._places, self._widths, strict=True):
            line.append(shortened(LABELS[i], width, self.pen.gap).ljust(width) + GAP)
        if way.gap:
            line.append(way.gap.join(f"{depth:>{way.width}}" for depth in depths))
        else:
            ends = f"{depths[0]}{self.pen.gap}{depths[-1]}"
            line.append(ends if len(ends) <= len(depths) else "depth")
        if line.cell_len + 7 <= self.pen.width and way.gap:
            line.append("  depth", "dim")
        line.truncate(self.pen.width)
        return line

    def _row(self, row: Row, above: tuple[str, ...]) -> Text:
        line, same = Text(), bool(above)
        for i, width in zip(self._places, self._widths, strict=True):
            # A name is said once for the rows under it, but the last one tells the rows apart.
            same = same and row.labels[i] == above[i]
            said = "" if same and i != self._places[-1] else row.labels[i] or "-"
            short = shortened(said, width, self.pen.gap)
            line.append(short + " " * (width - cell_len(short)) + GAP)
        for number, depth in enumerate(self.board.depths):
            text, style = self._cell(row.cells.get(depth))
            gap = self._way.gap if number else ""
            line.append(gap + " " * (self._way.width - cell_len(text)))
            line.append(text, style)
        line.truncate(self.pen.width, overflow="ellipsis")
        return line

    def _cell(self, cell: Tally | None) -> tuple[str, str]:
        if cell is None:
            return "", ""
        mark, style = self.pen.mark(cell.state), STYLES[cell.state]
        if cell.state == "waiting" and cell.done:
            style = ""
        if not self._way.counts:
            return mark, style
        width = 2 * len(str(self._counts)) + 1
        return f"{mark} {_fraction(cell):>{width}}", style

    def _rest(self, shown: Sequence[Row]) -> Text:
        there = {id(row) for row in shown}
        rest = [row for row in self.board.rows if id(row) not in there]
        counts = Counter(URGENCY[_urgency(row)] for row in rest)
        parts = [f"{counts[state]} {state}" for state in URGENCY if counts[state]]
        text = f"{self.pen.gap} and {len(rest)} more rows: {', '.join(parts)}"
        return Text(shortened(text, self.pen.width, self.pen.gap), "dim")


def shared(board: Board, pen: Pen) -> list[Text]:
    """A line of counts for each kind of stage outside the table."""
    name_width = max((len(kind) for kind in board.kinds), default=0)
    count_width = max((len(_fraction(tally)) for tally in board.kinds.values()), default=0)
    lines = []
    for kind, tally in board.kinds.items():
        line = Text.assemble(
            f"{kind:{name_width}}{GAP}",
            (pen.mark(tally.state), STYLES[tally.state]),
            f" {_fraction(tally):>{count_width}}{GAP}",
            pen.bar(tally.done, tally.total, min(24, max(0, pen.width - 40))),
        )
        for state in ("running", "failed", "blocked", "stopped"):
            if tally.counts[state]:
                line.append(f"{GAP}{tally.counts[state]} {state}", STYLES[state])
        line.truncate(pen.width)
        lines.append(line)
    return lines


def shared_briefly(board: Board, pen: Pen) -> list[Text]:
    """The same in as few lines as there can be."""
    parts = [
        Text.assemble(
            f"{kind} ", (pen.mark(tally.state), STYLES[tally.state]), f" {_fraction(tally)}"
        )
        for kind, tally in board.kinds.items()
    ]
    return flow(parts, pen.width)


def flow(parts: Sequence[Text], width: int, between: str = "   ") -> list[Text]:
    """Parts one after another, a new line where the width ends."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + len(between) + part.cell_len <= width:
            lines[-1].append(between)
            lines[-1].append_text(part)
        else:
            lines.append(Text.assemble(part))
    for line in lines:
        line.truncate(width)
    return lines


def _fraction(tally: Tally) -> str:
    return f"{tally.done}/{tally.total}"


def _urgency(row: Row) -> int:
    state = row.all.state
    if row.all.counts["running"]:
        state = "running"
    elif state == "waiting" and row.all.done:
        state = "begun"
    return URGENCY.index(state)


def _chosen(rows: Sequence[Row], most: int) -> list[Row]:
    """The rows to show in `most` lines, one of which counts the others."""
    if len(rows) <= most:
        return list(rows)
    ranked = sorted(range(len(rows)), key=lambda i: (_urgency(rows[i]), i))
    return [rows[i] for i in sorted(ranked[: max(1, most - 1)])]
