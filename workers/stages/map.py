"""`map`: how far apart the residual stream is around every block, under one condition."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workers.base import load_decoder, text_only_config, trained_speechllm, untrained_speechllm
from workers.batches import Encoded, encode
from workers.config import Condition, MapSettings, PromptSettings
from workers.data import read_utterances, spread
from workers.examples import examples_of
from workers.features import Features
from workers.maps.inputs import example_batches
from workers.maps.measure import redundancy_map
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
    with mapped_model(params, inputs, context, settings.samples) as (model, encoded):
        measured = redundancy_map(
            model.decoder,
            example_batches(model, encoded, context.relief.size(settings.batch_size)),
            settings.pools,
            progress=context.progress,
            samples=len(encoded),
            criteria=settings.criteria,
        )
    measured.save(out)
    return {"layers": measured.layers, "samples": len(encoded)}


@contextmanager
def mapped_model(
    params: Mapping[str, Any], inputs: Mapping[str, Input], context: Context, samples: int
) -> Iterator[tuple[SpeechLLM, list[Encoded]]]:
    """The model of a map's condition and the utterances it is measured on.

    Args:
        params: as a map's.
        inputs: as a map's.
        context: the process.
        samples: utterances taken from the split, evenly spaced.
    """
    utterances = spread(read_utterances(Path(inputs["data"].path), params["split"]), samples)
    condition = Condition.model_validate(params["condition"])
    features = Features(Path(inputs["features"].path)) if "features" in inputs else None
    resident = load_decoder(inputs["decoder"], params["decoder"], context)
    if "base" in inputs:
        opened = trained_speechllm(Path(inputs["base"].path), resident)
    else:
        prompts = PromptSettings.model_validate(params["prompts"])
        opened = untrained_speechllm(resident, text_only_config(resident, prompts, [condition]))
    with opened as model:
        yield (
            model,
            encode(model, examples_of(utterances, condition, features), params["modality"]),
        )
