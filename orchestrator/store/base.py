"""What a store promises, wherever it lies: artefacts by kind and key, whole or not there at all."""

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from workers.checkpoints import Mirror

MARKER = "complete.json"
STAGE = "stage.json"
FEW = 24
"""Requests that are worth while for a guess."""


class CorruptArtefact(Exception):
    """An artefact whose files do not match its marker."""

    def __init__(self, message: str, kind: str, key: str) -> None:
        super().__init__(message)
        self.kind, self.key = kind, key


class StoreUnreachable(OSError):
    """The store does not answer, which says nothing of what is in it. Worth another try."""


class Artefacts(Protocol):
    """What reading artefacts takes: a store, or a snapshot of one."""

    def has(self, kind: str, key: str) -> bool:
        """Whether a complete artefact is there."""

    def path(self, kind: str, key: str) -> Path:
        """The folder with the artefact's files."""

    def read(self, kind: str, key: str, name: str) -> bytes:
        """One file of the artefact, its digest checked."""


class Store(ABC):
    """Artefacts by kind and key. Open one with `open_store`."""

    location: str
    """Folder or URL, as every process on every node can open it."""
    folder: Path
    """A folder of this machine: the store itself, or what an object store keeps here."""

    # --- artefacts -------------------------------------------------------------------------

    @abstractmethod
    def path(self, kind: str, key: str) -> Path:
        """A folder of this machine with the artefact's files.

        An object store's artefact is fetched if it is not here yet, every digest checked.

        Raises:
            CorruptArtefact: what an object store holds is not what was written; it is discarded.
            FileNotFoundError: an object store has no such artefact.
        """

    @abstractmethod
    def has(self, kind: str, key: str) -> bool:
        """Whether a complete artefact is there; sees what others committed a moment ago."""

    @abstractmethod
    def stage(self, kind: str, key: str) -> dict[str, Any]:
        """The artefact's `stage.json`: parameters, inputs, provenance, summary."""

    @abstractmethod
    def verify(self, kind: str, key: str) -> None:
        """Read every file and compare digests.

        Raises:
            CorruptArtefact: names the file that differs.
        """

    @abstractmethod
    def discard(self, kind: str, key: str) -> None:
        """Remove an artefact, marker first, so that it is gone at once."""

    @abstractmethod
    def begin(self, kind: str, key: str) -> Path:
        """A new empty folder of this machine to make the artefact in."""

    @abstractmethod
    def commit(self, temporary: Path, kind: str, key: str, stage: Mapping[str, Any]) -> Path:
        """Make the folder from `begin` the artefact; its marker is written last.

        Committing what is there already drops the new copy: same key, same result.

        Returns:
            Where its files lie on this machine.
        """

    @abstractmethod
    def keys(self, kind: str) -> Iterator[str]:
        """Keys of the complete artefacts of a kind, sorted."""

    def read(self, kind: str, key: str, name: str) -> bytes:
        """One file of an artefact, its digest checked.

        Raises:
            CorruptArtefact: it is not what was written.
        """
        try:
            folder = self.path(kind, key)
            files = (parsed_marker((folder / MARKER).read_bytes()) or {}).get("files", {})
            content = (folder / name).read_bytes()
        except StoreUnreachable:
            raise
        except OSError:
            self.reach()
            files, content = {}, b""
        if name not in files or hashlib.sha256(content).hexdigest() != files[name]["sha256"]:
            raise CorruptArtefact(f"{kind}/{key}/{name} is not what was written", kind, key)
        return content

    def traits(self, kind: str, key: str) -> object:
        """Sizes and times of an artefact's files here, to tell later whether any was touched since.

        None where a file is missing.
        """
        try:
            folder = self.path(kind, key)
            files = (parsed_marker((folder / MARKER).read_bytes()) or {}).get("files", {})
            stats = [(name, (folder / name).stat()) for name in (MARKER, *files)]
        except OSError:
            return None
        return [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]

    @abstractmethod
    def reach(self) -> None:
        """See that the store is there.

        Raises:
            StoreUnreachable: it is not.
        """

    # --- many at once ------------------------------------------------------------------------

    def recent(self, kind: str, count: int) -> Iterator[dict[str, Any]]:
        """`stage.json` of up to `count` artefacts of a kind, the newest where that is cheap to tell."""
        for key in islice(self.keys(kind), min(count, FEW)):
            with contextlib.suppress(OSError, ValueError, CorruptArtefact):
                yield self.stage(kind, key)

    @abstractmethod
    def snapshot(self) -> Artefacts:
        """The store as it is now, for looking at many artefacts: a listing a kind, not more."""

    @abstractmethod
    def refresh(self) -> None:
        """Forget what was seen: artefacts that others discarded are then missed at once."""

    def fetch(self, artefacts: Iterable[tuple[str, str]]) -> None:
        """Bring these (kind, key) to this machine, many at a time.

        Those not there are left out, and those found damaged are discarded.
        """
        del artefacts

    # --- beside the artefacts ----------------------------------------------------------------

    @abstractmethod
    def read_note(self, name: str) -> dict[str, Any] | None:
        """A small document kept beside the artefacts; None if there is none."""

    @abstractmethod
    def write_note(self, name: str, data: Mapping[str, Any]) -> None:
        """Keep or replace a small document, whole or not at all."""

    @abstractmethod
    def checkpoint_folder(self, kind: str, key: str) -> Path:
        """Where on this machine a stage keeps its checkpoints until it is done."""

    def checkpoint_mirror(self, kind: str, key: str) -> "Mirror | None":
        """Where copies of its checkpoints outlive this machine; None: the folder itself does."""
        del kind, key
        return None

    def log(self, run: str, name: str) -> str | None:
        """URL for an attempt's log; None: the run folder, which every node sees."""
        del run, name
        return None


def parsed_marker(text: str | bytes) -> dict[str, Any] | None:
    """A marker's content if it is one: `files` maps names to `sha256` and `size`."""
    try:
        marker = json.loads(text)
        files = marker["files"]
        for file in files.values():
            int(file["size"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(marker)


def described_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Digest and size in bytes of every file under a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": file_digest(path),
            "size": path.stat().st_size,
        }
        for path in sorted(p for p in folder.rglob("*") if p.is_file())
    }


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
