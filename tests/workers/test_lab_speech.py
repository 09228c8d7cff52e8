"""The lab's speech and encoders, in miniature: real synthesis, real training."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from workers.audio import read_audio
from workers.encoder import SpeechEncoder
from workers.errors import InvalidInput
from workers.lab import encoders
from workers.lab.encoders import Recipe, build_encoder
from workers.lab.espeak import Request, synthesise
from workers.lab.muon import orthogonalised
from workers.lab.shapes import COUNTS
from workers.lab.speech import build_speech

LANGUAGES = ("en", "de", "fr")
SPLITS = ("train", "dev", "test", "ood")


def _silent(fraction: float, message: str) -> None:
    assert 0 <= fraction <= 1
    assert message


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {language: tmp_path_factory.mktemp(language) for language in LANGUAGES}
    for language, folder in folders.items():
        build_speech(language, "tiny", 0, folder, _silent)
    return folders


@pytest.fixture(scope="module")
def encoder(
    speech: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whisper")
    return folder, build_encoder("whisper", "tiny", 0, speech, folder, _silent)


def test_same_seed_same_bytes_and_another_seed_others(
    speech: dict[str, Path], tmp_path: Path
) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    for folder, seed in ((again, 0), (other, 1)):
        folder.mkdir()
        build_speech("de", "tiny", seed, folder, _silent)
    assert _digests(again) == _digests(speech["de"])
    assert _rows(other, "test")[0]["text"] != _rows(again, "test")[0]["text"]


def test_a_voice_with_breath_noise_repeats_too() -> None:
    requests = [Request(f"the {word} house", "en-us+f2", 200, 50) for word in ("red", "old")]
    first, second = (list(synthesise(requests)) for _ in range(2))
    assert first == second


def test_an_unknown_voice_is_an_error_and_no_hang() -> None:
    with pytest.raises(RuntimeError, match="ended before its work was done"):
        list(synthesise([Request("hello", "no-such-voice", 200, 50)]))


@pytest.mark.parametrize("language", LANGUAGES)
def test_rows_hold_audio_texts_and_times_that_fit(speech: dict[str, Path], language: str) -> None:
    summary = json.loads((speech[language] / "dataset.json").read_text())
    ids = set()
    for split in SPLITS:
        rows = _rows(speech[language], split)
        assert len(rows) == COUNTS["tiny"][split] == summary["splits"][split]["clips"]
        for row in rows:
            ids.add(row["id"])
            assert row["text"] == row[f"text_{language}"]
            samples = read_audio(row["audio"]["bytes"], 16_000)
            assert len(samples) / 16_000 == pytest.approx(row["duration"])
            assert np.abs(samples).max() > 0.05
            assert [word["word"] for word in row["words"]] == row["text"].split()
            for spans in (row["words"], row["phones"]):
                times = [time for span in spans for time in (span["start"], span["end"])]
                assert times == sorted(times)
                assert times[0] >= 0
                assert times[-1] <= row["duration"] + 1e-3
                assert all(span["end"] > span["start"] for span in spans)
    assert len(ids) == sum(COUNTS["tiny"].values())


def test_words_that_espeak_joins_still_have_a_time_each() -> None:
    from workers.lab.speech import _phones, _words

    text = "a doctor waits with the old doctors"
    (said,) = synthesise([Request(text, "en-us", 200, 50)])
    assert len(said.words) == len(text.split()) - 1  # "with the" is one event
    duration = len(said.pcm) / 2 / 22_050
    words = {w["word"]: w for w in _words(text, said, _phones(said, duration), duration)}
    assert words["with"]["start"] < words["with"]["end"] == words["the"]["start"]
    assert words["the"]["start"] < words["the"]["end"] == words["old"]["start"]


def test_word_times_point_at_sound(speech: dict[str, Path]) -> None:
    for row in _rows(speech["fr"], "dev"):
        samples = read_audio(row["audio"]["bytes"], 16_000)
        for word in row["words"]:
            inside = samples[round(word["start"] * 16_000) : round(word["end"] * 16_000)]
            assert np.abs(inside).max() > 0.01


def test_out_of_domain_is_the_same_text_in_unseen_voices_with_noise(
    speech: dict[str, Path],
) -> None:
    folder = speech["en"]
    known = {row["speaker"] for split in SPLITS[:3] for row in _rows(folder, split)}
    ood, test = _rows(folder, "ood"), _rows(folder, "test")
    assert not known & {row["speaker"] for row in ood}
    assert [row["text"] for row in ood] == [row["text"] for row in test[: len(ood)]]

    def floor(row: dict[str, Any]) -> float:
        samples = read_audio(row["audio"]["bytes"], 16_000)
        frames = samples[: len(samples) // 160 * 160].reshape(-1, 160)
        return float(np.quantile(np.sqrt((frames**2).mean(1)), 0.02))

    assert np.mean([floor(row) for row in ood]) > 3 * np.mean([floor(row) for row in test])


def test_splits_share_no_sentence_and_languages_share_their_tests(speech: dict[str, Path]) -> None:
    english = {
        (language, split): {row["text_en"] for row in _rows(folder, split)}
        for language, folder in speech.items()
        for split in SPLITS
    }
    for language in LANGUAGES:
        assert not english[language, "train"] & english[language, "test"]
        assert not english[language, "train"] & english[language, "dev"]
        assert english[language, "test"] == english["en", "test"]
    assert not english["en", "train"] & english["de", "train"]


def test_the_encoder_opens_as_a_plain_folder_and_tells_words_apart(
    speech: dict[str, Path], encoder: tuple[Path, dict[str, Any]]
) -> None:
    folder, summary = encoder
    opened = SpeechEncoder.from_pretrained(folder)
    assert (opened.dim, opened.frame_rate, opened.limit) == (64, 25, 10)
    assert set(summary["dev_wer"]) == set(LANGUAGES)
    assert all(wer < 60 for wer in summary["dev_wer"].values())

    def frames_of_words(split: str) -> tuple[torch.Tensor, list[str]]:
        rows = _rows(speech["en"], split)
        encoded = opened.encode([read_audio(row["audio"]["bytes"], 16_000) for row in rows])
        vectors, names = [], []
        for row, frames in zip(rows, encoded, strict=True):
            for word in row["words"]:
                middle = int((word["start"] + word["end"]) / 2 * 25)
                vectors.append(frames[min(middle, len(frames) - 1)])
                names.append(word["word"])
        return torch.stack(vectors), names

    vectors, names = frames_of_words("train")
    classes = sorted(set(names))
    chosen = [[i for i, name in enumerate(names) if name == word] for word in classes]
    centres = torch.stack([vectors[rows].mean(0) for rows in chosen])
    vectors, names = frames_of_words("test")
    nearest = torch.cdist(vectors, centres).argmin(1)
    right = sum(classes[i] == name for i, name in zip(nearest.tolist(), names, strict=True))
    assert right / len(names) > 0.6


@pytest.mark.parametrize("kind", ["whisper", "conformer"])
def test_an_encoder_has_the_same_bytes_each_time(
    speech: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setitem(encoders.RECIPES, (kind, "tiny"), Recipe(32, 1, 32, 5, 1000.0))
    english = {"en": speech["en"]}
    folders = [tmp_path / name for name in ("first", "second", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        torch.rand(1)  # the process's own generator does not matter
        build_encoder(kind, "tiny", seed, english, folder, _silent)
    first, second, other = (_digests(folder) for folder in folders)
    assert first == second
    assert first["model.safetensors"] != other["model.safetensors"]


def test_an_encoder_that_learns_nothing_is_refused(
    speech: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(encoders.RECIPES, ("whisper", "tiny"), Recipe(32, 1, 32, 4, 5.0))
    with pytest.raises(RuntimeError, match=r"did not learn: .* at most 5\.0 % wanted"):
        build_encoder("whisper", "tiny", 0, {"en": speech["en"]}, tmp_path, _silent)
    assert not list(tmp_path.iterdir())


def test_longer_audio_than_the_encoder_takes_is_refused(
    encoder: tuple[Path, dict[str, Any]],
) -> None:
    with pytest.raises(InvalidInput, match="at most 10 s"):
        SpeechEncoder.from_pretrained(encoder[0]).encode([np.zeros(170_000, np.float32)])


def test_muons_matrices_are_nearly_orthogonal() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(3, 16, 40, generator=generator)))
    assert values.min() > 0.6
    assert values.max() < 1.3
