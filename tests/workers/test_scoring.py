import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from workers.errors import InvalidInput
from workers.scoring import (
    ErrorCount,
    runaway,
    runaway_rate,
    score_asr,
    score_ast,
    word_errors,
)


def test_word_and_character_error_rates_of_hand_made_cases():
    references = ["the red house", "a big dog runs", "small cats"]
    hypotheses = ["The red mouse!", "a dog runs fast", "small  cats"]
    wer, cer = score_asr(references, hypotheses, "de")
    # One substitution; one deletion and one insertion; nothing: 3 errors in 9 words.
    assert (wer.metric, wer.value, wer.samples) == ("wer", pytest.approx(100 * 3 / 9), 3)
    # h→m; "big " gone (4) and " fast" too many (5); nothing: 10 errors in 13 + 14 + 10 characters.
    assert (cer.metric, cer.value) == ("cer", pytest.approx(100 * 10 / 37))
    assert word_errors(references, hypotheses, "de") == [
        ErrorCount(1, 3),
        ErrorCount(2, 4),
        ErrorCount(0, 2),
    ]


def test_english_gets_its_own_normaliser_and_the_signature_says_so():
    english = score_asr(["I'm twenty two"], ["i am 22"], "en")[0]
    other = score_asr(["I'm twenty two"], ["i am 22"], "de")[0]
    assert english.value == 0
    assert other.value > 0
    assert english.signature.startswith("norm:whisper-english:0.")
    assert other.signature.startswith("norm:whisper-basic:0.")
    assert "jiwer:" in english.signature


def test_languages_without_spaces_are_scored_by_letter():
    assert score_asr(["我喜欢猫"], ["我喜欢狗"], "zh")[0].value == pytest.approx(25)
    assert score_asr(["我喜欢猫"], ["我喜欢狗"], "zh")[1].value == pytest.approx(25)


def test_wer_can_exceed_a_hundred_and_an_empty_hypothesis_is_all_deletions():
    assert score_asr(["ja"], ["nein nein nein"], "de")[0].value == pytest.approx(300)
    assert score_asr(["ja doch"], [""], "de")[0].value == pytest.approx(100)


def test_bleu_and_chrf_of_hand_made_cases():
    references = ["the red house is big .", "a small dog runs home now"]
    bleu, chrf = score_ast(references, references, "en")
    assert (bleu.metric, chrf.metric) == ("bleu", "chrf")
    assert bleu.value == pytest.approx(100)
    assert chrf.value == pytest.approx(100)
    assert bleu.ci_low == pytest.approx(100)
    # 5 of 6 unigrams, 3 of 5 bigrams, 2 of 4 trigrams, 1 of 3 four-grams; no brevity penalty.
    bleu, _ = score_ast(["the red house is so big"], ["the red house is very big"], "en")
    assert bleu.value == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert "tok:13a" in bleu.signature
    assert "version:" in bleu.signature


def test_bleu_uses_the_target_languages_tokeniser():
    references, hypotheses = ["我喜欢红色的房子和猫"], ["我喜欢红色的房子和狗"]
    bleu, _ = score_ast(references, hypotheses, "zh")
    assert bleu.value > 70
    assert "tok:zh" in bleu.signature


def test_interval_is_that_of_resampling_utterances():
    rng = np.random.default_rng(3)
    references = ["eins zwei drei vier fünf"] * 60
    wrong = rng.integers(0, 6, 60)
    hypotheses = [
        " ".join(["x"] * w + r.split()[w:]) for w, r in zip(wrong, references, strict=True)
    ]
    wer, _ = score_asr(references, hypotheses, "de")
    means = [wrong[rng.integers(0, 60, 60)].mean() * 20 for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert wer.ci_low == pytest.approx(low, abs=1.0)
    assert wer.ci_high == pytest.approx(high, abs=1.0)
    assert score_asr(references, hypotheses, "de")[0] == wer
    assert score_asr(references, hypotheses, "de", seed=1)[0].ci_low != wer.ci_low


def test_bleu_interval_matches_sacrebleus_own_bootstrap():
    references = [f"the number {i} is a big red house" for i in range(50)]
    hypotheses = [r if i % 3 else r.replace("big", "small") for i, r in enumerate(references)]
    bleu, _ = score_ast(references, hypotheses, "en")
    theirs = BLEU(trg_lang="en").corpus_score(hypotheses, [references], n_bootstrap=1000)
    assert bleu.value == pytest.approx(theirs.score)
    assert (bleu.ci_high - bleu.ci_low) / 2 == pytest.approx(theirs._ci, rel=0.15)


@pytest.mark.parametrize("score", [score_asr, score_ast])
def test_nothing_to_score_is_refused(score):
    with pytest.raises(InvalidInput, match="there are no references"):
        score([], [], "en")
    with pytest.raises(InvalidInput, match="1 hypotheses for 2 references"):
        score(["a b", "c d"], ["a b"], "en")
    with pytest.raises(InvalidInput, match="reference 1 is empty"):
        score(["a b", "  "], ["a b", "c"], "en")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the dog the dog the dog the dog", True),
        ("no no no no no no", True),
        ("no no no he said", False),
        ("a very very very very big house", False),
        ("the dog sees the dog and the dog sees", False),
        ("哈哈哈哈哈哈哈", True),
        ("", False),
    ],
)
def test_runaways_by_repetition(text, expected):
    assert runaway(text, capped=False) is expected
    assert runaway(text, capped=True)


def test_runaway_rate_is_a_fraction():
    assert runaway_rate(["a b", "c", "no no no no no no", "d"], [False, True, False, False]) == 0.5
