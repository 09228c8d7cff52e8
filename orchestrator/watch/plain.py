"""A run in plain lines, for logs of batch jobs and pipes.

What ended, what went wrong, and a sign of life in long silences. No control characters, and nothing
that is drawn over.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from orchestrator.graph import Plan
from orchestrator.watch.board import Board
from orchestrator.watch.forecast import Forecast
from orchestrator.watch.telling import Line, Telling
from orchestrator.watch.words import about, last_line, span

if TYPE_CHECKING:
    from orchestrator.driver import Running

LIFE_SECONDS = 60.0
"""A line at least this often."""
LOOK_SECONDS = 0.5
SHARE = 0.02
"""Part of the driver's time that looking may take: of 100,000 stages one looks less often."""
STATES = {
    "start": "running",
    "done": "done",
    "retry": "ready",
    "failed": "failed",
    "blocked": "blocked",
    "stopped": "stopped",
}


class Watched(Protocol):
    """What is watched: the driver, seen from here."""

    @property
    def state(self) -> Mapping[str, str]:
        """By stage."""

    @property
    def estimates(self) -> Mapping[str, float]:
        """Seconds by stage."""

    @property
    def slots(self) -> int:
        """Jobs at once, as the cluster is now."""

    @property
    def slots_in_use(self) -> int:
        """Jobs under way."""

    @property
    def gpus(self) -> float:
        """GPUs of the cluster."""

    @property
    def gpus_in_use(self) -> float:
        """GPUs the jobs hold."""

    @property
    def stopping(self) -> bool:
        """Whether the run is being ended."""

    @property
    def reason(self) -> str:
        """Why nothing new is started; "" if it is."""

    def running(self) -> "Sequence[Running]":
        """What runs now."""


class QuietWatch:
    """Says nothing: the caller wants one JSON document."""

    def event(self, name: str, node_id: str, detail: dict[str, Any]) -> None:
        """Pass over an event."""

    def tick(self, driver: Watched) -> None:
        """Pass over the time."""


class PlainWatch:
    """A line for what ended, and one a minute when nothing does.

    Args:
        console: where to.
        plan: what is run.
        clock: seconds that never go back.
    """

    def __init__(
        self, console: Console, plan: Plan, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self.plan, self.clock = console, plan, clock
        self.board = Board.of(plan)
        self.started = self._said = clock()
        self._began: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._telling = Telling()
        self._forecast: Forecast | None = None
        self._next_look = self.started

    def event(self, name: str, node_id: str, detail: dict[str, Any]) -> None:
        """Say what ended, failed, is tried again or cannot be done."""
        if name in STATES:
            self.board.set(node_id, STATES[name])
            began = self._began.pop(node_id, None)
            if name == "start":
                self._began[node_id] = self.clock()
            elif name == "done" and began is not None:
                # From here: with the start of processes and the loading of models.
                self._took[node_id] = self.clock() - began
        self._print(self._telling.lines(name, node_id, detail))

    def tick(self, driver: Watched) -> None:
        """Keep in step with the driver, at little cost: it calls far more often than needed."""
        now = self.clock()
        if now < self._next_look:
            return
        began = time.perf_counter()
        self._look(driver)
        self._next_look = now + max(LOOK_SECONDS, (time.perf_counter() - began) / SHARE)

    def _look(self, driver: Watched) -> None:
        self._take_over(driver)
        self._print(self._telling.pending())
        if self.clock() - self._said >= LIFE_SECONDS:
            self._print([Line("life", "running", self._sign_of_life(driver))])

    def _take_over(self, driver: Watched) -> None:
        if self._forecast is None:
            self._forecast = Forecast(self.plan, self.board, driver.estimates)
        self.board.sync(driver.state)

    def _time_left(self, driver: Watched, running: "Sequence[Running]") -> str:
        if driver.stopping or driver.reason:
            return ""
        assert self._forecast is not None
        left = self._forecast.remaining(self._took, running, driver.slots)
        return "time left: ?" if left is None else f"{about(left)} left"

    def _sign_of_life(self, driver: Watched) -> str:
        running = sorted(driver.running(), key=lambda now: -now.seconds)
        parts = [f"{driver.slots_in_use} of {driver.slots} jobs"]
        if driver.gpus:
            parts.append(f"{driver.gpus_in_use:g} of {driver.gpus:g} GPUs")
        parts.append(f"{span(self.clock() - self.started)} so far")
        parts.append(self._time_left(driver, running))
        parts.append(driver.reason)
        text = ", ".join(part for part in parts if part)
        if running:
            longest = running[0]
            text += f"; longest: {longest.node_id}  {span(longest.seconds)}"
            said = last_line(longest.log)
            text += f"  {said}" if said else ""
        return text

    def _print(self, lines: "Sequence[Line] | Iterator[Line]") -> None:
        for line in lines:
            self._said = self.clock()
            done = f"{self.board.all.done:>{len(str(self.board.all.total))}}"
            self._write(
                f"{time.strftime('%H:%M:%S')} [{done}/{self.board.all.total}] "
                f"{line.word:8} {line.text}" + (f"  log: {line.log}" if line.log else "")
            )

    def _write(self, text: str) -> None:
        # A terminal or pipe that is gone must not end a run of days. Of a pipe rich makes a
        # SystemExit, and is silent from then on.
        try:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)
        except (OSError, SystemExit):
            self.console.quiet = True
