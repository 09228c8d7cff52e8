"""What a submitted sweep takes to the cluster: this program and the resolved sweep, nothing else.

Stores, runs, data and git's own files stay here. The archive is the same, byte for byte, for the same
code and sweep, so that a cluster which has it is not sent it again.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import yaml

from orchestrator.sources import HUB_ID
from orchestrator.sweep import Sweep
from workers.errors import InvalidInput

PACKAGES = ("cluster", "orchestrator", "workers")
SWEEP = "sweep.yaml"
MOST_BYTES = 100 * 2**20
"""What Ray's Jobs API takes."""
EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Shipped:
    """A packed archive."""

    path: Path
    files: int
    size: int
    """In bytes."""


def pack(sweep: Sweep, path: Path) -> Shipped:
    """Write the archive of program and sweep.

    Raises:
        InvalidInput: it is larger than a cluster takes; names the largest file.
    """
    contents = dict(sorted(_contents(sweep)))
    temporary = path.with_name(f".{path.name}.part")
    with zipfile.ZipFile(temporary, "w") as archive:
        for name, content in contents.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    size = temporary.stat().st_size
    if size > MOST_BYTES:
        temporary.unlink()
        largest = max(contents, key=lambda name: len(contents[name]))
        raise InvalidInput(
            f"the program is {size / 2**20:.0f} MiB packed; a cluster takes "
            f"{MOST_BYTES / 2**20:.0f} MiB",
            largest,
            "keep data out of the program's own folders",
        )
    temporary.replace(path)
    return Shipped(path, len(contents), size)


def _contents(sweep: Sweep) -> Iterator[tuple[str, bytes]]:
    for package in PACKAGES:
        file = import_module(package).__file__
        assert file is not None
        folder = Path(file).parent
        for path in folder.rglob("*"):
            name = Path(package, path.relative_to(folder))
            hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
            if path.is_file() and not hidden:
                yield name.as_posix(), path.read_bytes()
    # So that importlib.metadata finds the version where the program is not installed.
    release = version("layersweep")
    metadata = f"Metadata-Version: 2.1\nName: layersweep\nVersion: {release}\n"
    yield f"layersweep-{release}.dist-info/METADATA", metadata.encode()
    text = yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    yield SWEEP, text.encode()


def refuse_local_paths(sweep: Sweep, base: Path) -> None:
    """Refuse models and data that the cluster cannot find under the name the sweep gives them.

    Args:
        sweep: the sweep.
        base: folder its relative paths start from.

    Raises:
        InvalidInput: there are some; a line each.
    """
    wrong = []
    for where, reference, may_be_on_hub in _references(sweep):
        if reference.startswith(("lab:", "/")):
            continue
        if may_be_on_hub and HUB_ID.fullmatch(reference) and not (base / reference).exists():
            continue
        wrong.append(f"{where}: {reference} is a path of this machine; the sweep runs on another")
    if wrong:
        remedy = (
            "copy it to storage that every node of the cluster sees, and give its absolute path "
            "there (in a manifest, the audio's too); lab:NAME and hub ids need no copy"
        )
        raise InvalidInput("\n".join([*wrong, f"({remedy})"]))


def _references(sweep: Sweep) -> Iterator[tuple[str, str, bool]]:
    """Each model and data file: where it stands, what it says, whether it may be a hub id."""
    for i, model in enumerate(sweep.models):
        key = "speechllm" if model.decoder is None else "decoder"
        yield f"sweep.models[{i}].{key}", model.reference, True
    for i, encoder in enumerate(sweep.encoders):
        yield f"sweep.encoders[{i}].encoder", encoder.encoder, True
    for i, task in enumerate(sweep.tasks):
        for key, reference in (("train", task.train), ("dev", task.dev)):
            if reference is not None:
                yield f"sweep.tasks[{i}].{key}", reference, False
        for j, test in enumerate(task.test or ()):
            yield f"sweep.tasks[{i}].test[{j}].data", test.data, False
