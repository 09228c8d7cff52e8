"""What a model folder (or hub repository) holds, and opening it: the MODEL of the commands.

Four kinds: a plain causal LM, a peft adapter on one, a Layersweep SpeechLLM, and a SpeechLLM that
transformers itself supports.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from workers.config import Condition
from workers.errors import InvalidInput, first_line, refuse_missing
from workers.released import is_released
from workers.released.model import open_released
from workers.speechllm import SpeechLLM
from workers.tokenizer import open_tokenizer

ModelKind = Literal["causal-lm", "adapter", "speechllm", "released"]
DESCRIPTIONS: dict[str, ModelKind] = {
    "speechllm.json": "speechllm",
    "adapter_config.json": "adapter",
    "config.json": "causal-lm",
}
"""File that tells the kind; the first one found counts."""


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model in memory, in evaluation mode, nothing in it requiring a gradient."""

    kind: ModelKind
    decoder: PreTrainedModel | PeftModel
    """The causal LM, with peft's layers in it where there is an adapter."""
    tokenizer: PreTrainedTokenizerBase
    speechllm: SpeechLLM | None = None
    """The whole of it, where there is more than a decoder."""


def model_kind(reference: str, revision: str | None = None) -> ModelKind:
    """What a folder or hub id holds, from its small files alone.

    Raises:
        InvalidInput: no such folder, nothing in it that can be opened, or the hub cannot be asked.
    """
    config = _file(reference, "config.json", revision)
    for name, kind in DESCRIPTIONS.items():
        if _file(reference, name, revision) is None:
            continue
        # A released SpeechLLM may bring an adapter of its own.
        if kind != "speechllm" and config and is_released(_content(config)):
            return "released"
        return kind
    raise InvalidInput(
        f"no model in it: there is none of {', '.join(DESCRIPTIONS)}",
        reference,
        "name a folder that from_pretrained can open, or a hub id",
    )


def open_model(
    reference: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    conditions: Sequence[Condition] = (),
) -> OpenedModel:
    """Open whatever `reference` names.

    Args:
        reference: a folder or a hub id.
        revision: of a hub repository.
        dtype: of the decoder; `auto`: as stored.
        device: where it goes.
        trust_remote_code: let the repository's own code run.
        conditions: what a released SpeechLLM will be asked to do, for its prompts.

    Raises:
        InvalidInput: nothing there, or it cannot be opened; says why.
    """
    kind = model_kind(reference, revision)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if kind == "speechllm":
        model = SpeechLLM.from_pretrained(Path(reference), dtype=dtype, device=device)
        return OpenedModel(kind, model.decoder, model.tokenizer, model)
    if kind == "released":
        released = open_released(
            reference,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        model = released.speechllm(conditions)
        return OpenedModel(kind, model.decoder, model.tokenizer, model)
    try:
        if kind == "adapter":
            described = PeftConfig.from_pretrained(reference, revision=revision)
            base = str(described.base_model_name_or_path or "")
            beside = Path(reference) / base
            if not base:
                raise InvalidInput(
                    "the adapter does not say which model it belongs to",
                    f"{reference}/adapter_config.json",
                    "set base_model_name_or_path to a folder or a hub id",
                )
            place = str(beside) if Path(reference).is_dir() and beside.is_dir() else base
            decoder = _causal_lm(place, dtype, {**options, "revision": described.revision})
            # A wrong layer count goes unnoticed by peft, and every layer gets another one's weights.
            _check_adapter_layers(reference, revision, decoder)
            decoder = PeftModel.from_pretrained(decoder, reference, revision=revision)
            tokenizer = open_tokenizer(place, **{**options, "revision": described.revision})
        else:
            decoder = _causal_lm(reference, dtype, options)
            tokenizer = open_tokenizer(reference, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise InvalidInput(f"the model cannot be opened: {first_line(error)}", reference) from error
    decoder.to(device).eval().requires_grad_(False)
    return OpenedModel(kind, decoder, tokenizer)


def _causal_lm(reference: str, dtype: str | torch.dtype, options: dict[str, Any]) -> Any:
    decoder, report = AutoModelForCausalLM.from_pretrained(
        reference, dtype=dtype, output_loading_info=True, **options
    )
    refuse_missing(report["missing_keys"], reference)
    return decoder


def _check_adapter_layers(reference: str, revision: str | None, decoder: Any) -> None:
    from safetensors import safe_open

    from workers.surgery.decoder_parts import decoder_parts

    file = _file(reference, "adapter_model.safetensors", revision)
    if file is None:
        raise InvalidInput(
            "the adapter has no adapter_model.safetensors",
            reference,
            "save it as safetensors; pickled weights are not read",
        )
    parts = decoder_parts(decoder)
    with safe_open(file, framework="pt") as stored:
        numbers = {
            int(name.partition(f"{parts.path}.")[2].partition(".")[0])
            for name in stored.keys()  # noqa: SIM118 - no mapping
            if f"{parts.path}." in name
        }
    if numbers and max(numbers) >= len(parts.layers):
        raise InvalidInput(
            f"the adapter has weights for layer {max(numbers)}, the decoder has "
            f"{len(parts.layers)} layers",
            reference,
            "use the model it was trained on, or prune the two together (layersweep prune)",
        )


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot be read: {error}", str(file), "repair the file") from None
    return content if isinstance(content, dict) else {}


def _file(reference: str, name: str, revision: str | None) -> Path | None:
    """A file of a folder or a hub repository; None if there is no such file."""
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if folder.exists() or reference.count("/") != 1 or reference.startswith((".", "/", "~")):
        raise InvalidInput(
            f"no folder {folder}", "MODEL", "name a model folder or a hub id (org/name)"
        )
    try:
        return Path(hf_hub_download(reference, name, revision=revision))
    except EntryNotFoundError as error:
        # Without a connection this is also said of a repository that was never fetched.
        if not isinstance(error, LocalEntryNotFoundError) or _is_cached(reference, revision):
            return None
        raise _unreachable(reference, error) from None
    except Exception as error:  # noqa: BLE001 - the client raises its transport's own types
        raise _unreachable(reference, error) from None


def _is_cached(reference: str, revision: str | None) -> bool:
    try:
        snapshot_download(reference, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True


def _unreachable(reference: str, error: Exception) -> InvalidInput:
    return InvalidInput(
        f"no folder of that name, and the hub cannot be asked: {first_line(error)}",
        reference,
        "check the name; `layersweep doctor` tests hub access",
    )
