"""`layersweep.json`: what a folder was cut from, written beside its weights."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from workers.errors import InvalidInput
from workers.surgery.model_files import read_json, write_json

PROVENANCE = "layersweep.json"
FORMAT = 1
"""Version of the file's layout."""
_PACKAGES = ("layersweep", "torch", "transformers", "peft", "safetensors")


def write_provenance(
    out: Path, source: dict[str, Any], layers: int, removed: Sequence[int], before: Path
) -> None:
    """Notes what was removed from what.

    Args:
        out: the new folder.
        source: `reference`, `revision` and `kind` of the model that was cut.
        layers: its decoder's layers.
        removed: those left out.
        before: its folder; if that was cut from another one, its story goes along.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "source": source,
        "layers": layers,
        "removed": list(removed),
        "kept": [i for i in range(layers) if i not in removed],
        "versions": _versions(),
    }
    if (before / PROVENANCE).is_file():
        content["before"] = read_json(before / PROVENANCE)
    write_json(out / PROVENANCE, content)


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """What `write_provenance` noted; None where nothing was cut.

    Raises:
        InvalidInput: the file is damaged, or of a later layout.
    """
    file = folder / PROVENANCE
    if not file.is_file():
        return None
    content = read_json(file)
    if content.get("format") != FORMAT:
        raise InvalidInput(
            f"the layout {content.get('format')!r} is not known",
            str(file),
            f"this version reads layout {FORMAT}",
        )
    return content


def original_layers(provenance: dict[str, Any]) -> list[int]:
    """For each layer there is, its number in the first model of the story."""
    kept: list[int] = provenance["kept"]
    if "before" not in provenance:
        return kept
    first = original_layers(provenance["before"])
    return [first[i] for i in kept]


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
