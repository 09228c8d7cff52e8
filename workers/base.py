"""Loading a base decoder, once a process: the one large thing stages share."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from workers.speechllm import SpeechLLM, SpeechLLMConfig, open_tokenizer
from workers.stages import Context, Input
from workers.surgery import pruned

REMOVED = "removed.json"


@dataclass
class Resident:
    """A base decoder in this process's memory, and the SpeechLLM that now stands around it."""

    decoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model: SpeechLLM | None = None

    def release(self) -> None:
        """Hand the plain decoder back, as it was loaded."""
        if self.model is not None:
            self.model.decoder.unload()
            self.model = None


def load_decoder(source: Input, params: Mapping[str, Any], context: Context) -> Resident:
    """The decoder and its tokenizer, from this process's memory if it holds them.

    Args:
        source: a folder, or a hub id with its commit.
        params: `dtype` and `trust_remote_code`.
        context: the process; keeps one base at a time.
    """
    identity = f"{source.path}@{source.revision}:{params['dtype']}"
    if identity not in context.resident:
        context.resident.clear()
        options = {
            "revision": source.revision,
            "trust_remote_code": params["trust_remote_code"],
        }
        tokenizer = open_tokenizer(source.path, **options)
        decoder = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=getattr(torch, params["dtype"]), **options
        )
        decoder.to(context.device).eval().requires_grad_(False)
        context.resident[identity] = Resident(decoder, tokenizer)
    resident: Resident = context.resident[identity]
    return resident


@contextmanager
def untrained_speechllm(
    resident: Resident, config: SpeechLLMConfig, seed: int = 0
) -> Iterator[SpeechLLM]:
    """A new SpeechLLM around the base, for as long as the block lasts."""
    resident.release()
    resident.model = SpeechLLM.create(resident.decoder, resident.tokenizer, config, seed)
    try:
        yield resident.model
    finally:
        resident.release()


@contextmanager
def trained_speechllm(folder: Path, resident: Resident) -> Iterator[SpeechLLM]:
    """The SpeechLLM whose trained parts lie in `folder`, its decoder pruned as it was then.

    Its modules stay for the next of the same settings, which costs a copy of the trained weights
    in place of building them anew.

    Args:
        folder: an `adapt` or `heal` artefact.
        resident: the base it was trained on.
    """
    config = SpeechLLMConfig.read(folder)
    if resident.model is None or resident.model.config != config:
        resident.release()
        resident.model = SpeechLLM.create(resident.decoder, resident.tokenizer, config, 0)
    model = resident.model
    with pruned(model.decoder, removed_layers(folder)):
        model.load_trained(folder)
        yield model


def removed_layers(folder: Path) -> tuple[int, ...]:
    """Layers of the unpruned decoder that are missing in an artefact's model."""
    path = folder / REMOVED
    return tuple(json.loads(path.read_text())["removed"]) if path.is_file() else ()


def note_removed(folder: Path, layers: tuple[int, ...]) -> None:
    """Write beside a healed model's weights which layers it does without."""
    (folder / REMOVED).write_text(json.dumps({"removed": list(layers)}) + "\n")
