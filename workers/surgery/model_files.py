"""The files of a model: fetching them, telling which hold weights, and taking the rest along.

What is cut from weights is `shards`' business; here nothing is opened that a header does not tell.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from workers.errors import InvalidInput, first_line

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

# Weights in other formats: pickles are never read, and none of them would be cut.
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_OTHER_WEIGHTS = ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite")
# Mistral's own layout describes weights (consolidated.safetensors) that are not taken along.
_STALE = ("*.safetensors", "*.index.json", "params.json")
# Cut, or written anew where they belong.
_REWRITTEN = (
    CONFIG,
    INDEX,
    ADAPTER,
    ADAPTER_CONFIG,
    "layersweep.json",
    "projector.safetensors",
    "speechllm.json",
)
# The one sub-folder transformers reads beside a model's own files.
_SUBFOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine."""

    folder: Path
    commit: str | None = None
    """Of the hub repository; None for a folder."""


def fetch(
    reference: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> ModelFiles:
    """A folder as it is; of a hub repository what transformers would read, safetensors alone.

    Raises:
        InvalidInput: the hub cannot be asked, or does not have it.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return ModelFiles(folder)
    unread = [*_PICKLED, *_OTHER_WEIGHTS]
    if not trust_remote_code:
        unread.append("*.py")
    try:
        place = Path(
            snapshot_download(
                reference, revision=revision, ignore_patterns=[*unread, "*.safetensors"]
            )
        )
        wanted = [WEIGHTS, ADAPTER, "decoder/*", "encoder/*", "adapter/*", "projector.safetensors"]
        if (place / INDEX).is_file():
            wanted += set(_weight_map(place / INDEX).values())
        # By commit, so that both downloads are of one state of the repository.
        place = Path(
            snapshot_download(
                reference, revision=place.name, allow_patterns=wanted, ignore_patterns=unread
            )
        )
    except InvalidInput:
        raise
    except Exception as error:  # noqa: BLE001 - the client raises its transport's own types
        raise InvalidInput(
            f"it cannot be fetched from the hub: {first_line(error)}",
            reference,
            "check the name; `layersweep doctor` tests hub access",
        ) from None
    return ModelFiles(place, place.name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights, in their order.

    Raises:
        InvalidInput: there are none, some are missing, or the index is damaged.
    """
    # Where there are both, transformers reads the one file and not the index.
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = sorted(set(_weight_map(folder / INDEX).values()))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise InvalidInput(
                    f"the index names {name}, which is not there",
                    str(folder / INDEX),
                    "copy or download the model again",
                )
        return [folder / name for name in names]
    others = sorted(
        path.name
        for path in folder.iterdir()
        if any(fnmatch(path.name, pattern) for pattern in (*_PICKLED, *_OTHER_WEIGHTS))
    )
    held = f"; it holds {', '.join(others[:3])}, which is not read" if others else ""
    raise InvalidInput(
        f"there are no weights in safetensors{held}",
        str(folder),
        f"save the model as {WEIGHTS} (save_pretrained does)",
    )


def refuse_quantised(folder: Path) -> None:
    """Quantised weights are packed by a backend, and what is cut from them cannot be checked here.

    Raises:
        InvalidInput: the configuration describes a quantisation, or cannot be read.
    """

    def search(part: Any) -> Any:
        if not isinstance(part, dict):
            return None
        for name in ("quantization_config", "compression_config"):
            if part.get(name):
                return part[name]
        return next((found for value in part.values() if (found := search(value))), None)

    found = search(read_json(folder / CONFIG))
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise InvalidInput(
            f"its weights are quantised ({method or 'method not named'}): they are packed for one "
            "backend, and a cut cannot be checked without it",
            str(folder / CONFIG),
            "prune the unquantised model, then quantise the result",
        )


def copy_companions(source: Path, out: Path, *, trust_remote_code: bool) -> list[str]:
    """Takes along what a user keeps beside the weights: tokenizer, templates, processor, licence.

    Args:
        source: the model's folder.
        out: where copies go; what is there already is replaced.
        trust_remote_code: take Python files along, and references to them.

    Returns:
        Names of files that were left behind on purpose: other weights, and code.
    """
    left = []
    whole = (source / INDEX).is_file() or (source / WEIGHTS).is_file()
    cut = {path.name for path in weight_files(source)} if whole else set()
    files = [path for path in sorted(source.iterdir()) if path.is_file()]
    for name in _SUBFOLDERS:
        files += sorted(path for path in (source / name).glob("*") if path.is_file())
    for path in files:
        name = path.name
        matches = [p for p in (*_PICKLED, *_OTHER_WEIGHTS, *_STALE) if fnmatch(name, p)]
        if name in cut or name in _REWRITTEN or name.startswith("."):
            continue
        if matches or (path.suffix == ".py" and not trust_remote_code):
            left.append(str(path.relative_to(source)))
            continue
        target = out / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        if path.suffix == ".json" and not trust_remote_code:
            _copy_without_code(path, target)
        else:
            shutil.copyfile(path, target)
    return left


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InvalidInput: missing, damaged, or no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"cannot be read: {first_line(error)}", str(file), "copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise InvalidInput("holds no JSON object", str(file), "copy or download it again")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Indented, with a line end."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `out` when the block ends well, and vanishes otherwise.

    Raises:
        InvalidInput: `out` is in use, or cannot be made.
    """
    refuse_in_use(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InvalidInput(
            f"cannot be made: {first_line(error)}", str(out), "name another folder"
        ) from error
    try:
        yield place
        mask = os.umask(0)
        os.umask(mask)
        place.chmod(0o777 & ~mask)
        if out.exists():
            out.rmdir()
        place.rename(out)
    except OSError as error:
        shutil.rmtree(place, ignore_errors=True)
        raise InvalidInput(
            f"reading or writing failed: {error}", str(out), "nothing was written; try again"
        ) from error
    except InvalidInput as error:
        shutil.rmtree(place, ignore_errors=True)
        # The place the user knows.
        problem, where = (t.replace(str(place), str(out)) for t in (error.problem, error.where))
        raise InvalidInput(problem, where, error.remedy) from error
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def refuse_in_use(out: Path) -> None:
    """An output folder must be new or empty.

    Raises:
        InvalidInput: it is neither.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInput("the output folder is not empty", str(out), "name a new folder")


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise InvalidInput("has no weight_map", str(index), "copy or download the model again")
    return found


def _copy_without_code(path: Path, target: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if isinstance(content, dict) and "auto_map" in content:
        del content["auto_map"]
        write_json(target, content)
    else:
        shutil.copyfile(path, target)
