"""Manifests: JSONL files that name audio and its transcripts (the NeMo form). No torch, no audio."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.errors import InvalidInput


@dataclass(frozen=True)
class Utterance:
    """One clip with its texts."""

    id: str
    text: str
    lang: str | None = None
    translations: dict[str, str] = field(default_factory=dict)
    """Translations by language code; `""` for one whose language the data does not name."""
    duration: float | None = None
    """Seconds."""
    offset: float = 0.0
    """Where the clip starts in its file, in seconds."""
    audio_path: Path | None = None
    audio_bytes: bytes | None = None
    words: tuple[tuple[str, float, float], ...] = ()
    """Word, start, end (seconds), where the data has them."""
    sampling_rate: int | None = None
    """What the data say of the file's rate, in Hz."""
    where: str = ""
    """File and line of a manifest."""

    def translation(self, target: str) -> str | None:
        """The text in `target`, if there is one."""
        return self.translations.get(target, self.translations.get(""))


def read_manifest(path: Path, skipped: list[InvalidInput] | None = None) -> list[Utterance]:
    """Read a manifest; audio paths are relative to it.

    Args:
        path: the JSONL file.
        skipped: receives what is wrong with bad lines, which are then left out; None: raise.

    Raises:
        InvalidInput: a line that is no JSON object, lacks a field, or names missing audio; or no
            (good) lines at all. Names file and line.
    """
    utterances: list[Utterance] = []
    seen: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot be read: {error}", str(path)) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            utterance = _utterance(line, path, number)
            if utterance.id in seen:
                raise InvalidInput(
                    f"id {utterance.id!r} stands twice",
                    utterance.where,
                    "give every line its own id",
                )
        except InvalidInput as error:
            if skipped is None:
                raise
            skipped.append(error)
            continue
        seen.add(utterance.id)
        utterances.append(utterance)
    if not utterances:
        bad = f" (all {len(skipped)} lines are bad: {skipped[0]})" if skipped else ""
        raise InvalidInput(
            f"the data set is empty{bad}", str(path), "a manifest has one JSON a line"
        )
    return utterances


def _utterance(line: str, path: Path, number: int) -> Utterance:
    where = f"{path}:{number}"
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"not valid JSON: {error}", where) from None
    if not isinstance(row, dict):
        raise InvalidInput("not a JSON object", where)
    for name in ("audio_filepath", "text"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise InvalidInput(f"no {name}", where, 'e.g. {"audio_filepath": "a.wav", "text": "…"}')
    for name in ("duration", "offset"):
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
            raise InvalidInput(f"{name} is not a number of seconds: {value!r}", where)
    rate = row.get("sampling_rate", row.get("sample_rate"))
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int) or rate <= 0):
        raise InvalidInput(f"sampling_rate is not a number of Hz: {rate!r}", where)
    audio = path.parent / row["audio_filepath"]
    if not audio.is_file():
        raise InvalidInput(f"no audio file {audio}", where, "paths are relative to the manifest")
    translations = {
        name.removeprefix("text_"): value
        for name, value in row.items()
        if name.startswith("text_") and isinstance(value, str)
    }
    if isinstance(row.get("translation"), str):
        translations[""] = row["translation"]
    return Utterance(
        id=str(row.get("id") or f"{row['audio_filepath']}:{row.get('offset') or 0}"),
        text=row["text"],
        lang=row.get("lang") if isinstance(row.get("lang"), str) else None,
        translations=translations,
        duration=row.get("duration"),
        offset=float(row.get("offset") or 0.0),
        audio_path=audio,
        words=_words(row.get("words"), where),
        sampling_rate=rate,
        where=where,
    )


def _words(value: Any, where: str) -> tuple[tuple[str, float, float], ...]:
    if value is None:
        return ()
    try:
        return tuple((str(w["word"]), float(w["start"]), float(w["end"])) for w in value)
    except (TypeError, KeyError, ValueError):
        raise InvalidInput(
            "words is not a list of {word, start, end}", where, "times in seconds"
        ) from None
