"""A run's journal or a stage's log, handed on as it grows, until there is nothing more to come."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.attempt_log import read_log
from orchestrator.runs import RunFolder
from orchestrator.status import journal_line, stage_called
from orchestrator.store import is_url
from workers.errors import InvalidInput

POLL_SECONDS = 0.5
AWAY_POLL_SECONDS = 5.0
"""Between looks at a log in an object store, to which it is copied now and then."""


class _Tail:
    """The whole lines that were added to a file, or to what a URL holds, since the last look."""

    def __init__(self, location: str) -> None:
        self.location, self._read = location, 0

    def fresh(self, last: bool = False) -> list[str]:
        """The new lines; with `last`, also what has no line end yet."""
        try:
            if is_url(self.location):
                data = (read_log(self.location) or "").encode()[self._read :]
            else:
                with Path(self.location).open("rb") as file:
                    file.seek(self._read)
                    data = file.read()
        except OSError:
            return []
        whole = data if last else data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode("utf-8", "replace").splitlines()


def follow_journal(folder: RunFolder) -> Iterator[str]:
    """The journal for people, until no driver holds the run."""
    tail = _Tail(str(folder.path / "journal.jsonl"))
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
    journal = _Tail(str(folder.path / "journal.jsonl"))
    journal.fresh()  # the record below tells what these say
    record = stage_called(folder, stage)
    log = _Tail(record.log) if record.log else None
    ended = record.state in ("done", "failed", "blocked")
    if log is None and (ended or not folder.held()):
        why = "it was reused from the store" if record.reused else f"it is {record.state}"
        raise InvalidInput(f"{record.id} has no log in this run: {why}")
    while True:
        over = ended or not folder.held()
        for event in _events(journal):
            if event.get("id") != record.id:
                continue
            if event["event"] == "start" and (log is None or log.location != event["log"]):
                if log is not None:
                    yield from log.fresh(last=True)
                log = _Tail(event["log"])
            ended = event["event"] in ("done", "failed", "blocked")
        if log is not None:
            yield from log.fresh(last=over)
        if over:
            return
        away = log is not None and is_url(log.location)
        time.sleep(AWAY_POLL_SECONDS if away else POLL_SECONDS)


def _events(tail: _Tail) -> Iterator[dict[str, Any]]:
    for line in tail.fresh():
        with contextlib.suppress(ValueError):
            yield json.loads(line)
