"""How much work a stage is, in numbers that grow as its time does, and comparable within a kind.

A unit is one multiplication of a layer's weights with one token, times 1e9; what a stage does once,
whatever its size, counts as one. Seconds come of it through finished stages (`seconds`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.estimate.lengths import Lengths
from orchestrator.estimate.shapes import DecoderShape, EncoderShape
from workers.lab.catalogue import CATALOGUE

UNIT = 1e9
FRAMES_A_POSITION = 5
"""Where an encoder's frames and a projector's stack are not looked at: both are the same for all
stages of a model."""
FRAME_RATE = 50.0


@dataclass(frozen=True)
class Task:
    """What a stage's work depends on."""

    kind: str
    params: Mapping[str, Any]
    depth: int = 0
    """Layers the model it works on does without."""
    lengths: Lengths | None = None
    decoder: DecoderShape | None = None
    encoder: EncoderShape | None = None


def label(kind: str, params: Mapping[str, Any]) -> str:
    """The kind as times are told apart by it: a heal without training is another thing."""
    return "heal (none)" if kind == "heal" and params.get("mode") == "none" else kind


def work(task: Task) -> float | None:
    """The work of a stage; None where what it depends on is unknown."""
    if label(task.kind, task.params) == "heal (none)":
        return 1.0
    measure = _MEASURES.get(task.kind)
    return None if measure is None else measure(task)


def _build(task: Task) -> float | None:
    item = CATALOGUE.get(task.params["name"])
    return None if item is None else item.cost_seconds


def _encode(task: Task) -> float | None:
    if task.lengths is None:
        return None
    parameters = (task.encoder and task.encoder.parameters) or UNIT
    seconds = task.lengths.utterances * task.lengths.seconds
    return seconds * FRAME_RATE * parameters / UNIT


def _train(task: Task) -> float | None:
    settings = task.params["settings"]
    if task.lengths is None:
        return None
    utterances = settings["steps"] * settings["batch_size"]
    # A frozen weight is multiplied with twice: forwards, and backwards for the gradient of what
    # entered it.
    passes = 2 * utterances * _positions(task.lengths, task) * _layers(task)
    head = 2 * utterances * task.lengths.text * _head(task)
    return (passes + head) / UNIT


def _map(task: Task) -> float | None:
    if task.lengths is None:
        return None
    samples = min(task.params["settings"]["samples"], task.lengths.utterances)
    return samples * _positions(task.lengths, task) * _layers(task) / UNIT


def _damage(task: Task) -> float | None:
    once = _map(task)
    if once is None:
        return None
    layers = task.decoder.layers if task.decoder else 12
    depths = task.params["settings"]["depths"] or range(1, layers + 1)
    # A block skipped at depth n from layer s on costs the layers above it.
    passes = sum((layers - n) * (layers - n + 1) / 2 for n in depths) / layers
    return once * (1 + passes)


def _evaluate(task: Task) -> float | None:
    if task.lengths is None:
        return None
    of = task.lengths
    heard = _positions(of, task) * _layers(task)
    written = of.text * (_layers(task) + _head(task))
    return of.utterances * (heard + written) / UNIT


_MEASURES: dict[str, Callable[[Task], float | None]] = {
    "build": _build,
    "encode": _encode,
    "adapt": _train,
    "adopt": lambda task: 1.0,  # noqa: ARG005 - it reads the model and writes the rest
    "map": _map,
    "damage": _damage,
    "heal": _train,
    "evaluate": _evaluate,
}


def _positions(of: Lengths, task: Task) -> float:
    """Without the prompt, which is the same for all stages of a model."""
    if task.params.get("modality") == "text":
        return 2 * of.text
    return of.seconds * FRAME_RATE / FRAMES_A_POSITION + of.text


def _layers(task: Task) -> float:
    """Weights of the layers that are left; of an unknown decoder, one for each layer."""
    if task.decoder is None:
        return UNIT
    return task.decoder.layer_parameters * (task.decoder.layers - task.depth)


def _head(task: Task) -> float:
    return task.decoder.head if task.decoder else 0
