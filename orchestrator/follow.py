"""A run's journal or a stage's log, handed on as it grows, until there is nothing more to come."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.runs import RunFolder
from orchestrator.status import journal_line, stage_called
from workers.errors import InvalidInput

POLL_SECONDS = 0.5


class _Tail:
    """The whole lines that were added to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self.path, self._read = path, 0

    def fresh(self, last: bool = False) -> list[str]:
        """The new lines; with `last`, also what has no line end yet."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except OSError:
            return []
        whole = data if last else data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode("utf-8", "replace").splitlines()


def follow_journal(folder: RunFolder) -> Iterator[str]:
    """The journal for people, until no driver holds the run."""
    tail = _Tail(folder.path / "journal.jsonl")
    while True:
        held = folder.held()  # before reading: what a driver wrote last is not missed
        yield from map(journal_line, _events(tail))
        if not held:
            return
        time.sleep(POLL_SECONDS)


def follow_stage(folder: RunFolder, stage: str) -> Iterator[str]:
    """A stage's log, attempt after attempt, until the stage has ended or no driver holds the run.

    Raises:
        InvalidInput: no such stage, several, or it has no log and will have none.
    """
    journal = _Tail(folder.path / "journal.jsonl")
    journal.fresh()  # the record below tells what these say
    record = stage_called(folder, stage)
    log = _Tail(Path(record.log)) if record.log else None
    ended = record.state in ("done", "failed", "blocked")
    if log is None and (ended or not folder.held()):
        why = "it was reused from the store" if record.reused else f"it is {record.state}"
        raise InvalidInput(f"{record.id} has no log in this run: {why}")
    while True:
        over = ended or not folder.held()
        for event in _events(journal):
            if event.get("id") != record.id:
                continue
            if event["event"] == "start" and (log is None or str(log.path) != event["log"]):
                if log is not None:
                    yield from log.fresh(last=True)
                log = _Tail(Path(event["log"]))
            ended = event["event"] in ("done", "failed", "blocked")
        if log is not None:
            yield from log.fresh(last=over)
        if over:
            return
        time.sleep(POLL_SECONDS)


def _events(tail: _Tail) -> Iterator[dict[str, Any]]:
    for line in tail.fresh():
        with contextlib.suppress(ValueError):
            yield json.loads(line)
