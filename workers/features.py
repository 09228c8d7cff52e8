"""Encoder output on disk: every utterance of a split, encoded once a sweep and read lazily."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from workers.errors import InvalidInput, NotFinite

FEATURES_FILE = "features.safetensors"
INDEX_FILE = "index.parquet"
CHUNK = 1024
"""Utterances handed to the encoder at a time: enough for it to find others of equal length."""


class Encoder(Protocol):
    """What turns audio into frames: a `SpeechEncoder`, or a released SpeechLLM's own."""

    sampling_rate: int

    def encode(
        self, waveforms: Sequence[np.ndarray], ids: Sequence[str] = ()
    ) -> list[torch.Tensor]:
        """Frames `[frames, dim]` of each waveform `[samples]`."""


def write_features(
    encoder: Encoder,
    utterances: Iterable[tuple[str, np.ndarray]],
    out: Path,
    dtype: str = "float16",
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, float]:
    """Encode utterances and write `features.safetensors` and `index.parquet`.

    Args:
        encoder: the frozen encoder.
        utterances: id and waveform `[samples]` at the encoder's sampling rate.
        out: the folder to fill.
        dtype: stored precision.
        progress: called with a fraction and a few words; the length of an iterable is unknown, so
            the fraction only says that work goes on.

    Returns:
        Counts of utterances and frames, seconds of audio, the frames' width.

    Raises:
        InvalidInput: nothing to encode, an id that stands twice, or audio the encoder cannot take.
        NotFinite: the encoder's output does not fit `dtype`.
    """
    stored = getattr(torch, dtype)
    ids: list[str] = []
    counts: list[int] = []
    seconds: list[float] = []
    parts: list[torch.Tensor] = []
    for chunk in _chunks(utterances):
        waveforms = [waveform for _, waveform in chunk]
        encoded = encoder.encode(waveforms, [name for name, _ in chunk])
        for (name, waveform), frames in zip(chunk, encoded, strict=True):
            kept = frames.to(device="cpu", dtype=stored)
            if not torch.isfinite(kept).all():
                raise NotFinite(
                    f"the encoder's output for {name!r} is not finite in {dtype}",
                    remedy="run the encoder in another dtype",
                )
            ids.append(name)
            counts.append(len(kept))
            seconds.append(len(waveform) / encoder.sampling_rate)
            parts.append(kept)
        if progress is not None:
            progress(1 - 0.5 ** (len(ids) / CHUNK), f"{len(ids)} utterances encoded")
    if not ids:
        raise InvalidInput("no utterances to encode")
    if len(set(ids)) != len(ids):
        twice = next(name for i, name in enumerate(ids) if name in ids[:i])
        raise InvalidInput(f"id {twice!r} stands twice", remedy="give every utterance its own id")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).tolist()
    index = {"id": ids, "start": starts, "frames": counts, "seconds": seconds}
    save_file({"frames": torch.cat(parts)}, out / FEATURES_FILE)
    pq.write_table(pa.table(index), out / INDEX_FILE)
    return {
        "utterances": len(ids),
        "frames": sum(counts),
        "seconds": round(sum(seconds), 3),
        "dim": parts[0].shape[1],
    }


def _chunks(
    utterances: Iterable[tuple[str, np.ndarray]],
) -> Iterator[list[tuple[str, np.ndarray]]]:
    chunk: list[tuple[str, np.ndarray]] = []
    for utterance in utterances:
        chunk.append(utterance)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Features(Mapping[str, torch.Tensor]):
    """Encoder output by utterance id; the file is mapped, frames are read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Open what `write_features` wrote.

        Raises:
            InvalidInput: the folder holds no features.
        """
        self.folder = folder
        try:
            index = pq.read_table(folder / INDEX_FILE, columns=["id", "start", "frames", "seconds"])
            # The handle owns the memory map, so it lives as long as this object.
            self._file = safe_open(folder / FEATURES_FILE, framework="pt")
            self._frames = self._file.get_slice("frames")
        except (OSError, pa.ArrowException) as error:
            raise InvalidInput(f"no features can be read: {error}", str(folder)) from None
        columns = index.to_pydict()
        self._places = {
            name: (start, start + count)
            for name, start, count in zip(
                columns["id"], columns["start"], columns["frames"], strict=True
            )
        }

        self._seconds = dict(zip(columns["id"], columns["seconds"], strict=True))

    @property
    def dim(self) -> int:
        """Width of the frames."""
        return int(self._frames.get_shape()[1])

    def __getitem__(self, name: str) -> torch.Tensor:
        """Frames of one utterance, `[frames, dim]` in float32.

        Raises:
            InvalidInput: no utterance of that id was encoded.
        """
        if name not in self._places:
            raise InvalidInput(f"utterance {name!r} was not encoded", str(self.folder))
        start, end = self._places[name]
        return torch.as_tensor(self._frames[start:end]).float()

    def seconds(self, name: str) -> float:
        """Length of the utterance's audio."""
        return float(self._seconds[name])

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
