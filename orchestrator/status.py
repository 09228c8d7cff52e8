"""What a run folder tells: `layersweep status` and `logs`, beside a running driver or after it."""

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from orchestrator.attempt_log import read_log
from orchestrator.runs import RunFolder, StageRecord
from orchestrator.watch.board import Board, Stage
from orchestrator.watch.table import STYLES, Pen, Table, shared
from orchestrator.watch.words import last_line, one_line, span
from workers.errors import InvalidInput

PIPE_WIDTH = 140
"""Widest table where the output is no terminal."""
WORD_STYLES = {
    "running": STYLES["running"],
    "retry": "yellow",
    "failed": STYLES["failed"],
    "relief": "magenta",
}


def status_data(folder: RunFolder) -> dict[str, Any]:
    """A run's state as plain data, all that `status_table` prints."""
    records = folder.records()
    held = folder.held()
    kinds: dict[str, Counter[str]] = {}
    for record in records.values():
        kinds.setdefault(record.kind, Counter())[record.state] += 1
    board = Board(
        (Stage(r.id, r.kind, r.dependencies, r.cell) for r in records.values()), start="pending"
    )
    board.sync({record.id: record.state for record in records.values()})
    return {
        "run": folder.name,
        "held": held,
        "seconds": round(folder.seconds(), 1),
        "notice": _notice(folder) if held else "",
        "states": dict(Counter(record.state for record in records.values())),
        "kinds": {kind: dict(counts) for kind, counts in kinds.items()},
        "table": board.data(),
        "running": [_trouble(r) for r in records.values() if r.state == "running"],
        "retrying": [
            _trouble(r) for r in records.values() if held and r.state == "pending" and r.failure
        ],
        "failed": [_trouble(r) for r in records.values() if r.state == "failed"],
        "blocked": [
            {"id": r.id, "message": r.message} for r in records.values() if r.state == "blocked"
        ],
        "deviations": [
            {"id": r.id, "state": r.state, "relief": r.relief} for r in records.values() if r.relief
        ],
        "report": str(folder.report / "index.html"),
    }


def _trouble(record: StageRecord) -> dict[str, Any]:
    """A stage that runs or went wrong: its newest attempt, and why the one before failed."""
    running = record.state == "running"
    return {
        "id": record.id,
        "attempt": record.attempts,
        "seconds": round(time.time() - record.started, 1) if running else None,
        "class": record.failure,
        "message": record.message,
        "relief": record.relief,
        "log": record.log,
        "last": last_line(record.log) if record.log else "",
    }


def _notice(folder: RunFolder) -> str:
    """What the driver at work last said of itself, if nothing has started since."""
    notice = ""
    for event in folder.events():
        if event["event"] in ("waiting", "stopping"):
            notice = one_line(event.get("message", ""))
        elif event["event"] in ("begin", "start"):
            notice = ""
    return notice


def status_table(data: dict[str, Any], console: Console) -> None:
    """Print what `status_data` found."""
    board = Board.of_data(data["table"])
    width = console.width if console.is_terminal else PIPE_WIDTH
    pen = Pen(width, console.options.ascii_only)
    alive = "a driver is at work" if data["held"] else "no driver is at work"
    done, total = board.all.done, board.all.total
    console.print(
        f"Run {data['run']}: {alive}, {done} of {total} stages done, {span(data['seconds'])} so far"
    )
    if data["notice"]:
        console.print(Text(data["notice"], "magenta"))
    for line in shared(board, pen):
        console.print(line)
    if board.rows:
        table = Table(board, pen)
        console.print()
        for line in (*table.lines(), table.legend()):
            console.print(line)
    for item in data["running"]:
        # Its first line only repeats what it is.
        last = "" if item["last"].startswith(f"{item['id']} (") else item["last"]
        attempt = f", attempt {item['attempt']} after {_why(item)}" if item["class"] else ""
        _say(console, "running", f"{item['id']}  {span(item['seconds'])}{attempt}", last)
    for item in data["retrying"]:
        _say(console, "retry", f"{item['id']}  after {_why(item)}", _last_word(item))
    for item in data["failed"]:
        tries = f", {item['attempt']} attempts" if item["attempt"] > 1 else ""
        _say(console, "failed", f"{item['id']}  {_why(item)}{tries}", _last_word(item), item["log"])
    for item in data["deviations"]:
        _say(console, "relief", f"{item['id']}  {one_line(item['relief'])}")
    if data["blocked"]:
        count = len(data["blocked"])
        stages = "1 stage is" if count == 1 else f"{count} stages are"
        console.print(f"{stages} blocked by these failures")
    if not data["held"] and done < total:
        console.print("To go on, run the sweep again: what is done is kept.")


def _why(item: dict[str, Any]) -> str:
    return f"({one_line(item['class'])}) {one_line(item['message'])}"


def _last_word(item: dict[str, Any]) -> str:
    """The last line of a failed attempt's log, where that says more than the message does."""
    last: str = item["last"]
    return "" if one_line(item["message"]) in last else last


def _say(console: Console, word: str, text: str, last: str = "", log: str = "") -> None:
    """A stage, and under it the last line of its log, and where that is."""
    console.print(Text.assemble((f"{word:8} ", WORD_STYLES[word]), text))
    if last:
        console.print(Text(f"         {last}", "dim"))
    if log:
        console.print(Text(f"         log: {log}"), soft_wrap=True)


def journal_line(event: dict[str, Any]) -> str:
    """An event of the journal for people."""
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    rest = " ".join(
        f"{name}={value}"
        for name, value in event.items()
        if name not in ("time", "event", "id", "kind", "key", "log")
    )
    return f"{clock} {event['event']:8} {event.get('id', '')} {rest}".rstrip()


def journal_lines(folder: RunFolder) -> Iterator[str]:
    """The journal for people, a line an event."""
    return map(journal_line, folder.events())


def stage_called(folder: RunFolder, stage: str) -> StageRecord:
    """The stage whose id is, or alone contains, `stage`.

    Raises:
        InvalidInput: no such stage, or several.
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
    return records[found[0]]


def stage_log(folder: RunFolder, stage: str) -> Iterator[str]:
    """The newest attempt's log of the stage whose id is, or alone contains, `stage`.

    Raises:
        InvalidInput: no such stage, several, or it has no log yet.
    """
    record = stage_called(folder, stage)
    text = read_log(record.log) if record.log else None
    if text is None:
        why = "it was reused from the store" if record.reused else f"it is {record.state}"
        raise InvalidInput(f"{record.id} has no log in this run: {why}")
    yield from text.splitlines()
