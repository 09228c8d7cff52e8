"""Reading data sets: the lab's Parquet folders and manifests, as one list of utterances."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq

from workers.audio import read_audio
from workers.config import Condition
from workers.errors import InvalidInput
from workers.manifest import Utterance, read_manifest

TEXT_COLUMN = "text_"
Sample = TypeVar("Sample")


def read_utterances(path: Path, split: str | None, *, audio: bool = False) -> list[Utterance]:
    """The utterances of a data set, in file order.

    Args:
        path: a folder with `<split>.parquet`, or a manifest.
        split: the split; None for a manifest.
        audio: read the audio's bytes too (Parquet only; a manifest names files).

    Raises:
        InvalidInput: nothing in it, or the manifest is bad.
    """
    if split is None:
        return read_manifest(path)
    file = pq.ParquetFile(path / f"{split}.parquet")
    columns = [c for c in file.schema_arrow.names if c != "audio" or audio]
    rows = file.read(columns=[c for c in columns if c != "phones"]).to_pylist()
    if not rows:
        raise InvalidInput(f"split {split} is empty", str(path))
    return [
        Utterance(
            id=row["id"],
            text=row["text"],
            lang=row.get("lang"),
            translations={
                name.removeprefix(TEXT_COLUMN): value
                for name, value in row.items()
                if name.startswith(TEXT_COLUMN) and value is not None
            },
            duration=row.get("duration"),
            audio_bytes=row["audio"]["bytes"] if audio else None,
            words=tuple((w["word"], w["start"], w["end"]) for w in row.get("words") or ()),
        )
        for row in rows
    ]


def target_text(utterance: Utterance, condition: Condition) -> str:
    """What the model should write: the transcript, or the translation.

    Raises:
        InvalidInput: the utterance has no such text.
    """
    if condition.target_language is None:
        return utterance.text
    text = utterance.translation(condition.target_language)
    if text is None:
        raise InvalidInput(
            f"utterance {utterance.id!r} has no translation into {condition.target_language}",
            remedy=f"give it a field translation or text_{condition.target_language}",
        )
    return text


def utterance_audio(utterance: Utterance, sampling_rate: int) -> np.ndarray:
    """The utterance's waveform `[samples]`, at the rate asked for.

    Raises:
        InvalidInput: the audio cannot be read; names the manifest's line where there is one.
    """
    source = utterance.audio_bytes if utterance.audio_bytes is not None else utterance.audio_path
    assert source is not None
    try:
        return read_audio(
            source,
            sampling_rate,
            utterance.offset,
            utterance.duration,
            utterance.sampling_rate,
        )
    except InvalidInput as error:
        if not utterance.where:
            raise
        problem = f"{error.where}: {error.problem}"
        raise InvalidInput(problem, utterance.where, error.remedy) from None


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` samples evenly spaced over the list (all, if it has fewer)."""
    if len(samples) <= count:
        return list(samples)
    return [samples[i * len(samples) // count] for i in range(count)]
