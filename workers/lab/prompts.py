"""Text examples in the very form a SpeechLLM's decoder reads speech: what the lab's decoders learn.

`[bos][prefix][source slots][suffix][target][eos]`, with the default prompts. The source is words, one
slot each, or words the way a projector hands them over: each on one to three slots, with empty slots
around.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.config import LANGUAGE_NAMES, Condition, PromptSettings
from workers.lab.grammar import LANGUAGES, sentences, tokenizer
from workers.lab.lexicon import Size

SLOTS_PER_WORD = 3
"""Most slots a word takes in a stuttered source."""


@dataclass(frozen=True)
class Batch:
    """Examples, padded on the right (which causal attention never sees)."""

    tokens: Tensor
    """`[batch, time]`, without the last target token."""
    source: Tensor
    """`[batch, time]`, True where the source is."""
    positions: Tensor
    """`[labels]`, indices into `batch × time` whose next token is a target token."""
    labels: Tensor
    """`[labels]`, those next tokens; each example ends with `<eos>`."""
    lengths: tuple[int, ...]
    """Labels of each example."""


class PromptedText:
    """Copying and translating in text, as prompts.

    Args:
        size: which grammar.
        seed: which sentences, in which order, stuttered how.
        conditions: what is asked, and how often relative to the others.
        counts: sentences of `train` and `dev`.
    """

    def __init__(
        self, size: Size, seed: int, conditions: Mapping[Condition, float], counts: dict[str, int]
    ) -> None:
        words = tokenizer(size)
        self.tokenizer = words
        self.conditions = tuple(conditions)
        self.counts = counts
        ids = words.get_vocab()
        self._empty, self._bos, self._eos = ids["<unk>"], ids["<bos>"], ids["<eos>"]
        self._sentences = {
            split: {
                language: [[ids[word] for word in row[language].split()] for row in rows]
                for language in LANGUAGES
            }
            for split, rows in sentences(size, seed, counts).items()
        }
        self._likely = self._weights()
        self._shares = np.cumsum(list(conditions.values())) / sum(conditions.values())
        self._prompts = [self._prompt(condition) for condition in self.conditions]
        self._seed = seed

    def _prompt(self, condition: Condition) -> tuple[list[int], list[int]]:
        templates = PromptSettings()
        filled = getattr(templates, condition.task).format(
            source=LANGUAGE_NAMES[condition.source_language],
            target=LANGUAGE_NAMES.get(condition.target_language or "", ""),
            audio="{audio}",
        )
        before, after = filled.split("{audio}")
        return [self._bos, *self.tokenizer(before).input_ids], self.tokenizer(after).input_ids

    def _weights(self) -> np.ndarray:
        """Cumulative probability of each training sentence: the rarer its rarest word, the likelier.

        Drawn evenly, the German endings that one sentence in 400 has are most of the errors left.
        """
        rarest = np.full(self.counts["train"], np.inf)
        for rows in self._sentences["train"].values():
            counts = np.bincount([word for row in rows for word in row])
            rarest = np.minimum(rarest, [counts[row].min() for row in rows])
        return np.cumsum(rarest**-0.5) / np.sum(rarest**-0.5)

    def _stutter(self, source: list[int], rng: np.random.Generator) -> list[int]:
        repeats = rng.integers(1, SLOTS_PER_WORD + 1, len(source))
        before, after = rng.integers(0, 3, 2)
        slots = [word for word, n in zip(source, repeats, strict=True) for _ in range(n)]
        return [self._empty] * before + slots + [self._empty] * after

    def _batch(
        self, split: str, chosen: list[tuple[int, int]], rng: np.random.Generator, stuttered: float
    ) -> Batch:
        """Of `(condition, sentence)` pairs; `stuttered` is the share of stuttered sources."""
        rows: list[tuple[list[int], int, int, list[int]]] = []
        for number, sentence in chosen:
            condition, (before, after) = self.conditions[number], self._prompts[number]
            texts = self._sentences[split]
            source = texts[condition.source_language][sentence]
            if rng.random() < stuttered:
                source = self._stutter(source, rng)
            target = texts[condition.target_language or condition.source_language][sentence]
            start = len(before)
            rows.append(
                ([*before, *source, *after], start, start + len(source), [*target, self._eos])
            )
        time = max(len(prompt) + len(target) for prompt, _, _, target in rows) - 1
        tokens = np.zeros((len(rows), time), np.int64)
        where = np.zeros((len(rows), time), bool)
        positions, labels = [], []
        for row, (prompt, start, stop, target) in enumerate(rows):
            text = [*prompt, *target[:-1]]
            tokens[row, : len(text)] = text
            where[row, start:stop] = True
            positions.append(row * time + np.arange(len(prompt) - 1, len(text)))
            labels += target
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(where),
            torch.from_numpy(np.concatenate(positions)),
            torch.tensor(labels),
            tuple(len(target) for *_, target in rows),
        )

    def training(
        self, batch_size: int, stuttered: float, ramp: int, stream: int
    ) -> Iterator[Batch]:
        """Endless batches of examples of similar lengths.

        Args:
            batch_size: examples.
            stuttered: share of stuttered sources.
            ramp: batches over which that share rises from nothing.
            stream: numbers independent streams.
        """
        rng = np.random.default_rng([self._seed, stream])
        together = 8
        for drawn in itertools.count():
            share = stuttered * min(1.0, drawn * together / ramp) if ramp else stuttered
            conditions = np.searchsorted(self._shares, rng.random(batch_size * together))
            rows = np.searchsorted(self._likely, rng.random(batch_size * together))

            def length(pair: tuple[int, int]) -> int:
                source = self.conditions[pair[0]].source_language
                return len(self._sentences["train"][source][pair[1]])

            pairs = sorted(zip(conditions.tolist(), rows.tolist(), strict=True), key=length)
            for start in rng.permutation(together) * batch_size:
                yield self._batch("train", pairs[start : start + batch_size], rng, share)

    def development(self, count: int, stuttered: float) -> dict[str, Batch]:
        """One batch of the first `count` development sentences per condition, by its label."""
        return {
            condition.label: self._batch(
                "dev",
                [(number, row) for row in range(min(count, self.counts["dev"]))],
                np.random.default_rng([self._seed, 1, number]),
                stuttered,
            )
            for number, condition in enumerate(self.conditions)
        }
