"""Loading a base decoder, once a process: the one large thing stages share."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from workers.config import Condition, PromptSettings
from workers.released.model import Released, open_released
from workers.speechllm import SpeechLLM, SpeechLLMConfig
from workers.stages import Context, Input
from workers.surgery.cut import pruned
from workers.tokenizer import open_tokenizer

REMOVED = "removed.json"


@dataclass
class Resident:
    """A base decoder in this process's memory, and the SpeechLLM that now stands around it."""

    decoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model: SpeechLLM | None = None
    released: Released | None = None
    """The whole of it, where the decoder is a released SpeechLLM's."""

    def release(self) -> None:
        """Hand the plain decoder back, as it was loaded."""
        if self.model is not None:
            self.model.decoder.unload()
            self.model = None


def load_decoder(source: Input, params: Mapping[str, Any], context: Context) -> Resident:
    """The decoder and its tokenizer, from this process's memory if it holds them.

    Args:
        source: a folder, or a hub id with its commit.
        params: `dtype` and `trust_remote_code`; `speechllm` where the source is a released
            SpeechLLM, and `own_adapter: false` to leave out the adapter it brings for speech.
        context: the process; keeps one base at a time.
    """
    own_adapter = params.get("own_adapter", True)
    identity = f"{source.path}@{source.revision}:{params['dtype']}:{own_adapter}"
    if identity not in context.resident:
        context.resident.clear()
        if params.get("speechllm"):
            released = open_released(
                source.path,
                revision=source.revision,
                dtype=getattr(torch, params["dtype"]),
                device=context.device,
                trust_remote_code=params["trust_remote_code"],
                own_adapter=own_adapter,
            )
            if context.ranks.size > 1:
                context.ranks.spread_layers(released.decoder, context.device)
            context.resident[identity] = Resident(
                released.decoder, released.tokenizer, released=released
            )
            return load_decoder(source, params, context)
        options = {
            "revision": source.revision,
            "trust_remote_code": params["trust_remote_code"],
        }
        tokenizer = open_tokenizer(source.path, **options)
        decoder = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=getattr(torch, params["dtype"]), **options
        )
        _place(decoder, context)
        context.resident[identity] = Resident(decoder, tokenizer)
    resident: Resident = context.resident[identity]
    return resident


def _place(decoder: PreTrainedModel, context: Context) -> None:
    decoder.eval().requires_grad_(False)
    if context.ranks.size > 1:
        context.ranks.spread_layers(decoder, context.device)
    else:
        decoder.to(context.device)


def text_only_config(
    resident: Resident, prompts: PromptSettings, conditions: Sequence[Condition]
) -> SpeechLLMConfig:
    """Settings of a SpeechLLM that reads text alone.

    Its fresh adapter changes nothing, and text never meets the projector.

    Args:
        resident: the base; a released SpeechLLM renders the prompts its own way.
        prompts: of the sweep.
        conditions: what it will be asked to do.
    """
    released = resident.released
    return SpeechLLMConfig(
        encoder_dim=1, prompts=released.prompts(prompts, conditions) if released else prompts
    )


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
