"""The names of the embedded default: what `lab:NAME` stands for. Costs no torch to import."""

import difflib
from dataclasses import dataclass
from typing import Literal

from workers.errors import InvalidInput

Role = Literal["data", "decoder", "encoder"]
Size = Literal["full", "tiny"]

SPEECH_LANGUAGES = ("en", "de", "fr")


@dataclass(frozen=True)
class LabItem:
    """One thing the `build` stage can make."""

    name: str
    role: Role
    kind: str
    size: Size
    layers: int | None = None
    """Decoder layers; None for data and encoders."""
    cost_seconds: float = 10.0
    """Rough CPU seconds of a build, for ordering work before anything was measured."""


CATALOGUE: dict[str, LabItem] = {
    item.name: item
    for item in (
        LabItem("lab:speech", "data", "speech", "full", cost_seconds=6),
        LabItem("lab:speech-tiny", "data", "speech", "tiny", cost_seconds=2),
        LabItem("lab:llama", "decoder", "llama", "full", layers=12, cost_seconds=70),
        LabItem("lab:qwen", "decoder", "qwen", "full", layers=12, cost_seconds=70),
        LabItem("lab:llama-tiny", "decoder", "llama", "tiny", layers=6, cost_seconds=8),
        LabItem("lab:qwen-tiny", "decoder", "qwen", "tiny", layers=6, cost_seconds=8),
        LabItem("lab:whisper", "encoder", "whisper", "full", cost_seconds=42),
        LabItem("lab:conformer", "encoder", "conformer", "full", cost_seconds=46),
        LabItem("lab:whisper-tiny", "encoder", "whisper", "tiny", cost_seconds=5),
        LabItem("lab:conformer-tiny", "encoder", "conformer", "tiny", cost_seconds=5),
    )
}


def lab_item(name: str, role: Role, where: str) -> LabItem:
    """The lab item called `name`, which must be of `role`.

    Raises:
        InvalidInput: no such name, or it is something else; names the nearest valid one.
    """
    names = [item.name for item in CATALOGUE.values() if item.role == role]
    item = CATALOGUE.get(name)
    if item is not None and item.role == role:
        return item
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(names)}"
    problem = (
        f"{name} is a {item.role}, not a {role}" if item else f"no lab {role} is called {name}"
    )
    raise InvalidInput(problem, where, hint)
