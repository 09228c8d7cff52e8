"""Reading audio files: any format libsndfile knows, at the rate an encoder wants, one channel."""

import io
from pathlib import Path

import numpy as np
import soundfile
import soxr

from workers.errors import InvalidInput

LOWEST_RATE = 4000
"""Hz; below that nothing of speech is left, and a header that says so is usually wrong."""


def read_audio(
    source: bytes | Path,
    sampling_rate: int,
    offset: float = 0.0,
    duration: float | None = None,
    declared_rate: int | None = None,
) -> np.ndarray:
    """Read a clip, mix its channels down and resample it.

    Args:
        source: a file, or the bytes of one (WAV, FLAC, OGG, MP3, …).
        sampling_rate: of the result, in Hz.
        offset: where the clip starts in the file, in seconds.
        duration: its length in seconds; None (or beyond the end): to the end of the file.
        declared_rate: what the data say of the file's rate, in Hz; None: nothing.

    Returns:
        `[samples]`, float32 in -1 … 1.

    Raises:
        InvalidInput: no such file, not audio, another rate than declared or one too low for
            speech, the offset is beyond its end, or samples that are not finite. Names the file.
    """
    where = str(source) if isinstance(source, Path) else "audio bytes of the data set"
    if offset < 0 or (duration is not None and duration <= 0):
        raise InvalidInput(f"no clip from {offset} s of length {duration} s", where)
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as f:
            if declared_rate not in (None, f.samplerate):
                raise InvalidInput(
                    f"the audio has {f.samplerate} Hz, the data say {declared_rate} Hz",
                    where,
                    "mend sampling_rate, or leave it out: the file's own rate is used",
                )
            if f.samplerate < LOWEST_RATE:
                raise InvalidInput(
                    f"the audio has {f.samplerate} Hz, too little for speech",
                    where,
                    f"use audio of {LOWEST_RATE} Hz or more, or mend the file's header",
                )
            start = round(offset * f.samplerate)
            if start >= f.frames:
                seconds = f.frames / f.samplerate
                raise InvalidInput(
                    f"the clip starts at {offset:g} s, but the audio has {seconds:g} s", where
                )
            f.seek(start)
            count = -1 if duration is None else max(1, round(duration * f.samplerate))
            samples, rate = f.read(count, dtype="float32", always_2d=True), f.samplerate
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise InvalidInput(
            f"cannot be read as audio: {error}", where, "use WAV, FLAC, OGG or MP3"
        ) from None
    if not np.isfinite(samples).all():
        raise InvalidInput("has samples that are not finite", where)
    mono = samples.mean(axis=1)
    return mono if rate == sampling_rate else soxr.resample(mono, rate, sampling_rate)
