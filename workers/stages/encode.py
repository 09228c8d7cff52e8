"""`encode`: the frozen encoder's output for one split, so that it is computed once a sweep."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workers.base import load_decoder
from workers.data import read_utterances, utterance_audio
from workers.encoder import SpeechEncoder
from workers.features import Encoder, write_features
from workers.stages import Context, Input

STORED_DTYPE = "float16"


def run(
    params: Mapping[str, Any], inputs: Mapping[str, Input], out: Path, context: Context
) -> dict[str, Any]:
    """Encode every utterance of a split.

    Args:
        params: `split` (None for a manifest), `dtype` the encoder runs in, `trust_remote_code`;
            `speechllm` where the encoder is that of a released SpeechLLM.
        inputs: `encoder` and `data`.
        out: receives `features.safetensors` and `index.parquet`.
        context: the process.

    Returns:
        Counts and seconds of audio.
    """
    encoder = _encoder(inputs["encoder"], params, context)
    utterances = read_utterances(Path(inputs["data"].path), params["split"], audio=True)

    def waveforms() -> Iterator[tuple[str, np.ndarray]]:
        for utterance in utterances:
            yield utterance.id, utterance_audio(utterance, encoder.sampling_rate)

    return write_features(encoder, waveforms(), out, STORED_DTYPE, context.progress)


def _encoder(source: Input, params: Mapping[str, Any], context: Context) -> Encoder:
    if params.get("speechllm"):
        released = load_decoder(source, params, context).released
        assert released is not None
        return released.encoder
    return SpeechEncoder.from_pretrained(
        source.path,
        revision=source.revision,
        dtype=getattr(torch, params["dtype"]),
        device=context.device,
        trust_remote_code=params["trust_remote_code"],
    )
