"""What a person sees of a run: a live table on a terminal, plain lines elsewhere, and `status`."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.runs import RunFolder
from workers.errors import InvalidInput

if TYPE_CHECKING:
    from orchestrator.driver import Driver

STATES = ("done", "running", "ready", "waiting", "failed", "blocked")


class PlainWatch:
    """One line per finished stage."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0

    def event(self, name: str, node_id: str, detail: dict[str, Any]) -> None:
        """Print what ended, failed or is tried again."""
        if name == "done":
            self.done += 1
            self._line(f"done     {node_id}  {detail['seconds']:.1f} s")
        elif name == "failed":
            self._line(f"FAILED   {node_id}  ({detail['class']}) {detail['message']}")
        elif name == "retry":
            self._line(f"retry    {node_id}  ({detail['class']}) {detail['message']}")

    def tick(self, driver: "Driver") -> None:
        """Keep the total in step with what was reused."""
        self.total = len(driver.plan.nodes)
        self.done = sum(state == "done" for state in driver.state.values())

    def _line(self, text: str) -> None:
        self.console.print(f"[{self.done:>4}/{self.total}] {text}", markup=False)


class LiveWatch(PlainWatch):
    """A table that redraws itself, with failures printed above it as they come."""

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(console, total)
        self.started = time.monotonic()
        self.live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def event(self, name: str, node_id: str, detail: dict[str, Any]) -> None:
        """Only trouble is worth a line that stays."""
        if name in ("failed", "retry"):
            super().event(name, node_id, detail)

    def tick(self, driver: "Driver") -> None:
        """Redraw."""
        super().tick(driver)
        self.live.update(self._draw(driver))

    def _draw(self, driver: "Driver") -> Group:
        table = Table(box=None, pad_edge=False)
        table.add_column("stage")
        for state in STATES:
            table.add_column(state, justify="right")
        kinds: dict[str, Counter[str]] = {}
        for node_id, state in driver.state.items():
            kinds.setdefault(driver.plan.nodes[node_id].kind, Counter())[state] += 1
        for kind, counts in kinds.items():
            table.add_row(kind, *(str(counts[s] or "-") for s in STATES))
        running = [
            Text(f"  {r.node_id}  {r.seconds:.0f} s  {last_line(Path(r.log))}", overflow="ellipsis")
            for r in driver.running()
        ]
        elapsed = time.monotonic() - self.started
        head = Text(f"{self.done} of {self.total} stages, {elapsed:.0f} s")
        return Group(head, table, *running)


def last_line(log: Path) -> str:
    """The last whole line of a log file, without reading all of it."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 2000))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""


def status_data(folder: RunFolder) -> dict[str, Any]:
    """A run's state as plain data."""
    records = folder.records()
    kinds: dict[str, Counter[str]] = {}
    for record in records.values():
        kinds.setdefault(record.kind, Counter())[record.state] += 1
    states = Counter(record.state for record in records.values())
    return {
        "run": folder.name,
        "held": folder.held(),
        "seconds": round(folder.seconds(), 1),
        "states": dict(states),
        "kinds": {kind: dict(counts) for kind, counts in kinds.items()},
        "running": [
            {"id": r.id, "attempt": r.attempts, "log": r.log, "last": last_line(Path(r.log))}
            for r in records.values()
            if r.state == "running"
        ],
        "failed": [
            {"id": r.id, "class": r.failure, "message": r.message, "log": r.log}
            for r in records.values()
            if r.state == "failed"
        ],
        "blocked": [
            {"id": r.id, "message": r.message} for r in records.values() if r.state == "blocked"
        ],
        "relief": [
            {"id": r.id, "state": r.state, "relief": r.relief} for r in records.values() if r.relief
        ],
        "report": str(folder.report / "index.html"),
    }


def status_table(data: dict[str, Any], console: Console) -> None:
    """Print what `status_data` found."""
    alive = "a driver is at work" if data["held"] else "no driver is at work"
    console.print(f"Run {data['run']}: {alive}, {data['seconds']:.0f} s so far")
    states = ("done", "running", "pending", "failed", "blocked")
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    for state in states:
        table.add_column(state, justify="right")
    for kind, counts in data["kinds"].items():
        table.add_row(kind, *(str(counts.get(s) or "-") for s in states))
    console.print(table)
    for item in data["running"]:
        console.print(f"running  {item['id']}  {item['last']}", markup=False)
    for item in data["failed"]:
        console.print(f"failed   {item['id']}  ({item['class']}) {item['message']}", markup=False)
        if item["log"]:
            console.print(f"         log: {item['log']}", markup=False)
    if data["blocked"]:
        console.print(f"{len(data['blocked'])} stages are blocked by these failures")
    if not data["held"] and data["states"].get("done", 0) < sum(data["states"].values()):
        console.print("To go on, run the sweep again: what is done is kept.")


def journal_lines(folder: RunFolder) -> Iterator[str]:
    """The journal for people, a line an event."""
    for event in folder.events():
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        rest = " ".join(
            f"{name}={value}"
            for name, value in event.items()
            if name not in ("time", "event", "id", "kind", "key", "log")
        )
        yield f"{clock} {event['event']:8} {event.get('id', '')} {rest}".rstrip()


def stage_log(folder: RunFolder, stage: str) -> Iterator[str]:
    """The newest attempt's log of the stage whose id is, or alone contains, `stage`.

    Raises:
        InvalidInput: no such stage, several, or it has no log yet.
    """
    records = folder.records()
    found = [stage] if stage in records else [i for i in records if stage in i]
    if not found:
        raise InvalidInput(
            f"run {folder.name} has no stage {stage}", remedy="see layersweep status"
        )
    if len(found) > 1:
        some = ", ".join(found[:5])
        raise InvalidInput(
            f"{len(found)} stages match {stage}: {some} …", remedy="write more of it"
        )
    record = records[found[0]]
    if not record.log or not Path(record.log).is_file():
        why = "it was reused from the store" if record.reused else f"it is {record.state}"
        raise InvalidInput(f"{found[0]} has no log in this run: {why}")
    yield from Path(record.log).read_text(encoding="utf-8", errors="replace").splitlines()
