"""`map`: how far apart the residual stream is around every block, under one condition."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from workers.base import load_decoder, text_only_config, trained_speechllm, untrained_speechllm
from workers.batches import Modality, collate, encode, sorted_batches
from workers.config import Condition, MapSettings, PromptSettings
from workers.data import read_utterances, spread
from workers.examples import examples_of
from workers.features import Features
from workers.maps import MapBatch, redundancy_map
from workers.speechllm import SpeechLLM
from workers.stages import Context, Input


def run(
    params: Mapping[str, Any], inputs: Mapping[str, Input], out: Path, context: Context
) -> dict[str, Any]:
    """Measure a redundancy map.

    Args:
        params: `decoder`, `condition`, `modality`, `split`, `settings` (`MapSettings`), and
            `prompts` where there is no base.
        inputs: `decoder`, `data`, `base` where the decoder is adapted, `features` for speech.
        out: receives the map.
        context: the process.

    Returns:
        Layers and samples.
    """
    settings = MapSettings.model_validate(params["settings"])
    modality: Modality = params["modality"]
    utterances = spread(
        read_utterances(Path(inputs["data"].path), params["split"]), settings.samples
    )
    condition = Condition.model_validate(params["condition"])
    features = Features(Path(inputs["features"].path)) if "features" in inputs else None
    resident = load_decoder(inputs["decoder"], params["decoder"], context)
    with ExitStack() as stack:
        if "base" in inputs:
            model = stack.enter_context(trained_speechllm(Path(inputs["base"].path), resident))
        else:
            prompts = PromptSettings.model_validate(params["prompts"])
            config = text_only_config(resident, prompts, [condition])
            model = stack.enter_context(untrained_speechllm(resident, config))
        encoded = encode(model, examples_of(utterances, condition, features), modality)

        def batches() -> Iterator[MapBatch]:
            for indices in sorted_batches([e.length for e in encoded], settings.batch_size):
                rows = [encoded[i] for i in indices]
                yield _batch(model, [e.example.id for e in rows], rows)

        with torch.no_grad():
            measured = redundancy_map(
                model.decoder,
                batches(),
                settings.pools,
                progress=context.progress,
                samples=len(utterances),
            )
    measured.save(out)
    return {"layers": measured.layers, "samples": len(utterances)}


def _batch(model: SpeechLLM, ids: list[str], rows: list[Any]) -> MapBatch:
    inputs = collate(model, rows, "right")
    return MapBatch(
        ids=ids,
        inputs_embeds=inputs.inputs_embeds,
        attention_mask=inputs.attention_mask,
        pools=inputs.pools,
    )
