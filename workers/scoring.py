"""WER, CER, BLEU and chrF with confidence intervals, and the rule for runaways.

Every metric is computed from per-utterance counts, so the bootstrap costs no second scoring. Which
normaliser or tokeniser was used goes with each score: it moves results by more than many a pruned
layer does.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import jiwer
import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from workers.errors import InvalidInput

RESAMPLES = 1000
# Written without spaces between words: a "word" is a letter, as in the normaliser's own paper.
_UNSPACED = frozenset({"ja", "th", "zh"})


@dataclass(frozen=True)
class Score:
    """One metric over one test set, in percent."""

    metric: Literal["wer", "cer", "bleu", "chrf"]
    value: float
    ci_low: float
    """Lower end of the 95 % interval (percentile bootstrap over utterances)."""
    ci_high: float
    samples: int
    """Utterances."""
    signature: str
    """Normaliser or tokeniser, and versions: scores with different ones do not compare."""


@dataclass(frozen=True)
class ErrorCount:
    """Edits that turn one hypothesis into its reference."""

    errors: int
    reference_length: int


def score_asr(
    references: Sequence[str], hypotheses: Sequence[str], language: str, seed: int = 0
) -> list[Score]:
    """WER and CER after normalisation.

    Args:
        references: what was said.
        hypotheses: what was recognised, in the same order.
        language: code of the language; chooses the normaliser.
        seed: of the bootstrap. With one seed, systems are compared on the same resamples.

    Raises:
        InvalidInput: no references, an empty one, or another number of hypotheses.
    """
    counts = {
        "wer": word_errors(references, hypotheses, language),
        "cer": character_errors(references, hypotheses, language),
    }
    scores = []
    for metric, found in counts.items():
        table = np.array([[count.errors, count.reference_length] for count in found])
        value = _error_rate(table.sum(0)[None])[0]
        low, high = _interval(table, _error_rate, seed)
        signature = f"{normaliser_signature(language)}|jiwer:{version('jiwer')}"
        name: Literal["wer", "cer"] = "wer" if metric == "wer" else "cer"
        scores.append(Score(name, value, low, high, len(found), signature))
    return scores


def score_ast(
    references: Sequence[str], hypotheses: Sequence[str], target_language: str, seed: int = 0
) -> list[Score]:
    """BLEU and chrF of the text as it is, tokenised as sacreBLEU does for the target language.

    Args:
        references: one translation for each utterance.
        hypotheses: in the same order.
        target_language: code of the language translated into.
        seed: of the bootstrap.

    Raises:
        InvalidInput: no references, an empty one, another number of hypotheses, or a language whose
            tokeniser is not installed.
    """
    _check(references, hypotheses)
    try:
        bleu = BLEU(trg_lang=target_language)
    except (ImportError, RuntimeError) as error:
        raise InvalidInput(
            f"BLEU cannot tokenise {target_language!r}: {str(error).strip().splitlines()[0]}",
            "tasks.target_language",
            f"install sacrebleu[{target_language}]",
        ) from error
    scores = []
    metrics: tuple[tuple[Literal["bleu", "chrf"], BLEU | CHRF], ...] = (
        ("bleu", bleu),
        ("chrf", CHRF()),
    )
    for name, metric in metrics:
        value = metric.corpus_score(list(hypotheses), [list(references)]).score
        # sacreBLEU's own bootstrap works on the same statistics.
        table = np.array(metric._extract_corpus_statistics(list(hypotheses), [list(references)]))
        low, high = _interval(table, functools.partial(_from_statistics, metric), seed)
        signature = str(metric.get_signature())
        scores.append(Score(name, value, low, high, len(references), signature))
    return scores


def word_errors(
    references: Sequence[str], hypotheses: Sequence[str], language: str
) -> list[ErrorCount]:
    """Substituted, inserted and deleted words of each utterance, after normalisation.

    Raises:
        InvalidInput: no references, an empty one, or another number of hypotheses.
    """
    _check(references, hypotheses)
    normalise = normaliser(language)
    return _count(
        jiwer.process_words(
            [normalise(text) for text in references], [normalise(text) for text in hypotheses]
        )
    )


def character_errors(
    references: Sequence[str], hypotheses: Sequence[str], language: str
) -> list[ErrorCount]:
    """Substituted, inserted and deleted characters of each utterance, after normalisation.

    Raises:
        InvalidInput: no references, an empty one, or another number of hypotheses.
    """
    _check(references, hypotheses)
    normalise = normaliser(language)
    # The spaces put between letters to count words would be characters that are always right.
    gap = "" if language in _UNSPACED else " "
    return _count(
        jiwer.process_characters(
            [normalise(text).replace(" ", gap) for text in references],
            [normalise(text).replace(" ", gap) for text in hypotheses],
        )
    )


def normaliser(language: str) -> Callable[[str], str]:
    """Text as it is scored: Whisper's English normaliser, or its basic one; single spaces."""
    return functools.partial(_normalised, language)


def normaliser_signature(language: str) -> str:
    """Name and version of the normaliser that `language` gets."""
    name = "english" if language == "en" else "basic"
    split = "-letters" if language in _UNSPACED else ""
    return f"norm:whisper-{name}{split}:{version('whisper-normalizer')}"


def runaway(hypothesis: str, capped: bool) -> bool:
    """Whether a decoder lost its way: it hit the limit, or said the same thing over and over.

    The second: up to six words in a row, four or more times running, six words or more in all.
    """
    if capped:
        return True
    words = hypothesis.split()
    if len(words) < 2:
        words = list(hypothesis)
    for size in range(1, 7):
        needed = max(4 * size, 6) - size
        same = 0
        for earlier, word in zip(words, words[size:], strict=False):
            same = same + 1 if earlier == word else 0
            if same >= needed:
                return True
    return False


def runaway_rate(hypotheses: Sequence[str], capped: Sequence[bool]) -> float:
    """Fraction of hypotheses that are runaways."""
    found = [runaway(text, cut) for text, cut in zip(hypotheses, capped, strict=True)]
    return sum(found) / len(found) if found else 0.0


@functools.lru_cache(maxsize=1 << 16)
def _normalised(language: str, text: str) -> str:
    # A sweep scores the same references under every model, and each text for several figures.
    return " ".join(_normaliser(language)(text).split())


@functools.cache
def _normaliser(language: str) -> Callable[[str], str]:
    if language == "en":
        return EnglishTextNormalizer()
    return BasicTextNormalizer(split_letters=language in _UNSPACED)


def _check(references: Sequence[str], hypotheses: Sequence[str]) -> None:
    if not references:
        raise InvalidInput("there are no references to score against", "data.test")
    if len(references) != len(hypotheses):
        raise InvalidInput(
            f"{len(hypotheses)} hypotheses for {len(references)} references",
            remedy="give one hypothesis for each reference, an empty text if there is none",
        )
    for i, text in enumerate(references):
        if not text.strip():
            raise InvalidInput(
                f"reference {i} is empty", "data.test", "take utterances without text out"
            )


def _count(output: jiwer.WordOutput | jiwer.CharacterOutput) -> list[ErrorCount]:
    counts = []
    for reference, chunks in zip(output.references, output.alignments, strict=True):
        errors = sum(
            max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx)
            for c in chunks
            if c.type != "equal"
        )
        counts.append(ErrorCount(errors, len(reference)))
    return counts


def _error_rate(sums: np.ndarray) -> np.ndarray:
    """Percent, from errors and lengths `[resamples, 2]`."""
    return 100.0 * sums[:, 0] / np.maximum(sums[:, 1], 1)


def _from_statistics(metric: BLEU | CHRF, sums: np.ndarray) -> np.ndarray:
    return np.array([metric._compute_score_from_stats(row.tolist()).score for row in sums])


def _interval(
    table: np.ndarray, score: Callable[[np.ndarray], np.ndarray], seed: int
) -> tuple[float, float]:
    """95 % interval from per-utterance counts `[utterances, counts]`, which add up."""
    n = len(table)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    low, high = np.percentile(score(drawn @ table), [2.5, 97.5])
    return float(low), float(high)
