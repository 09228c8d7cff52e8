"""Loading a base decoder, once a process: the one large thing stages share."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from workers.speechllm import SpeechLLM, SpeechLLMConfig, open_tokenizer
from workers.stages import Context, Input
from workers.surgery import pruned

REMOVED = "removed.json"


def load_decoder(
    source: Input, params: Mapping[str, Any], context: Context
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
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
        context.resident[identity] = (decoder, tokenizer)
    decoder, tokenizer = context.resident[identity]
    return decoder, tokenizer


@contextmanager
def speechllm_on(
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SpeechLLMConfig,
    seed: int = 0,
) -> Iterator[SpeechLLM]:
    """A SpeechLLM around a resident decoder; the decoder is handed back as it was."""
    model = SpeechLLM.create(decoder, tokenizer, config, seed)
    try:
        yield model
    finally:
        model.decoder.unload()


@contextmanager
def trained_speechllm(
    folder: Path, source: Input, params: Mapping[str, Any], context: Context
) -> Iterator[SpeechLLM]:
    """The SpeechLLM whose trained parts lie in `folder`, its decoder pruned as it was then.

    Args:
        folder: an `adapt` or `heal` artefact.
        source: the decoder.
        params: `dtype` and `trust_remote_code` of the decoder.
        context: the process.
    """
    decoder, tokenizer = load_decoder(source, params, context)
    with (
        speechllm_on(decoder, tokenizer, SpeechLLMConfig.read(folder)) as model,
        pruned(model.decoder, removed_layers(folder)),
    ):
        model.load_trained(folder)
        yield model


def removed_layers(folder: Path) -> tuple[int, ...]:
    """Layers of the unpruned decoder that are missing in an artefact's model."""
    path = folder / REMOVED
    return tuple(json.loads(path.read_text())["removed"]) if path.is_file() else ()


def note_removed(folder: Path, layers: tuple[int, ...]) -> None:
    """Write beside a healed model's weights which layers it does without."""
    (folder / REMOVED).write_text(json.dumps({"removed": list(layers)}) + "\n")
