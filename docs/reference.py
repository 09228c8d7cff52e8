"""Writes the reference part of `sweep-file.md` from the settings models: `python docs/reference.py`.

Keys, types and defaults are read off the models, and so are the meanings where a key has a
docstring. `MEANINGS` holds the few that have none. Everything outside the markers is left alone.
"""

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from orchestrator.sweep import Sweep
from workers.config import Settings

PAGE = Path(__file__).with_name("sweep-file.md")
BEGIN, END = "<!-- reference: begin -->", "<!-- reference: end -->"

MEANINGS = {
    "models": "The decoders, and released SpeechLLMs.",
    "models[].dtype": "Type of the decoder's weights (of all weights for `speechllm`).",
    "encoders": "The speech encoders, each with its projector; needed by every `decoder`.",
    "encoders[].name": "What tables and reports call it; by default the last part of `encoder`.",
    "encoders[].revision": "Hub revision; null: the newest, pinned to its commit when planned.",
    "encoders[].dtype": "Type of the encoder's weights. Its outputs are stored as float16.",
    "encoders[].trust_remote_code": "Let the hub repository's own Python code run. Shown in the plan.",
    "encoders[].projector": "What stands between encoder and decoder.",
    "tasks": "What the models are asked to do, and on which data.",
    "tasks[].task": "`asr` writes what was said, `ast` its translation.",
    "tasks[].test": "Test sets, scored one by one.",
    "tasks[].test[].name": "What tables and reports call it.",
    "tasks[].test[].in_domain": "Out-of-domain sets are reported beside the verdict, never in it.",
    "selectors": "How blocks are chosen. A bare name such as `last` is enough.",
    "selectors[].selector": "See [selectors](definitions.md#selectors).",
    "heal": "Repair after pruning.",
    "heal.modes": "What is trained after pruning: see [healing](definitions.md#healing).",
    "heal.steps": "Optimizer steps; every mode gets the same.",
    "adapt": "Training the base SpeechLLM.",
    "adapt.steps": "Optimizer steps.",
    "adapt.lora": "The adapter, which healing goes on training.",
    "adapt.lora.rank": "Rank of the update.",
    "adapt.lora.alpha": "The update is scaled by `alpha / rank`.",
    "adapt.lora.dropout": "Dropout in front of the update, while training.",
    "adapt.alignment_lr": "Peak learning rate of that warm-up.",
    "adapt.seed": "Seed of the new weights and of the order of the data.",
    "adapt.schedule": "How the learning rate falls after the warm-up.",
    "heal.schedule": "How the learning rate falls after the warm-up.",
    "adapt.weight_decay": "AdamW's.",
    "heal.weight_decay": "AdamW's.",
    "maps": "Redundancy maps.",
    "maps.batch_size": "Utterances per forward pass.",
    "evaluate": "Decoding the test sets.",
    "evaluate.batch_size": "Utterances decoded together.",
    "prompts": "What the decoder reads around the audio.",
    "prompts.asr": "Template of `asr`.",
    "prompts.ast": "Template of `ast`.",
    "share": "What is trained once for several conditions.",
    "report": "What the verdict calls good enough.",
    "resources": "What one job takes on the cluster.",
    "limits": "How much of the cluster the sweep may take.",
    "priority[].model": "Names of models.",
    "priority[].encoder": "Names of encoders (`own`: that of a released SpeechLLM).",
    "priority[].task": "Tasks.",
    "priority[].depth": "Numbers of removed layers.",
    "priority[].heal": "Healing modes.",
}  # fmt: skip


def models(model: type[Settings] = Sweep, path: str = "") -> Iterator[tuple[str, type[Settings]]]:
    """Every settings model with its dotted path (`tasks[].test[]`), in file order."""
    yield path, model
    for name, field in model.model_fields.items():
        inner, many = _nested(field.annotation)
        if inner is not None:
            yield from models(inner, _join(path, name) + ("[]" if many else ""))


def meaning(path: str, field: FieldInfo) -> str:
    """What a key means: its docstring, else `MEANINGS`.

    Raises:
        KeyError: neither says.
    """
    text = field.description or MEANINGS[path]
    # Docstrings speak Python, sweep files YAML.
    return re.sub(r"\bNone\b", "null", " ".join(text.split())).replace("|", "\\|")


def section() -> str:
    """The reference: a table for each model."""
    lines = []
    for path, model in models():
        lines += [f"### `{path}`" if path else "### Top level", ""]
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for name, field in model.model_fields.items():
            place = _join(path, name)
            cells = [f"`{name}`", _type(field, place), _default(field), meaning(place, field)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def updated(page: str) -> str:
    """The page with a fresh reference between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{section()}\n{END}{after}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _nested(annotation: Any) -> tuple[type[Settings] | None, bool]:
    """The settings model in an annotation, if there is one, and whether it stands in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation, False
    many = typing.get_origin(annotation) is list
    for argument in typing.get_args(annotation):
        found, inside = _nested(argument)
        if found is not None:
            return found, many or inside
    return None, False


def _type(field: FieldInfo, path: str) -> str:
    inner, many = _nested(field.annotation)
    if inner is not None:
        anchor = path.replace(".", "").replace("[]", "")
        link = f"[`{path}{'[]' if many else ''}`](#{anchor})"
        text = f"list of {link}" if many else link
        return text + (" or null" if _optional(field.annotation) else "")
    text = _named(field.annotation)
    bounds = []
    for limit in field.metadata:
        match limit:
            case Ge():
                bounds.append(f"≥ {limit.ge}")
            case Gt():
                bounds.append(f"> {limit.gt}")
            case Le():
                bounds.append(f"≤ {limit.le}")
            case Lt():
                bounds.append(f"< {limit.lt}")
            case MinLen():
                bounds.append("not empty")
    return ", ".join([text, *bounds])


def _optional(annotation: Any) -> bool:
    return type(None) in typing.get_args(annotation)


def _named(annotation: Any) -> str:
    plain = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true or false",
        type(None): "null",
    }
    if annotation in plain:
        return plain[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (list, tuple):
        item = _named(arguments[0])
        return f"list of {item}s" if item == "integer" else f"list of {item}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_named(argument) for argument in arguments)
    raise TypeError(f"no words for the type {annotation!r}")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Settings):
        return "as below"
    if isinstance(value, (list, tuple)):
        return f"`[{', '.join(_item(item) for item in value)}]`"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        shown = value.replace("\n", "\\n")
        return f'`"{shown}"`' if not value or " " in value else f"`{shown}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _item(value: Any) -> str:
    return str(getattr(value, "label", value))


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
