"""The log of an attempt: everything its process prints, in a file or, for an object store, at a URL.

A run folder need not be seen by every node. A log with a URL is written to this node's disk and
copied to the store while the attempt runs.
"""

import contextlib
import io
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrator.store import is_url
from workers.errors import InvalidInput

COPY_SECONDS = 10.0
"""From one copy to the next; more where copying takes long, so that it takes 5 % of the time."""
LOOK_SECONDS = 5.0
"""How old the last line of a log at a URL may be: each look is a request."""
TAIL_BYTES = 2000


@contextlib.contextmanager
def logged_to(location: str) -> Iterator[None]:
    """Send this process's stdout and stderr, C libraries included, to a file or a URL."""
    if not is_url(location):
        with _captured(Path(location)):
            yield
        return
    with tempfile.TemporaryDirectory(prefix="layersweep-log-") as folder:
        file = Path(folder) / "attempt.log"
        with _copied(file, location), _captured(file):
            yield


def read_log(location: str) -> str | None:
    """A log's text; None if there is none yet.

    Raises:
        StoreUnreachable: it has a URL, and nobody answers there.
    """
    try:
        if not is_url(location):
            return Path(location).read_text(encoding="utf-8", errors="replace")
        from orchestrator.store.objects import Objects

        folder, _, name = location.rpartition("/")
        return Objects(folder, pauses=()).read(name).decode("utf-8", "replace")
    except FileNotFoundError:
        return None


def log_tail(location: str | Path) -> str:
    """The end of a log, some thousand characters; empty if it cannot be read."""
    try:
        if is_url(location):
            return _tail_at(str(location), int(time.monotonic() / LOOK_SECONDS))
        with Path(location).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except (OSError, InvalidInput):
        return ""


@lru_cache(maxsize=256)
def _tail_at(url: str, moment: int) -> str:
    del moment  # a later moment is another look
    return (read_log(url) or "")[-TAIL_BYTES:]


@contextlib.contextmanager
def _copied(file: Path, url: str) -> Iterator[None]:
    """Copy a growing file to a URL while the block lasts, and once more when it is whole."""
    from orchestrator.store.objects import Objects

    folder, _, name = url.rpartition("/")
    objects = Objects(folder, pauses=())
    stop = threading.Event()

    def copy() -> None:
        # A log that cannot be copied is no reason to fail the work it tells of.
        with contextlib.suppress(OSError, InvalidInput):
            objects.upload(file, name)

    def follow() -> None:
        pause, copied = COPY_SECONDS, -1
        while not stop.wait(pause):
            size = file.stat().st_size if file.exists() else -1
            if size != copied:
                began, copied = time.monotonic(), size
                copy()
                pause = max(COPY_SECONDS, 20 * (time.monotonic() - began))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        copy()


class _LogFile(io.FileIO):
    """Takes what there is room for: a full disk costs lines of a log, and no stage."""

    def write(self, data: Any) -> int:
        """Write, or pass over what cannot be written."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


@contextlib.contextmanager
def _captured(path: Path) -> Iterator[None]:
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        descriptor = os.open(os.devnull, os.O_WRONLY)
    handler = None
    try:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        stream = io.TextIOWrapper(
            io.BufferedWriter(_LogFile(descriptor, "w", closefd=False)), encoding="utf-8"
        )
        handler = logging.StreamHandler(stream)
        logging.getLogger().addHandler(handler)
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield
        stream.flush()
    finally:
        if handler is not None:
            logging.getLogger().removeHandler(handler)
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for number in (*saved, descriptor):
            os.close(number)
