"""A run on a terminal: a table that redraws itself, with trouble printed above it as it comes."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from orchestrator.graph import Plan
from orchestrator.watch.plain import PlainWatch, Watched
from orchestrator.watch.table import STYLES, Pen, Table, flow, shared, shared_briefly
from orchestrator.watch.telling import TROUBLE, Line
from orchestrator.watch.words import about, clipped, last_line, shortened, span

if TYPE_CHECKING:
    from orchestrator.driver import Running

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
ASCII_SPINNER = "|/-\\"
ONE_LINE_WIDTH = 120
"""From here on a running stage and its last log line share a line."""
WORTH_TELLING = 20.0
"""Seconds from which it is said how long a stage should take."""
COLOURS = {"failed": "bold red", "retry": "yellow", "blocked": "yellow", "stopping": "magenta"}


class LiveWatch(PlainWatch):
    """A table that redraws itself, about twice a second.

    Args:
        console: a terminal.
        plan: what is run.
        clock: seconds that never go back.
    """

    def __init__(
        self, console: Console, plan: Plan, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(console, plan, clock)
        # Drawn by our own hand alone: a drawing thread would take its time from the driver's.
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
        self._ascii = console.options.ascii_only
        self._turn = 0
        self._notice = ""
        self._driver: Watched | None = None
        self._table: Table | None = None
        self._widths: list[int] = []
        self._width = console.width

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state standing, without what moved."""
        try:
            if self._driver is not None:
                self._draw(self._driver, ended=True)
            self._live.stop()
        except (OSError, SystemExit):
            self.console.quiet = True

    def _look(self, driver: Watched) -> None:
        self._take_over(driver)
        self._print(self._telling.pending())
        self._driver = driver
        try:
            self._draw(driver)
        except (OSError, SystemExit):  # The terminal is gone; the run goes on.
            self.console.quiet = True

    def _print(self, lines: Sequence[Line] | Iterator[Line]) -> None:
        for line in lines:
            if line.event in ("start", "done"):
                self._notice = ""
            elif line.event in ("waiting", "stopping"):
                self._notice = line.text
            if line.event in TROUBLE:
                self._write_line(line)

    def _write_line(self, line: Line) -> None:
        clock = time.strftime("%H:%M:%S")
        text = Text.assemble(
            (f"{clock} ", "dim"), (f"{line.word:8} ", COLOURS.get(line.event, "")), line.text
        )
        try:
            self._unwrap(self.console.width)
            self.console.print(text)
            if line.log:
                self.console.print(Text(f"         log: {line.log}"), soft_wrap=True)
        except (OSError, SystemExit):
            self.console.quiet = True

    def _draw(self, driver: Watched, ended: bool = False) -> None:
        size = self.console.size
        lines = self.frame(driver, size.width, size.height, ended)
        self._unwrap(size.width)
        self._widths = [line.cell_len for line in lines]
        self._live.update(Group(*lines), refresh=True)

    def _unwrap(self, width: int) -> None:
        """After the terminal became narrower: erase the lines that the old drawing now takes more.

        The terminal has folded what it showed; rich goes up by as many lines as it had drawn.
        """
        if width < self._width:
            extra = sum(max(0, -(-drawn // width) - 1) for drawn in self._widths)
            step = (ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)
            self.console.control(
                Control(ControlType.CARRIAGE_RETURN), *(Control(*step) for _ in range(extra))
            )
        self._width = width

    # --- the drawing -------------------------------------------------------------------------

    def frame(self, driver: Watched, width: int, height: int, ended: bool = False) -> list[Text]:
        """Everything that is drawn, at most `height - 1` lines of at most `width` cells."""
        pen = Pen(width, self._ascii)
        self._turn += 1
        if self._table is None or self._table.pen != pen:
            self._table = Table(self.board, pen)
        running = [] if ended else sorted(driver.running(), key=lambda now: -now.seconds)
        head = self._head(driver, running, pen, ended)
        room = height - 1 - len(head)
        rows = self._table.height
        long_form = shared(self.board, pen)
        each = 1 if width >= ONE_LINE_WIDTH else 2
        wanted = each * len(running)
        above = long_form
        if len(long_form) + rows + wanted + 3 > room:
            above = shared_briefly(self.board, pen)
        room -= len(above)
        below = min(wanted, max(each, room // 3 if rows > room - wanted - 3 else wanted))
        most = room - below - 1 - 2
        table = self._table.lines(most) if most > 3 else []
        space = [Text()] if most > 3 else []
        lines = [*head, *above, *space, *table]
        if table and not ended:
            lines.append(self._table.legend())
        lines += self._running(running, pen, height - 1 - len(lines), each)
        return lines[: max(1, height - 1)]

    def _head(
        self, driver: Watched, running: "Sequence[Running]", pen: Pen, ended: bool
    ) -> list[Text]:
        done, total = self.board.all.done, self.board.all.total
        parts = [
            Text(shortened(self.plan.sweep, 24, pen.gap), "bold"),
            Text.assemble(pen.bar(done, total, 20), f" {done}/{total}"),
        ]
        parts += [
            Text(f"{self.board.all.counts[state]} {state}", STYLES[state])
            for state in ("failed", "blocked")
            if self.board.all.counts[state]
        ]
        parts.append(Text(span(self.clock() - self.started)))
        if not ended:
            parts.append(Text(self._time_left(driver, running), "bold"))
            parts.append(Text(f"{driver.slots_in_use} of {driver.slots} jobs"))
            if driver.gpus:
                parts.append(Text(f"{driver.gpus_in_use:g} of {driver.gpus:g} GPUs"))
        lines = flow([part for part in parts if part.plain], pen.width)
        why = driver.reason or self._notice
        if why and not ended:
            said = f"nothing new is started: {why}" if driver.reason else why
            lines.append(Text(clipped(said, pen.width, pen.gap), "magenta"))
        return lines

    def _running(self, running: "Sequence[Running]", pen: Pen, room: int, each: int) -> list[Text]:
        fitting = max(0, room) // each
        if fitting < len(running):
            fitting = max(0, room - 1) // each
        lines: list[Text] = []
        for now in running[:fitting]:
            lines += self._running_stage(now, pen, each)
        if fitting < len(running) and room > 0:
            lines.append(Text(f"{pen.gap} and {len(running) - fitting} more run", "dim"))
        return lines

    def _running_stage(self, now: "Running", pen: Pen, each: int) -> list[Text]:
        spinner = ASCII_SPINNER if self._ascii else SPINNER
        expected = (self._forecast.expected(now.node_id) if self._forecast else None) or 0.0
        time_text = span(now.seconds)
        if expected >= WORTH_TELLING:
            time_text += f" of {about(expected)}"
        if now.gpus:
            time_text += f", {now.gpus:g} GPU" + ("s" if now.gpus > 1 else "")
        if now.ranks > 1:
            time_text += f", {now.ranks} ranks"
        said = last_line(now.log)
        said = "" if said.startswith(f"{now.node_id} (") else said
        room = pen.width - len(time_text) - 4
        first = Text.assemble(
            (spinner[self._turn % len(spinner)] + " ", STYLES["running"]),
            shortened(now.node_id, room, pen.gap),
            (f"  {time_text}", "bold"),
        )
        if each == 1:
            left = pen.width - first.cell_len - 2
            if said and left > 10:
                first.append("  " + clipped(said, left, pen.gap), "dim")
            return [first]
        return [first, Text("    " + clipped(said, pen.width - 4, pen.gap), "dim")]
