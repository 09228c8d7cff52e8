"""The lab's speech: the grammar's sentences said by eSpeak NG, with word and phoneme times.

Eight voices speak the training, development and test sets. The out-of-domain set repeats the first
test sentences in three voices that were never heard before, with noise at 15 dB SNR, so that the
two differ in sound alone. Training sentences of the languages are disjoint; development and test
sentences are the same in all, so that their scores can be compared sentence by sentence.
"""

import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import soxr

from workers.lab import espeak
from workers.lab.catalogue import SPEECH_LANGUAGES, Size
from workers.lab.grammar import LANGUAGES, sentences
from workers.lab.shapes import COUNTS

SAMPLING_RATE = 16_000
"""Hz."""
SNR = 15.0
"""Decibels, of the out-of-domain set."""
VOICES = {"en": "en-us", "de": "de", "fr": "fr"}


@dataclass(frozen=True)
class Speaker:
    """A voice: an eSpeak NG variant with its own pace and pitch."""

    variant: str
    rate: int
    """Words a minute; varies by 6 % from clip to clip."""
    pitch: int
    """0 … 100; varies by 5 from clip to clip."""


SPEAKERS = (
    Speaker("m1", 235, 50),
    Speaker("f2", 220, 52),
    Speaker("m3", 210, 45),
    Speaker("f4", 240, 55),
    Speaker("m5", 225, 40),
    Speaker("f1", 205, 48),
    Speaker("m7", 245, 55),
    Speaker("f3", 230, 45),
)
HELD_OUT = (Speaker("f5", 215, 50), Speaker("m2", 240, 42), Speaker("m6", 225, 58))

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "audio": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "duration": pa.float64(),
        "lang": pa.string(),
        "text": pa.string(),
        **{f"text_{language}": pa.string() for language in LANGUAGES},
        "speaker": pa.string(),
        "words": pa.list_(
            pa.struct({"word": pa.string(), "start": pa.float64(), "end": pa.float64()})
        ),
        "phones": pa.list_(
            pa.struct({"phone": pa.string(), "start": pa.float64(), "end": pa.float64()})
        ),
    }
)


@dataclass(frozen=True)
class _Clip:
    """One clip to be made."""

    id: str
    split: str
    texts: dict[str, str]
    speaker: Speaker
    request: espeak.Request


def build_speech(
    language: str, size: Size, seed: int, out: Path, progress: Callable[[float, str], None]
) -> dict[str, Any]:
    """Write one language's data set: a Parquet file for each split, and `dataset.json`.

    Args:
        language: of `SPEECH_LANGUAGES`.
        size: `full` or `tiny`.
        seed: sentences, voices and noise; the same seed gives the same bytes.
        out: the folder to fill.
        progress: called with a fraction done and a few words.

    Returns:
        What `dataset.json` says: clips and seconds by split, speakers, sampling rate.
    """
    rng = random.Random(f"speech {language} {size} {seed}")
    noise = np.random.default_rng([seed, SPEECH_LANGUAGES.index(language)])
    clips = list(_clips(language, size, seed, rng))
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in COUNTS[size]}
    spoken = espeak.synthesise([clip.request for clip in clips])
    for done, (clip, said) in enumerate(zip(clips, spoken, strict=True), 1):
        rows[clip.split].append(_row(clip, language, said, noise))
        if done % 100 == 0:
            progress(done / len(clips), f"{done} of {len(clips)} {language} clips")
    for split, of_split in rows.items():
        pq.write_table(pa.Table.from_pylist(of_split, SCHEMA), out / f"{split}.parquet")
    summary = {
        "language": language,
        "size": size,
        "seed": seed,
        "sampling_rate": SAMPLING_RATE,
        "splits": {
            split: {
                "clips": len(of_split),
                "seconds": round(sum(row["duration"] for row in of_split), 3),
                "speakers": sorted({row["speaker"] for row in of_split}),
            }
            for split, of_split in rows.items()
        },
    }
    (out / "dataset.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _clips(language: str, size: Size, seed: int, rng: random.Random) -> Iterator[_Clip]:
    counts = COUNTS[size]
    place, languages = SPEECH_LANGUAGES.index(language), len(SPEECH_LANGUAGES)
    drawn = sentences(
        size,
        seed,
        {
            "train": languages * counts["train"],
            "dev": counts["dev"],
            "test": max(counts["test"], counts["ood"]),
        },
    )
    texts = {
        "train": drawn["train"][place::languages],
        "dev": drawn["dev"],
        "test": drawn["test"][: counts["test"]],
        "ood": drawn["test"][: counts["ood"]],
    }
    known = SPEAKERS if size == "full" else SPEAKERS[:2]
    for split, of_split in texts.items():
        speakers = HELD_OUT if split == "ood" else known
        for number, text in enumerate(of_split):
            speaker = speakers[number % len(speakers)]
            request = espeak.Request(
                text=text[language],
                voice=f"{VOICES[language]}+{speaker.variant}",
                rate=round(speaker.rate * rng.uniform(0.94, 1.06)),
                pitch=speaker.pitch + rng.randint(-5, 5),
            )
            yield _Clip(f"{language}-{split}-{number:04d}", split, text, speaker, request)


def _row(
    clip: _Clip, language: str, said: espeak.Spoken, noise: np.random.Generator
) -> dict[str, Any]:
    samples = np.frombuffer(said.pcm, np.int16).astype(np.float32) / 2**15
    samples = soxr.resample(samples, espeak.SAMPLING_RATE, SAMPLING_RATE)
    if clip.split == "ood":
        samples = _noisy(samples, noise)
    duration = len(samples) / SAMPLING_RATE
    phones = _phones(said, duration)
    text = clip.texts[language]
    return {
        "id": clip.id,
        "audio": {"bytes": _flac(samples), "path": f"{clip.id}.flac"},
        "duration": duration,
        "lang": language,
        "text": text,
        **{f"text_{other}": clip.texts[other] for other in LANGUAGES},
        "speaker": clip.speaker.variant,
        "words": _words(text, said, phones, duration),
        "phones": phones,
    }


def _noisy(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Add pink noise at `SNR`."""
    spectrum = np.fft.rfft(generator.standard_normal(len(samples)))
    pink = np.fft.irfft(spectrum / np.sqrt(np.arange(1, len(spectrum) + 1)), len(samples))
    level = np.sqrt(np.mean(samples**2) / np.mean(pink**2) / 10 ** (SNR / 10))
    noisy: np.ndarray = samples + (level * pink).astype(np.float32)
    return noisy


def _flac(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.clip(samples, -1, 1), SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _seconds(sample: int, duration: float) -> float:
    return round(min(sample / espeak.SAMPLING_RATE, duration), 4)


def _phones(said: espeak.Spoken, duration: float) -> list[dict[str, Any]]:
    """Phones with start and end in seconds; stress and length-reduction marks are dropped."""
    starts = [_seconds(start, duration) for _, start in said.phones]
    ends = [*starts[1:], round(duration, 4)]
    names = [name.strip("ˈˌ-") for name, _ in said.phones]
    return [
        {"phone": name, "start": start, "end": end}
        for name, start, end in zip(names, starts, ends, strict=True)
        if name and end > start
    ]


def _words(
    text: str, said: espeak.Spoken, phones: Sequence[dict[str, Any]], duration: float
) -> list[dict[str, Any]]:
    """Words with start and end in seconds.

    eSpeak NG joins some pairs (`with the`) into one event. Their time is divided at a phone, in
    proportion to their letters.
    """
    started = {place: _seconds(start, duration) for place, start in said.words}
    words, places, place = text.split(), [], 0
    for word in words:
        places.append(place)
        place += len(word) + 1
    groups = [i for i, place in enumerate(places) if i == 0 or place in started]
    times: list[float] = []
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        begin = started.get(places[group], 0.0)
        end = duration if following is None else started[places[following]]
        inside = [p["start"] for p in phones if begin <= p["start"] < end]
        letters = [len(word) for word in words[group:following]]
        times.append(begin)
        for before in np.cumsum(letters)[:-1]:
            nearest = round(len(inside) * int(before) / sum(letters))
            times.append(inside[nearest] if 0 < nearest < len(inside) else begin)
    last = max((p["end"] for p in phones), default=duration)
    return [
        {"word": word, "start": start, "end": end}
        for word, start, end in zip(words, times, [*times[1:], last], strict=True)
    ]
