"""The lab's speech encoders: a Whisper type and a w2v-BERT type, trained on the lab's speech.

They learn three things at once: the word sequence (CTC), the phoneme and the word of every frame
(cross-entropy, from the synthesiser's times). Some clips get a noise floor, without which the
out-of-domain set would be hopeless (80 % WER instead of 8). Then the heads are dropped and the
encoder is saved as a plain Hugging Face folder.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jiwer
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.audio import read_audio
from workers.lab.acoustics import RATE, Conformer, Whisper, with_noise
from workers.lab.catalogue import Size
from workers.lab.muon import Muon
from workers.lab.shapes import FRAME_RATE

Kind = Literal["whisper", "conformer"]
BATCH = 16
"""Clips a step. Small batches learn far more in the same time here: 24 gave twice the WER."""
LR, MUON_LR = 3e-3, 0.02


@dataclass(frozen=True)
class Recipe:
    """Size of an encoder and of its training."""

    width: int
    layers: int
    feed_forward: int
    steps: int
    gate: float
    """Mean WER (percent) of greedy CTC on the development set that the encoder must reach."""


RECIPES: dict[tuple[Kind, Size], Recipe] = {
    ("whisper", "full"): Recipe(128, 2, 512, steps=680, gate=6.0),
    ("conformer", "full"): Recipe(128, 2, 256, steps=600, gate=6.0),
    ("whisper", "tiny"): Recipe(64, 2, 128, steps=340, gate=100.0),
    ("conformer", "tiny"): Recipe(64, 1, 128, steps=400, gate=100.0),
}
EXTRA_ROUNDS = 3
"""Further rounds, of a quarter of the steps, for an encoder that misses its gate."""


@dataclass(frozen=True)
class _Clip:
    energies: Tensor
    """`[time, bins]`."""
    text: str
    language: str
    words: Sequence[Mapping[str, Any]]
    phones: Sequence[Mapping[str, Any]]


class _Heads(nn.Module):
    """What the encoder learns by; thrown away afterwards."""

    def __init__(self, width: int, words: Sequence[str], phones: Sequence[str]) -> None:
        super().__init__()
        self.words, self.phones = ["", *words], ["", *phones]
        self._word_ids = {word: i for i, word in enumerate(self.words)}
        self._phone_ids = {phone: i for i, phone in enumerate(self.phones)}
        self.ctc = nn.Linear(width, len(self.words))
        self.word = nn.Linear(width, len(self.words))
        self.phone = nn.Linear(width, len(self.phones))

    def targets(self, clip: _Clip, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Words in order; word of each frame; phone of each frame (0: none)."""
        return (
            torch.tensor([self._word_ids[word] for word in clip.text.split()]),
            _of_frames([(w, self._word_ids[w["word"]]) for w in clip.words], frames),
            _of_frames([(p, self._phone_ids[p["phone"]]) for p in clip.phones], frames),
        )

    def loss(self, frames: Tensor, targets: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Sum of the three losses on `[batch, frames, width]`."""
        texts = [text for text, _, _ in targets]
        words = torch.cat([word for _, word, _ in targets])
        phones = torch.cat([phone for _, _, phone in targets])
        flat = frames.flatten(0, 1)
        ctc = functional.ctc_loss(
            self.ctc(frames).log_softmax(-1).transpose(0, 1),
            torch.cat(texts),
            torch.full((len(texts),), frames.shape[1]),
            torch.tensor([len(text) for text in texts]),
            zero_infinity=True,
        )
        return (
            ctc
            + functional.cross_entropy(self.word(flat), words)
            + functional.cross_entropy(self.phone(flat), phones)
        )

    def read(self, frames: Tensor) -> list[str]:
        """Greedy CTC."""
        best = [torch.unique_consecutive(row).tolist() for row in self.ctc(frames).argmax(-1)]
        return [" ".join(self.words[i] for i in row if i) for row in best]


def build_encoder(
    kind: Kind,
    size: Size,
    seed: int,
    speech: Mapping[str, Path],
    out: Path,
    progress: Callable[[float, str], None],
) -> dict[str, Any]:
    """Train an encoder and save it as a plain Hugging Face folder.

    Args:
        kind: `whisper` or `conformer` (w2v-BERT type).
        size: `full` or `tiny`.
        seed: weights, order and noise; the same seed and speech give the same bytes.
        speech: data set folders by language, as `build_speech` writes them.
        out: the folder to fill.
        progress: called with a fraction done and a few words.

    Returns:
        Parameters, steps, frame rate, and the WER of greedy CTC on the development set by language.

    Raises:
        RuntimeError: the encoder did not learn.
    """
    recipe = RECIPES[kind, size]
    with _reproducible(seed):
        architecture = Whisper if kind == "whisper" else Conformer
        front = architecture(recipe.width, recipe.layers, recipe.feed_forward)
        train = [clip for lang in sorted(speech) for clip in _read(speech[lang], "train", front)]
        progress(0.1, "log-mel energies computed")
        heads = _Heads(
            recipe.width,
            sorted({word for clip in train for word in clip.text.split()}),
            sorted({phone["phone"] for clip in train for phone in clip.phones}),
        )
        dev = [clip for lang in sorted(speech) for clip in _read(speech[lang], "dev", front)]
        training = _Training(front, heads, train, seed)
        training.run(recipe.steps, lambda done: progress(0.1 + 0.8 * done, "training"))
        scores = _word_error_rates(front, heads, dev)
        for _ in range(EXTRA_ROUNDS):
            if _mean(scores) <= recipe.gate:
                break
            training.run(recipe.steps // 4, lambda _: progress(0.9, "training on"), scale=0.5)
            scores = _word_error_rates(front, heads, dev)
    if _mean(scores) > recipe.gate:
        raise RuntimeError(
            f"the {kind} encoder did not learn: {_mean(scores):.1f} % word error rate on the "
            f"development set, at most {recipe.gate} % wanted"
        )
    front.model.save_pretrained(out)
    front.extractor.save_pretrained(out)
    return {
        "kind": kind,
        "parameters": sum(weight.numel() for weight in front.encoder.parameters()),
        "frame_rate": FRAME_RATE,
        "steps": training.steps,
        "dev_wer": {language: round(score, 2) for language, score in scores.items()},
    }


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """One thread (sums in another order give other bytes) and a generator of one's own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _read(folder: Path, split: str, front: Whisper | Conformer) -> Iterator[_Clip]:
    columns = ["audio", "text", "lang", "words", "phones"]
    for row in pq.read_table(folder / f"{split}.parquet", columns=columns).to_pylist():
        energies = front.energies(read_audio(row["audio"]["bytes"], RATE))
        yield _Clip(energies, row["text"], row["lang"], row["words"], row["phones"])


def _of_frames(spans: Sequence[tuple[Mapping[str, Any], int]], frames: int) -> Tensor:
    """The class of each frame: that of the span its middle lies in."""
    classes = torch.zeros(frames, dtype=torch.long)
    for span, label in spans:
        first = math.ceil(span["start"] * FRAME_RATE - 0.5)
        classes[first : math.ceil(span["end"] * FRAME_RATE - 0.5)] = label
    return classes


def _by_length(clips: Sequence[_Clip]) -> dict[int, list[int]]:
    """Clips of equal length, so that no batch has padding."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, clip in enumerate(clips):
        groups[len(clip.energies)].append(i)
    return dict(sorted(groups.items()))


class _Training:
    """The optimizers' state, kept between rounds."""

    def __init__(
        self,
        front: Whisper | Conformer,
        heads: _Heads,
        clips: Sequence[_Clip],
        seed: int,
    ) -> None:
        self._front, self._heads, self._clips = front, heads, clips
        self._groups = _by_length(clips)
        self._rng = random.Random(seed)
        self._noise = torch.Generator().manual_seed(seed)
        self._targets = [heads.targets(clip, len(clip.energies) // front.stack) for clip in clips]
        matrices = [w for name, w in front.encoder.named_parameters() if _for_muon(name, w)]
        chosen = {id(weight) for weight in matrices}
        trained = [*front.encoder.parameters(), *heads.parameters()]
        others = [w for w in trained if w.requires_grad and id(w) not in chosen]
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, MUON_LR), MUON_LR),
            (torch.optim.AdamW(others, LR, betas=(0.9, 0.98)), LR),
        ]
        self._trained = [*matrices, *others]
        self.steps = 0

    def run(self, total: int, progress: Callable[[float], None], scale: float = 1.0) -> None:
        """One cosine cycle of `total` steps; `scale` multiplies the learning rates."""
        batches: list[list[int]] = []
        while len(batches) < total:
            batches += self._epoch()
        self._front.model.train()
        for step, batch in enumerate(batches[:total]):
            cosine = 0.51 + 0.49 * math.cos(math.pi * step / total)
            for optimizer, peak in self._optimizers:
                optimizer.param_groups[0]["lr"] = peak * scale * cosine * min(1, (step + 1) / 40)
                optimizer.zero_grad()
            energies = torch.stack([self._clips[i].energies for i in batch])
            frames = self._front(with_noise(energies, self._front.nats, self._noise))
            self._heads.loss(frames, [self._targets[i] for i in batch]).backward()
            nn.utils.clip_grad_norm_(self._trained, 1.0)
            for optimizer, _ in self._optimizers:
                optimizer.step()
            self.steps += 1
            if step % 20 == 0:
                progress(step / total)
        self._front.model.eval()

    def _epoch(self) -> list[list[int]]:
        batches = []
        for group in self._groups.values():
            order = self._rng.sample(group, len(group))
            batches += [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        self._rng.shuffle(batches)
        return batches


def _for_muon(name: str, weight: nn.Parameter) -> bool:
    """Matrices and dense convolutions; not tables, depthwise convolutions, biases and norms."""
    table = "embed_positions" in name or "distance_embedding" in name
    return weight.requires_grad and weight.ndim > 1 and weight.shape[1] > 1 and not table


@torch.no_grad()
def _word_error_rates(
    front: Whisper | Conformer, heads: _Heads, clips: Sequence[_Clip]
) -> dict[str, float]:
    """WER of greedy CTC in percent, by language."""
    said: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for group in _by_length(clips).values():
        frames = front(torch.stack([clips[i].energies for i in group]))
        for i, text in zip(group, heads.read(frames), strict=True):
            references, hypotheses = said[clips[i].language]
            references.append(clips[i].text)
            hypotheses.append(text)
    return {lang: 100 * jiwer.wer(*texts) for lang, texts in sorted(said.items())}


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)
