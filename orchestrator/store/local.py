"""A store in a folder, on this machine or on a path every node has mounted.

`<root>/<kind>/<key>/` holds an artefact, its `stage.json` and its marker, `complete.json`. Work
happens in a temporary sibling that is flushed and renamed.
"""

import contextlib
import heapq
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.store.base import (
    MARKER,
    STAGE,
    CorruptArtefact,
    Store,
    StoreUnreachable,
    described_files,
    file_digest,
    parsed_marker,
)
from workers.errors import InvalidInput

IDENTITY = ".layersweep-store"
"""A file in every folder store's root."""


class LocalStore(Store):
    """Artefacts in a folder.

    Args:
        root: the store's folder.
        new: make it when it is missing.

    Raises:
        InvalidInput: the folder cannot be made or written.
        StoreUnreachable: it isn't there, and is not to be made.
    """

    def __init__(self, root: Path, *, new: bool = True) -> None:
        self.folder = root.absolute()
        self.location = str(self.folder)
        if not new:
            self.reach()
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
            (self.folder / IDENTITY).touch()
        except OSError as error:
            raise InvalidInput(
                f"the store cannot be written: {error.strerror or error}",
                f"--store {root}",
                "name a folder you may write to",
            ) from None

    def path(self, kind: str, key: str) -> Path:
        """Where the artefact lies, or would lie."""
        return self.folder / kind / key

    def has(self, kind: str, key: str) -> bool:
        """Whether a complete artefact is there (marker valid, files of the right sizes)."""
        if is_complete(f"{self.location}/{kind}/{key}"):
            return True
        self.reach()
        return False

    def reach(self) -> None:
        """See that the folder is there, and is the store: a mount that has gone leaves an empty one."""
        try:
            os.stat(f"{self.location}/{IDENTITY}")  # noqa: PTH116 - asked for each artefact not there
        except OSError as error:
            raise StoreUnreachable(
                f"the store {self.location} cannot be reached: {error.strerror}"
            ) from None

    def stage(self, kind: str, key: str) -> dict[str, Any]:
        """The artefact's `stage.json`: parameters, inputs, provenance, summary."""
        data: dict[str, Any] = json.loads((self.path(kind, key) / STAGE).read_text())
        return data

    def verify(self, kind: str, key: str) -> None:
        """Read every file and compare digests."""
        try:
            verify_folder(self.path(kind, key), kind, key)
        except CorruptArtefact:
            self.reach()
            raise

    def discard(self, kind: str, key: str) -> None:
        """Remove an artefact, marker first, so that it is gone at once."""
        folder = self.path(kind, key)
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def begin(self, kind: str, key: str) -> Path:
        """A new empty temporary folder beside the artefact's place."""
        self.reach()
        parent = self.folder / kind
        parent.mkdir(exist_ok=True)
        temporary = parent / f".{key}.{uuid.uuid4().hex[:8]}.tmp"
        temporary.mkdir()
        return temporary

    def commit(self, temporary: Path, kind: str, key: str, stage: Mapping[str, Any]) -> Path:
        """Make the temporary folder the artefact: digests, marker, flush, rename."""
        (temporary / STAGE).write_text(json.dumps(stage, indent=1, sort_keys=True))
        files = described_files(temporary)
        for name in files:
            _flush(temporary / name)
        marker = temporary / MARKER
        marker.write_text(json.dumps({"kind": kind, "key": key, "files": files}, indent=1))
        _flush(marker)
        _flush(temporary)
        final = self.path(kind, key)
        if final.exists() and not self.has(kind, key):
            self.discard(kind, key)
        try:
            temporary.rename(final)
        except OSError:
            # Somebody else finished the same stage first; theirs stands.
            if not self.has(kind, key):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
        _flush(final.parent)
        return final

    def keys(self, kind: str) -> Iterator[str]:
        """Keys of the complete artefacts of a kind, sorted."""
        known = self.snapshot()
        return (key for key in sorted(known.listed(kind)) if known.has(kind, key))

    def recent(self, kind: str, count: int) -> Iterator[dict[str, Any]]:
        """`stage.json` of the artefacts of a kind that were written last."""
        try:
            with os.scandir(self.folder / kind) as entries:
                found = [(e.stat().st_mtime, e.path) for e in entries if not e.name.startswith(".")]
        except OSError:
            return
        for _, path in heapq.nlargest(count, found):
            with contextlib.suppress(OSError, ValueError):
                yield json.loads((Path(path) / STAGE).read_text())

    def snapshot(self) -> "LocalSnapshot":
        """The store as it is now: a listing a kind, and one look at what is listed."""
        return LocalSnapshot(self)

    def refresh(self) -> None:
        """Nothing is remembered: the folder is looked at each time."""

    def read_note(self, name: str) -> dict[str, Any] | None:
        """A small document kept beside the artefacts; None if there is none."""
        try:
            data: dict[str, Any] = json.loads(self._note(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.reach()
            return None
        return data

    def write_note(self, name: str, data: Mapping[str, Any]) -> None:
        """Keep or replace a small document, whole or not at all."""
        path = self._note(name)
        self.reach()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        temporary.write_text(json.dumps(dict(data)), encoding="utf-8")
        _flush(temporary)
        temporary.replace(path)

    def checkpoint_folder(self, kind: str, key: str) -> Path:
        """Beside the artefact's place: seen by whichever node goes on."""
        return self.folder / kind / f".{key}.checkpoint"

    def _note(self, name: str) -> Path:
        return self.folder / ".notes" / f"{name}.json"


class LocalSnapshot:
    """A folder store as it is now; each artefact is looked at once, however often it is asked for."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self._listed: dict[str, set[str]] = {}
        self._complete: dict[tuple[str, str], bool] = {}

    def listed(self, kind: str) -> set[str]:
        """Keys that have a folder, complete or not."""
        if kind not in self._listed:
            try:
                names = os.listdir(self._store.folder / kind)  # noqa: PTH208 - 100,000 strings
            except OSError:
                self._store.reach()
                names = []
            self._listed[kind] = {name for name in names if not name.startswith(".")}
        return self._listed[kind]

    def has(self, kind: str, key: str) -> bool:
        """Whether a complete artefact is there, by the same rule as the store's own."""
        if key not in self.listed(kind):
            return False
        known = self._complete.get((kind, key))
        if known is None:
            known = self._complete[kind, key] = self._store.has(kind, key)
        return known

    def path(self, kind: str, key: str) -> Path:
        """Where the artefact lies."""
        return self._store.path(kind, key)

    def read(self, kind: str, key: str, name: str) -> bytes:
        """One file of the artefact, its digest checked."""
        return self._store.read(kind, key, name)


def is_complete(folder: str) -> bool:
    """Whether a folder has a valid marker and files of the sizes it names.

    Bare system calls: a sweep that is resumed asks this 100,000 times, and pathlib takes twice as
    long (69 against 34 µs an artefact of five files).
    """
    try:
        descriptor = os.open(f"{folder}/{MARKER}", os.O_RDONLY)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            marker = parsed_marker(file.readall() or b"")
        if marker is None:
            return False
        files = marker["files"]
        return all(os.stat(f"{folder}/{name}").st_size == f["size"] for name, f in files.items())  # noqa: PTH116
    except OSError:
        return False


def verify_folder(folder: Path, kind: str, key: str) -> None:
    """Read every file of an artefact's folder and compare digests.

    Raises:
        CorruptArtefact: names the file that differs.
    """
    try:
        marker = parsed_marker((folder / MARKER).read_bytes())
    except OSError:
        marker = None
    if marker is None:
        raise CorruptArtefact(f"{kind}/{key} has no valid {MARKER}", kind, key)
    for file, expected in marker["files"].items():
        try:
            digest = file_digest(folder / file)
        except OSError as error:
            raise CorruptArtefact(f"{kind}/{key}/{file}: {error.strerror}", kind, key) from None
        if digest != expected["sha256"]:
            raise CorruptArtefact(f"{kind}/{key}/{file} is not what was written", kind, key)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
