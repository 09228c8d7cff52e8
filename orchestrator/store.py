"""The store: a folder of artefacts, the only truth there is.

`<root>/<kind>/<key>/` holds an artefact, its `stage.json` and, written last, `complete.json` with a
digest of every file. Work happens in a temporary sibling that is flushed and renamed; whatever has
no valid marker does not exist.
"""

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


class CorruptArtefact(Exception):
    """An artefact whose files do not match its marker."""


class Store:
    """Artefacts by kind and key.

    Args:
        root: the store's folder; made when missing.

    Raises:
        InvalidInput: the folder cannot be made or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InvalidInput(
                f"the store cannot be written: {error.strerror or error}",
                f"--store {root}",
                "name a folder you may write to",
            ) from None

    def path(self, kind: str, key: str) -> Path:
        """Where the artefact lies, or would lie."""
        return self.root / kind / key

    def has(self, kind: str, key: str) -> bool:
        """Whether a complete artefact is there (marker valid, files of the right sizes)."""
        folder = self.path(kind, key)
        files = _marker(folder)
        if files is None:
            return False
        try:
            return all((folder / name).stat().st_size == f["size"] for name, f in files.items())
        except OSError:
            return False

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
            raise CorruptArtefact(f"{kind}/{key} has no valid {MARKER}")
        for name, expected in files.items():
            try:
                digest = file_digest(folder / name)
            except OSError as error:
                raise CorruptArtefact(f"{kind}/{key}/{name}: {error.strerror}") from None
            if digest != expected["sha256"]:
                raise CorruptArtefact(f"{kind}/{key}/{name} is not what was written")

    def discard(self, kind: str, key: str) -> None:
        """Remove an artefact, marker first, so that it is gone at once."""
        folder = self.path(kind, key)
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def begin(self, kind: str, key: str) -> Path:
        """A new empty temporary folder beside the artefact's place."""
        parent = self.root / kind
        parent.mkdir(parents=True, exist_ok=True)
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
