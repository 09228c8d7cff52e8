"""How long the utterances of a sweep's data are, in audio and in tokens."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from workers.config import LANGUAGE_NAMES, Task
from workers.lab.catalogue import CATALOGUE
from workers.lab.shapes import (
    COUNTS,
    LONGEST_SECONDS,
    LONGEST_WORDS,
    PROMPT_WORDS,
    SECONDS,
    WORDS,
)

BYTES_A_TOKEN = 3
"""UTF-8 bytes of text to one token: fewer than tokenizers need for European languages (about 4), so
that memory is rather over- than underestimated."""
AROUND = 24
"""Tokens that a chat template puts around a prompt."""
UNKNOWN_SECONDS = 10.0
"""Of an utterance whose length neither the manifest nor its file tells."""
OPENED = 32
"""Audio files looked into where a manifest has no durations."""


@dataclass(frozen=True)
class Lengths:
    """Utterances of one or several corpora."""

    utterances: int
    seconds: float
    """Audio of an utterance, the mean."""
    longest: float
    """Seconds of the longest utterance."""
    text: float
    """Tokens of a transcript or translation, the mean."""
    longest_text: int
    prompt: int = 0
    """Tokens around the audio."""


def lab_lengths(name: str, split: str | None) -> Lengths:
    """Of one language of the lab's speech."""
    count = COUNTS[CATALOGUE[name].size].get(split or "train", 0)
    return Lengths(count, SECONDS, LONGEST_SECONDS, WORDS, LONGEST_WORDS, PROMPT_WORDS)


def manifest_lengths(path: Path) -> Lengths | None:
    """Of a manifest; None if it cannot be read."""
    seconds, texts, files = [], [], []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if not line.strip():
                    continue
                row = json.loads(line)
                says = [row.get("text"), row.get("translation")]
                says += [value for name, value in row.items() if name.startswith("text_")]
                texts.append(max(len(t.encode()) for t in says if isinstance(t, str)))
                if isinstance(row.get("duration"), (int, float)):
                    seconds.append(float(row["duration"]))
                else:
                    files.append(path.parent / row["audio_filepath"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not texts:
        return None
    seconds += _heard(files)
    return Lengths(
        len(texts),
        sum(seconds) / len(seconds),
        max(seconds),
        sum(texts) / len(texts) / BYTES_A_TOKEN,
        math.ceil(max(texts) / BYTES_A_TOKEN) + 1,
        0,
    )


def prompt_tokens(prompts: Mapping[str, Any] | None) -> int:
    """Tokens of the longest prompt of `PromptSettings` (None: a model's own)."""
    templates = [str((prompts or {}).get(task, "")) for task in get_args(Task)]
    names = 2 * max(map(len, LANGUAGE_NAMES.values()))
    return AROUND + math.ceil((max(map(len, templates)) + names) / BYTES_A_TOKEN)


def together(parts: Sequence[Lengths | None]) -> Lengths | None:
    """Several corpora as one; None where there is none, or one is unknown."""
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    total = sum(part.utterances for part in found)
    if not total:
        return None
    return Lengths(
        total,
        sum(part.seconds * part.utterances for part in found) / total,
        max(part.longest for part in found),
        sum(part.text * part.utterances for part in found) / total,
        max(part.longest_text for part in found),
        max(part.prompt for part in found),
    )


def _heard(files: list[Path]) -> list[float]:
    """Seconds of some of the files, spread evenly."""
    if not files:
        return []
    import soundfile

    found = []
    for file in files[:: max(1, len(files) // OPENED)]:
        try:
            found.append(float(soundfile.info(str(file)).duration))
        except (OSError, RuntimeError):
            found.append(UNKNOWN_SECONDS)
    return found
