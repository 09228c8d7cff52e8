"""Where models and data come from, and their fingerprints: checked at plan time, before any job.

A reference in a sweep is `lab:NAME`, a path relative to the sweep file, or a hub id.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.store import file_digest
from workers.errors import InvalidInput
from workers.manifest import read_manifest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Weights or data from outside the store."""

    path: str
    """Absolute path, or hub id."""
    fingerprint: str
    revision: str | None = None
    """Commit of a hub repository; None for local files."""


class DigestCache:
    """Content digests of local files, remembered by (path, size, modification time)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, list[Any]] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._known = {}
        self._changed = False

    def digest(self, file: Path) -> str:
        """SHA-256 of the file's bytes."""
        stat = file.stat()
        known = self._known.get(str(file))
        if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return str(known[2])
        digest = file_digest(file)
        self._known[str(file)] = [stat.st_size, stat.st_mtime_ns, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        """Write what was learnt; a cache, so a failure to write costs only time."""
        if self._changed:
            temporary = self._path.with_suffix(".tmp")
            try:
                temporary.write_text(json.dumps(self._known))
                temporary.replace(self._path)
            except OSError:
                return


def model_source(
    reference: str, revision: str | None, base: Path, where: str, digests: DigestCache
) -> Source:
    """A decoder or encoder folder, local or on the hub.

    Raises:
        InvalidInput: no such folder, no `config.json` in it, or the hub cannot be asked.
    """
    folder = (base / reference).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InvalidInput(
                f"{reference} has no config.json",
                where,
                "name a folder that from_pretrained can open",
            )
        return Source(str(folder.absolute()), _folder_digest(folder, digests))
    if HUB_ID.fullmatch(reference) and not reference.startswith("."):
        commit = _hub_commit(reference, revision, where)
        return Source(reference, f"hub:{reference}@{commit}", commit)
    raise InvalidInput(
        f"no folder {folder.absolute()}",
        where,
        "paths are relative to the sweep file; lab:NAME and org/name (hub) work too",
    )


def model_config(source: Source, where: str) -> dict[str, Any]:
    """The content of a model's `config.json`.

    Raises:
        InvalidInput: it cannot be read.
    """
    path = _model_file(source, "config.json")
    try:
        if path is None:
            raise OSError("no such file")
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInput(f"config.json cannot be read: {error}", where) from None


def brings_adapter(source: Source) -> bool:
    """Whether a peft adapter lies beside a model's weights."""
    return _model_file(source, "adapter_config.json") is not None


def decoder_layers(source: Source, config: dict[str, Any], where: str) -> int:
    """Number of layers of a decoder, from its `config.json` alone.

    Args:
        source: where it is.
        config: content of its `config.json`.
        where: dotted path of the setting, for errors.

    Raises:
        InvalidInput: the file has no layer count.
    """
    for place in (config, config.get("text_config") or {}):
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(place.get(name), int):
                return int(place[name])
    if isinstance(config.get("text_config"), dict):  # it may leave out what is its family's default
        from transformers import AutoConfig

        try:
            whole = AutoConfig.from_pretrained(source.path, revision=source.revision)
            return int(whole.get_text_config(decoder=True).num_hidden_layers)
        except (OSError, ValueError, KeyError, AttributeError):
            pass
    raise InvalidInput("config.json names no number of layers", where, "is this a decoder?")


def manifest_source(
    reference: str, base: Path, where: str, digests: DigestCache, check: Callable[[Any], None]
) -> Source:
    """A manifest and the audio it names.

    Args:
        reference: path of the JSONL file.
        base: folder that relative paths start from.
        where: dotted path of the setting, for errors.
        digests: remembered digests.
        check: called with each utterance; raises what the task finds missing in it.

    Raises:
        InvalidInput: no such file, a bad line, a missing audio file, or nothing in it.
    """
    path = (base / reference).expanduser()
    if not path.is_file():
        raise InvalidInput(
            f"no manifest {path.absolute()}", where, "paths are relative to the sweep file"
        )
    try:
        utterances = read_manifest(path)
    except InvalidInput as error:
        raise InvalidInput(f"{error.where}: {error.problem}", where, error.remedy) from None
    whole = hashlib.sha256(path.read_bytes())
    for audio in dict.fromkeys(u.audio_path for u in utterances):
        assert audio is not None
        whole.update(digests.digest(audio).encode())
    for utterance in utterances:
        check(utterance)
    return Source(str(path.absolute()), f"manifest:{whole.hexdigest()[:32]}")


def _model_file(source: Source, name: str) -> Path | None:
    """One file of a model; None if it has no such file."""
    if source.revision is None:
        path = Path(source.path) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(source.path, name, revision=source.revision))
    except EntryNotFoundError:
        return None


def _folder_digest(folder: Path, digests: DigestCache) -> str:
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts):
            continue
        whole.update(f"{relative.as_posix()}\0{digests.digest(path)}\n".encode())
    return f"folder:{whole.hexdigest()[:32]}"


def _hub_commit(reference: str, revision: str | None, where: str) -> str:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        commit = HfApi().model_info(reference, revision=revision, timeout=20).sha
        if commit:
            return str(commit)
    except RepositoryNotFoundError:
        raise InvalidInput(
            f"the hub has no model {reference} (or your token may not see it)",
            where,
            "check the name, and `layersweep doctor` for hub access",
        ) from None
    except (HfHubHTTPError, OSError):
        pass
    except Exception as error:  # noqa: BLE001 - the client raises its transport's own types
        if "connect" not in f"{type(error).__name__} {error}".lower():
            raise InvalidInput(f"the hub refused {reference}: {error}", where) from None
    try:
        cached = hf_hub_download(reference, "config.json", revision=revision, local_files_only=True)
        return Path(cached).parent.name
    except Exception:  # noqa: BLE001 - whatever the cache lacks, the answer is the same
        raise InvalidInput(
            f"no folder {reference}, and the hub cannot be reached to ask for it",
            where,
            "paths are relative to the sweep file; for a hub model see `layersweep doctor`",
        ) from None
