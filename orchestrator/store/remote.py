"""A store under a URL: objects whose marker comes last, read through a cache on the node's disk.

    <url>/<kind>/<key>/<place>/…         the files of one upload; `<place>` is new for each
    <url>/.complete/<kind>/<key>.json    the marker: digests of the files, and which place they are in
    <url>/.notes/…  .checkpoints/…  .logs/…

An object appears whole or not at all, and there is no renaming. So the marker alone makes an
artefact: what a killed upload left is in a place no marker names, and two workers that finish the
same stage cannot mix their files. Markers lie together, so that one listing shows what is done.
"""

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator.store.base import (
    MARKER,
    STAGE,
    CorruptArtefact,
    Store,
    described_files,
    parsed_marker,
)
from orchestrator.store.cache import Cache
from orchestrator.store.local import verify_folder
from orchestrator.store.objects import Objects, endpoint
from workers.errors import InvalidInput

HEADER = ".store.json"
LAYOUT = 1
FETCHES = 16
"""Artefacts fetched at once: each is a few requests that mostly wait."""


class CorruptDownload(OSError):
    """What arrived is not what was written, and another try may bring it whole."""


class RemoteStore(Store):
    """Artefacts in an object store.

    Args:
        location: URL, as in `s3://bucket/prefix`.

    Raises:
        InvalidInput: no such bucket, no right to it, or it was written by a newer version.
        StoreUnreachable: nobody answers.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        identity = hashlib.sha256(f"{endpoint(location)} {location}".encode()).hexdigest()
        self._cache = Cache(identity[:16])
        self.folder = self._cache.folder
        self._objects = Objects(location, pauses=())
        self._check_layout()
        self._objects = Objects(location)
        self._seen: set[tuple[str, str]] = set()
        self._sound: set[tuple[str, str]] = set()

    # --- artefacts -------------------------------------------------------------------------

    def path(self, kind: str, key: str) -> Path:
        """The artefact's folder in the cache, fetched if need be, its digests checked once."""
        cached = self._cache.hold(kind, key)
        if (kind, key) not in self._sound:
            if cached:
                try:
                    verify_folder(self._cache.path(kind, key), kind, key)
                except CorruptArtefact:
                    self._cache.drop(kind, key)
                    cached = False
            if not cached:
                self._fetch(kind, key)
            self._sound.add((kind, key))
        elif not cached:
            self._fetch(kind, key)
        return self._cache.path(kind, key)

    def has(self, kind: str, key: str) -> bool:
        """Whether a complete artefact is there. Asks once; what was there is not asked again."""
        if (kind, key) not in self._seen and self._objects.exists(_marker(kind, key)):
            self._seen.add((kind, key))
        return (kind, key) in self._seen

    def stage(self, kind: str, key: str) -> dict[str, Any]:
        """The artefact's `stage.json`, from the cache or alone."""
        try:
            text = (self._cache.path(kind, key) / STAGE).read_bytes()
        except OSError:
            text = self._objects.read(
                f"{kind}/{key}/{self._read_marker(kind, key)['place']}/{STAGE}"
            )
        data: dict[str, Any] = json.loads(text)
        return data

    def verify(self, kind: str, key: str) -> None:
        """Read every file, in the cache or in the store, and compare digests."""
        self._sound.discard((kind, key))
        try:
            self.path(kind, key)
        except FileNotFoundError as error:
            raise CorruptArtefact(f"{kind}/{key} has no valid {MARKER}", kind, key) from error

    def discard(self, kind: str, key: str) -> None:
        """Remove an artefact, marker first, from the store and from this machine."""
        self._seen.discard((kind, key))
        self._sound.discard((kind, key))
        place = None
        with contextlib.suppress(FileNotFoundError, CorruptArtefact):
            place = self._read_marker(kind, key)["place"]
        self._objects.delete(_marker(kind, key))
        self._cache.drop(kind, key)
        if place is not None:
            self._objects.delete_folder(f"{kind}/{key}/{place}")

    def begin(self, kind: str, key: str) -> Path:
        """A new empty folder in the cache."""
        return self._cache.temporary(kind, key)

    def commit(self, temporary: Path, kind: str, key: str, stage: Mapping[str, Any]) -> Path:
        """Upload the files to a place of their own, then the marker that names it."""
        (temporary / STAGE).write_text(json.dumps(stage, indent=1, sort_keys=True))
        self._seen.discard((kind, key))
        if self.has(kind, key):
            shutil.rmtree(temporary, ignore_errors=True)
            return self.path(kind, key)
        place = uuid.uuid4().hex[:12]
        files = described_files(temporary)
        for name in files:
            self._objects.upload(temporary / name, f"{kind}/{key}/{place}/{name}")
        marker = {"kind": kind, "key": key, "place": place, "files": files}
        text = json.dumps(marker, indent=1)
        if self.has(kind, key):  # another worker was first while we uploaded
            self._objects.delete_folder(f"{kind}/{key}/{place}")
            shutil.rmtree(temporary, ignore_errors=True)
            return self.path(kind, key)
        self._objects.write(_marker(kind, key), text.encode())
        self._seen.add((kind, key))
        (temporary / MARKER).write_text(text)
        self._cache.make_room(_bytes(marker))
        self._cache.drop(kind, key)
        self._cache.admit(temporary, kind, key)
        return self.path(kind, key)

    def keys(self, kind: str) -> Iterator[str]:
        """Keys of the complete artefacts of a kind, sorted: one listing."""
        found = [n.removesuffix(".json") for n in self._objects.names(f".complete/{kind}")]
        self._seen.update((kind, key) for key in found)
        return iter(sorted(found))

    def reach(self) -> None:
        """Ask for the store's header."""
        self._objects.read(HEADER)

    # --- many at once ------------------------------------------------------------------------

    def snapshot(self) -> "RemoteSnapshot":
        """The store as it is now, by one listing a kind."""
        return RemoteSnapshot(self)

    def refresh(self) -> None:
        """Forget what was seen."""
        self._seen.clear()

    def fetch(self, artefacts: Iterable[tuple[str, str]]) -> None:
        """Bring these to the cache, several at a time."""

        def bring(artefact: tuple[str, str]) -> None:
            with contextlib.suppress(FileNotFoundError, CorruptArtefact):
                self.path(*artefact)

        wanted = [a for a in dict.fromkeys(artefacts) if a not in self._sound]
        with ThreadPoolExecutor(FETCHES) as pool:
            for _ in pool.map(bring, wanted):
                pass

    # --- beside the artefacts ----------------------------------------------------------------

    def read_note(self, name: str) -> dict[str, Any] | None:
        """A small document kept beside the artefacts; None if there is none."""
        try:
            data: dict[str, Any] = json.loads(self._objects.read(f".notes/{name}.json"))
        except FileNotFoundError:
            return None
        return data

    def write_note(self, name: str, data: Mapping[str, Any]) -> None:
        """Keep or replace a small document, whole or not at all."""
        self._objects.write(f".notes/{name}.json", json.dumps(dict(data)).encode())

    def checkpoint_folder(self, kind: str, key: str) -> Path:
        """In the cache; the mirror outlives it."""
        return self._cache.folder / kind / f".{key}.checkpoint"

    def checkpoint_mirror(self, kind: str, key: str) -> "CheckpointMirror":
        """Copies in the store, for whichever node goes on."""
        return CheckpointMirror(self._objects, f".checkpoints/{kind}/{key}")

    def log(self, run: str, name: str) -> str:
        """URL for an attempt's log: a node need not see the run folder."""
        return f"{self.location}/.logs/{run}/{name}"

    # --- fetching ----------------------------------------------------------------------------

    def _fetch(self, kind: str, key: str) -> None:
        try:
            marker = self._read_marker(kind, key)
        except CorruptArtefact:
            self.discard(kind, key)
            raise
        try:
            self._fetch_place(kind, key, marker)
        except CorruptArtefact:
            if self._read_marker(kind, key)["place"] != marker["place"]:
                self._fetch(kind, key)  # it was made anew while we read the old one
                return
            self.discard(kind, key)
            raise

    def _fetch_place(self, kind: str, key: str, marker: dict[str, Any]) -> None:
        self._cache.make_room(_bytes(marker))
        temporary = self._cache.temporary(kind, key)
        try:
            for name, expected in marker["files"].items():
                file = temporary / name
                file.parent.mkdir(parents=True, exist_ok=True)
                self._download(kind, key, f"{marker['place']}/{name}", file, expected["sha256"])
            (temporary / MARKER).write_text(json.dumps(marker, indent=1))
            self._cache.admit(temporary, kind, key)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _download(self, kind: str, key: str, inside: str, file: Path, expected: str) -> None:
        """Fetch a file whose digest is known.

        Raises:
            CorruptArtefact: it is missing, or the same wrong bytes came twice: they are the store's.
            CorruptDownload: other bytes came each time.
        """
        name = f"{kind}/{key}/{inside}"
        try:
            digest = self._objects.download(name, file)
            if digest == expected:
                return
            again = self._objects.download(name, file)
        except FileNotFoundError:
            raise CorruptArtefact(f"{name} is missing in {self.location}", kind, key) from None
        if again == expected:
            return
        if again == digest:
            raise CorruptArtefact(f"{name} is not what was written", kind, key)
        raise CorruptDownload(f"{name} arrived damaged, twice, from {self.location}")

    def _read_marker(self, kind: str, key: str) -> dict[str, Any]:
        marker = parsed_marker(self._objects.read(_marker(kind, key)))
        if marker is None or not isinstance(marker.get("place"), str):
            raise CorruptArtefact(f"{kind}/{key} has no valid {MARKER}", kind, key)
        for name in (marker["place"], *marker["files"]):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise CorruptArtefact(
                    f"{kind}/{key}: its {MARKER} names a file outside of it", kind, key
                )
        return marker

    def _check_layout(self) -> None:
        try:
            layout = json.loads(self._objects.read(HEADER))["layout"]
        except FileNotFoundError:
            self._objects.write(HEADER, json.dumps({"layout": LAYOUT}).encode())
            return
        except (ValueError, KeyError, TypeError):
            layout = "unknown"
        if layout != LAYOUT:
            raise InvalidInput(
                f"the store has layout {layout}, and this version reads layout {LAYOUT}",
                f"--store {self.location}",
                "use the version of layersweep that wrote it, or another prefix",
            )


class RemoteSnapshot:
    """An object store as it was when each kind was first asked for."""

    def __init__(self, store: RemoteStore) -> None:
        self._store = store
        self._keys: dict[str, set[str]] = {}

    def has(self, kind: str, key: str) -> bool:
        """Whether a complete artefact was there."""
        if kind not in self._keys:
            self._keys[kind] = set(self._store.keys(kind))
        return key in self._keys[kind]

    def path(self, kind: str, key: str) -> Path:
        """The artefact's folder in the cache."""
        return self._store.path(kind, key)

    def read(self, kind: str, key: str, name: str) -> bytes:
        """One file of the artefact, its digest checked."""
        return self._store.read(kind, key, name)


class CheckpointMirror:
    """Copies of one stage's checkpoints, as objects."""

    def __init__(self, objects: Objects, folder: str) -> None:
        self._objects, self._folder = objects, folder

    def names(self) -> list[str]:
        """Names of the files that are there."""
        return self._objects.names(self._folder)

    def download(self, name: str, file: Path) -> None:
        """Write one to a file of this machine."""
        self._objects.download(f"{self._folder}/{name}", file)

    def upload(self, file: Path) -> None:
        """Keep a copy under the file's own name."""
        self._objects.upload(file, f"{self._folder}/{file.name}")

    def remove(self, name: str) -> None:
        """Forget one."""
        self._objects.delete(f"{self._folder}/{name}")


def _marker(kind: str, key: str) -> str:
    return f".complete/{kind}/{key}.json"


def _bytes(marker: Mapping[str, Any]) -> int:
    return sum(file["size"] for file in marker["files"].values())
