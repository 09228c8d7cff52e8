"""What an object store keeps on a node's disk: fetched artefacts, shared by the node's processes.

A cached artefact is a folder as in a folder store, marker included, renamed into place when whole.
When the cache grows beyond its limit the artefacts used longest ago go, but none that a living
process has asked for.
"""

import contextlib
import fcntl
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from orchestrator.store.base import MARKER, parsed_marker
from workers.errors import InvalidInput

CACHE = "LAYERSWEEP_CACHE"
LIMIT = "LAYERSWEEP_CACHE_GB"
DEFAULT_LIMIT_GB = 200.0
LEFT_SECONDS = 7 * 24 * 3600.0
"""After which unfinished work and checkpoints that nobody touched are cleared away."""
COUNT_SECONDS = 600.0
"""Between two counts of what is there; in between a process knows what it added itself."""


class Cache:
    """Artefacts of one object store on this machine.

    Args:
        name: of the store's own folder in the cache.

    Raises:
        InvalidInput: the folder cannot be made, or the limit is no number.
    """

    def __init__(self, name: str) -> None:
        root = os.environ.get(CACHE)
        self.folder = (Path(root) if root else Path.home() / ".cache/layersweep").absolute() / name
        limit = os.environ.get(LIMIT, str(DEFAULT_LIMIT_GB))
        try:
            self.limit_bytes = float(limit) * 1e9
        except ValueError:
            raise InvalidInput(
                f"{limit!r} is no size in GB", LIMIT, f"set a number, such as {DEFAULT_LIMIT_GB:g}"
            ) from None
        try:
            (self.folder / ".held").mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("a")
            self._holds = (self.folder / ".held" / f"{os.getpid()}-{uuid.uuid4().hex[:8]}").open(
                "a"
            )
        except OSError as error:
            raise InvalidInput(
                f"the cache of the store cannot be written: {error.strerror or error}",
                str(self.folder),
                f"name a folder on this machine's disk in {CACHE}",
            ) from None
        fcntl.flock(self._holds, fcntl.LOCK_EX)
        self._held: set[str] = set()
        self._mutex = threading.RLock()  # a file lock does not part the threads of a process
        self._counted, self._bytes = -COUNT_SECONDS, 0

    def path(self, kind: str, key: str) -> Path:
        """Where a cached artefact lies, or would lie."""
        return self.folder / kind / key

    def hold(self, kind: str, key: str) -> bool:
        """Keep an artefact from being cleared away while this process lives.

        Returns:
            Whether it is cached now.
        """
        marker = self.path(kind, key) / MARKER
        with self._locked(fcntl.LOCK_SH):
            name = f"{kind}/{key}"
            if name not in self._held:
                self._held.add(name)
                self._holds.write(name + "\n")
                self._holds.flush()
            try:
                os.utime(marker)
            except OSError:
                return False
        return True

    def temporary(self, kind: str, key: str) -> Path:
        """A new empty folder beside an artefact's place."""
        folder = self.folder / kind / f".{key}.{uuid.uuid4().hex[:8]}.tmp"
        folder.mkdir(parents=True)
        return folder

    def admit(self, temporary: Path, kind: str, key: str) -> Path:
        """Make a whole folder the cached artefact; if another process was first, theirs stands."""
        final = self.path(kind, key)
        if final.exists() and not (final / MARKER).is_file():
            self.drop(kind, key)
        try:
            temporary.rename(final)
        except OSError:
            if not (final / MARKER).is_file():
                raise
            shutil.rmtree(temporary, ignore_errors=True)
        return final

    def drop(self, kind: str, key: str) -> None:
        """Remove a cached artefact."""
        gone = self.folder / kind / f".{key}.{uuid.uuid4().hex[:8]}.tmp"
        with contextlib.suppress(FileNotFoundError):
            self.path(kind, key).rename(gone)  # out of sight at once, then removed
            shutil.rmtree(gone, ignore_errors=True)

    def make_room(self, size: int) -> None:
        """Clear away what was used longest ago, so that `size` bytes more stay within the limit."""
        with self._mutex:
            fresh = time.monotonic() - self._counted < COUNT_SECONDS
            if not fresh or self._bytes + size > self.limit_bytes:
                with self._locked(fcntl.LOCK_EX):
                    self._bytes = self._clear(size)
                self._counted = time.monotonic()
            self._bytes += size

    def _clear(self, size: int) -> int:
        """Remove what is left over or too much; returns the bytes that stay."""
        held = self._held_by_the_living()
        found, total = [], 0
        for kind in (p for p in self.folder.iterdir() if not p.name.startswith(".") and p.is_dir()):
            for folder in kind.iterdir():
                used = _used(folder)
                if used is None:
                    continue
                if not folder.name.startswith("."):
                    total += used[1]
                    found.append((*used, folder))
                elif time.time() - used[0] > LEFT_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
        for _, bytes_, folder in sorted(found):
            if total + size <= self.limit_bytes:
                break
            if f"{folder.parent.name}/{folder.name}" not in held:
                self.drop(folder.parent.name, folder.name)
                total -= bytes_
        return total

    def _held_by_the_living(self) -> set[str]:
        held = set(self._held)
        for path in (self.folder / ".held").iterdir():
            if path.name == Path(self._holds.name).name:
                continue
            with contextlib.suppress(FileNotFoundError), path.open("r+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    held.update(file.read().split())
                else:
                    path.unlink(missing_ok=True)  # its process is gone
        return held

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with self._mutex:
            fcntl.flock(self._lock, how)
            try:
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)


def _used(folder: Path) -> tuple[float, int] | None:
    """When a folder was last used, and its bytes by its marker; None if it vanished."""
    try:
        marker = folder / MARKER
        if not marker.is_file():
            return folder.stat().st_mtime, 0
        content = parsed_marker(marker.read_bytes())
        size = sum(file["size"] for file in content["files"].values()) if content else 0
        return marker.stat().st_mtime, size
    except OSError:
        return None
