"""Events of a run as lines a person reads, one line an event."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.watch.words import one_line, span

TROUBLE = ("failed", "retry", "blocked", "stopping", "waiting", "capacity")
"""Events that keep a line even where a table redraws itself."""


@dataclass(frozen=True)
class Line:
    """One line.

    Args:
        event: the event's name.
        word: how it begins.
        text: the rest.
        log: the attempt's log file, where one should look there.
    """

    event: str
    word: str
    text: str
    log: str = ""


class Telling:
    """Turns events into lines; what one failure blocks becomes a single line."""

    def __init__(self) -> None:
        self._logs: dict[str, str] = {}
        self._blocked: dict[str, int] = {}

    def lines(self, name: str, node_id: str, detail: dict[str, Any]) -> Iterator[Line]:
        """What to say at an event; nothing at a start, nor for a stage found in the store."""
        if name == "start":
            self._logs[node_id] = str(detail.get("log", ""))
            return
        if name == "blocked":
            why = one_line(detail.get("message", "something it needs failed"))
            self._blocked[why] = self._blocked.get(why, 0) + 1
            return
        yield from self.pending()
        log = self._logs.pop(node_id, "")
        message = one_line(detail.get("message", ""))
        if name == "done":
            if not detail.get("reused"):
                yield Line(name, "done", f"{node_id}  {_lasted(detail)}")
        elif name == "failed":
            yield Line(name, "FAILED", f"{node_id}  {_class(detail)}{message}", log)
        elif name == "retry":
            yield Line(name, "retry", f"{node_id}  {_class(detail)}{message}{_next_try(detail)}")
        elif name == "capacity":
            yield Line(name, "cluster", message or _capacity(detail))
        else:
            yield Line(name, name, f"{node_id}  {message}".strip())

    def pending(self) -> Iterator[Line]:
        """What was blocked since the last line."""
        for why, count in self._blocked.items():
            stages = "1 stage" if count == 1 else f"{count} stages"
            yield Line("blocked", "blocked", f"{stages}: {why}")
        self._blocked.clear()


def _lasted(detail: dict[str, Any]) -> str:
    seconds = detail.get("seconds", 0.0)
    return f"{seconds:.1f} s" if seconds < 10 else span(seconds)


def _class(detail: dict[str, Any]) -> str:
    return f"({one_line(detail['class'])}) " if "class" in detail else ""


def _next_try(detail: dict[str, Any]) -> str:
    parts = []
    if detail.get("delay"):
        parts.append(f"again in {span(detail['delay'])}")
    if detail.get("relief"):
        parts.append(f"next with {one_line(detail['relief'])}")
    return f"; {', '.join(parts)}" if parts else ""


def _capacity(detail: dict[str, Any]) -> str:
    now = detail.get("after", "?")
    return f"{detail.get('nodes', '?')} node(s), {now} job(s) at once (were {detail.get('before', '?')})"
