"""The store: a folder of artefacts, the only truth there is.

`<root>/<kind>/<key>/` holds an artefact, its `stage.json` and, written last, `complete.json` with a
digest of every file. Work happens in a temporary sibling that is flushed and renamed; whatever has
no valid marker does not exist.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workers.errors import InvalidInput

MARKER = "complete.json"
STAGE = "stage.json"
NOTES = ".notes"
IDENTITY = ".layersweep-store"
"""A file in every store's root: a mount that has gone leaves an empty folder behind, without it."""


class CorruptArtefact(Exception):
    """An artefact whose files do not match its marker."""

    def __init__(self, message: str, kind: str, key: str) -> None:
        super().__init__(message)
        self.kind, self.key = kind, key


class StoreUnreachable(OSError):
    """The store cannot be reached at the moment: nothing can be said of what is in it."""


class Store:
    """Artefacts by kind and key.

    Args:
        root: the store's folder.
        new: make it when it is missing.

    Raises:
        InvalidInput: the folder cannot be made or written.
        StoreUnreachable: it isn't there, and is not to be made.
    """

    def __init__(self, root: Path, *, new: bool = True) -> None:
        self.root = root.absolute()
        if not new:
            self.reach()
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
            (self.root / IDENTITY).touch()
        except OSError as error:
            raise InvalidInput(
                f"the store cannot be written: {error.strerror or error}",
                f"--store {root}",
                "name a folder you may write to",
            ) from None

    @property
    def location(self) -> str:
        """How another process opens it."""
        return str(self.root)

    def path(self, kind: str, key: str) -> Path:
        """Where the artefact lies, or would lie."""
        return self.root / kind / key

    def has(self, kind: str, key: str) -> bool:
        """Whether a complete artefact is there (marker valid, files of the right sizes).

        Raises:
            StoreUnreachable: the store itself is away, so that nobody can tell.
        """
        folder = self.path(kind, key)
        files = _marker(folder)
        if files is not None:
            with contextlib.suppress(OSError):
                return all((folder / name).stat().st_size == f["size"] for name, f in files.items())
        self.reach()
        return False

    def reach(self) -> None:
        """Check that the store is there.

        Raises:
            StoreUnreachable: it is not.
        """
        try:
            (self.root / IDENTITY).stat()
        except OSError as error:
            raise StoreUnreachable(
                error.errno, f"the store {self.root} cannot be reached: {error.strerror}"
            ) from None

    def read(self, kind: str, key: str, name: str) -> bytes:
        """One file of an artefact, its digest checked.

        Raises:
            CorruptArtefact: it is not what was written.
        """
        folder = self.path(kind, key)
        expected = (_marker(folder) or {}).get(name)
        try:
            content = (folder / name).read_bytes()
        except OSError:
            self.reach()
            content = b""
        if expected is None or hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise CorruptArtefact(f"{kind}/{key}/{name} is not what was written", kind, key)
        return content

    def stage(self, kind: str, key: str) -> dict[str, Any]:
        """The artefact's `stage.json`: parameters, inputs, provenance, summary."""
        data: dict[str, Any] = json.loads((self.path(kind, key) / STAGE).read_text())
        return data

    def verify(self, kind: str, key: str) -> None:
        """Read every file and compare digests.

        Raises:
            CorruptArtefact: names the file that differs.
        """
        folder = self.path(kind, key)
        files = _marker(folder)
        if files is None:
            self.reach()
            raise CorruptArtefact(f"{kind}/{key} has no valid {MARKER}", kind, key)
        for name, expected in files.items():
            try:
                digest = file_digest(folder / name)
            except OSError as error:
                self.reach()
                raise CorruptArtefact(f"{kind}/{key}/{name}: {error.strerror}", kind, key) from None
            if digest != expected["sha256"]:
                raise CorruptArtefact(f"{kind}/{key}/{name} is not what was written", kind, key)

    def traits(self, kind: str, key: str) -> object:
        """Sizes and times of an artefact's files, to tell later whether any was touched since.

        None where a file is missing.
        """
        folder = self.path(kind, key)
        try:
            stats = [(name, (folder / name).stat()) for name in (MARKER, *(_marker(folder) or ()))]
        except OSError:
            return None
        return [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]

    def discard(self, kind: str, key: str) -> None:
        """Remove an artefact, marker first, so that it is gone at once."""
        folder = self.path(kind, key)
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def begin(self, kind: str, key: str) -> Path:
        """A new empty temporary folder beside the artefact's place."""
        self.reach()
        parent = self.root / kind
        parent.mkdir(exist_ok=True)
        temporary = parent / f".{key}.{uuid.uuid4().hex[:8]}.tmp"
        temporary.mkdir()
        return temporary

    def commit(self, temporary: Path, kind: str, key: str, stage: Mapping[str, Any]) -> Path:
        """Make the temporary folder the artefact: digests, marker, flush, rename.

        Committing what is there already drops the new copy: same key, same result.
        """
        (temporary / STAGE).write_text(json.dumps(stage, indent=1, sort_keys=True))
        files = {}
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            files[path.relative_to(temporary).as_posix()] = {
                "sha256": file_digest(path),
                "size": path.stat().st_size,
            }
            _flush(path)
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

    # --- notes: small documents that drivers and workers tell each other by -----------------

    def read_note(self, name: str) -> dict[str, Any] | None:
        """A note; None if there is none.

        Raises:
            StoreUnreachable: the store is away.
        """
        try:
            note: dict[str, Any] = json.loads((self.root / NOTES / f"{name}.json").read_text())
        except (OSError, ValueError):
            self.reach()
            return None
        return note

    def write_note(self, name: str, note: Mapping[str, Any]) -> None:
        """Replace a note at once."""
        folder = self.root / NOTES
        folder.mkdir(exist_ok=True)
        temporary = folder / f".{name}.{uuid.uuid4().hex[:8]}"
        temporary.write_text(json.dumps(note))
        temporary.replace(folder / f"{name}.json")

    def keys(self, kind: str) -> Iterator[str]:
        """Keys of the complete artefacts of a kind."""
        folder = self.root / kind
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if not path.name.startswith(".") and self.has(kind, path.name):
                    yield path.name


def _marker(folder: Path) -> dict[str, Any] | None:
    try:
        files: dict[str, Any] = json.loads((folder / MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return files if isinstance(files, dict) else None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
