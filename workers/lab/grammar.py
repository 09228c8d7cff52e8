"""Parallel sentences in four languages, their vocabulary and their tokenizer: the lab's text.

One meaning is drawn and then said in each language with its own agreement: gender, number and case
in German, German's verb-second order after an adverb, gender and number in French and Spanish,
French adjectives before or after the noun, the Spanish personal `a`, English `a`/`an`. The words
themselves are in `lexicon`.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from workers.lab.lexicon import (
    Adjective,
    Adverb,
    Gender,
    Lexicon,
    Noun,
    Preposition,
    Size,
    Verb,
    lexicon,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LANGUAGES = ("en", "de", "fr", "es")
SPLITS = {"train": 0.8, "dev": 0.1, "test": 0.1}
"""Share of all possible sentences that each split draws from."""
PROMPT_WORDS = (
    "transcribe", "translate", "to", "text", ":", "english", "german", "french", "spanish",
)  # fmt: skip
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")

Determiner = Literal["the", "a", "the-plural", "two"]
Case = Literal["nominative", "accusative", "dative"]


@dataclass(frozen=True)
class NounPhrase:
    """Determiner, adjective or none, noun."""

    determiner: Determiner
    adjective: Adjective | None
    noun: Noun

    @property
    def plural(self) -> bool:
        """Whether it is more than one."""
        return self.determiner in ("the-plural", "two")


@dataclass(frozen=True)
class Meaning:
    """A sentence before it is said in a language."""

    subject: NounPhrase
    verb: Verb
    object: NounPhrase | None = None
    preposition: Preposition | None = None
    place: NounPhrase | None = None
    adverb: Adverb | None = None


_GERMAN_THE = {
    "nominative": {"m": "der", "f": "die", "n": "das", "plural": "die"},
    "accusative": {"m": "den", "f": "die", "n": "das", "plural": "die"},
    "dative": {"m": "dem", "f": "der", "n": "dem", "plural": "den"},
}
_GERMAN_A = {
    "nominative": {"m": "ein", "f": "eine", "n": "ein"},
    "accusative": {"m": "einen", "f": "eine", "n": "ein"},
    "dative": {"m": "einem", "f": "einer", "n": "einem"},
}


def _german_ending(phrase: NounPhrase, case: Case) -> str:
    """Ending of the adjective: weak after `der`, mixed after `ein`, strong after a numeral."""
    gender = phrase.noun.de_gender
    if phrase.determiner == "two":
        return "en" if case == "dative" else "e"
    if phrase.plural or case == "dative":
        return "en"
    if case == "accusative" and gender == "m":
        return "en"
    if phrase.determiner == "the" or gender == "f":
        return "e"
    return "er" if gender == "m" else "es"


def _german(phrase: NounPhrase, case: Case) -> list[str]:
    noun = phrase.noun
    if phrase.determiner == "two":
        article = "zwei"
    elif phrase.determiner == "a":
        article = _GERMAN_A[case][noun.de_gender]
    else:
        article = _GERMAN_THE[case]["plural" if phrase.plural else noun.de_gender]
    word = noun.de[phrase.plural]
    if phrase.plural and case == "dative" and word[-1] not in "ns":
        word += "n"
    if not phrase.plural and case != "nominative" and noun.de[0] == "junge":
        word += "n"  # the weak declension: der junge, den jungen, dem jungen
    adjective = [phrase.adjective.de + _german_ending(phrase, case)] if phrase.adjective else []
    return [article, *adjective, word]


def _english(phrase: NounPhrase) -> list[str]:
    word = phrase.noun.en[phrase.plural]
    words = [phrase.adjective.en, word] if phrase.adjective else [word]
    article = {"the": "the", "the-plural": "the", "two": "two", "a": "a"}[phrase.determiner]
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return [article, *words]


def _romance_article(phrase: NounPhrase, gender: Gender, table: Mapping[str, str]) -> str:
    number = "plural-" if phrase.determiner == "the-plural" else ""
    kind = {"the": "the", "the-plural": "the", "a": "a"}.get(phrase.determiner)
    return table[f"{number}{kind}-{gender}"] if kind else table["two"]


_FRENCH_ARTICLES = {
    "the-m": "le", "the-f": "la", "plural-the-m": "les", "plural-the-f": "les",
    "a-m": "un", "a-f": "une", "two": "deux",
}  # fmt: skip
_SPANISH_ARTICLES = {
    "the-m": "el", "the-f": "la", "plural-the-m": "los", "plural-the-f": "las",
    "a-m": "un", "a-f": "una", "two": "dos",
}  # fmt: skip


def _french(phrase: NounPhrase) -> list[str]:
    noun = phrase.noun
    article = _romance_article(phrase, noun.fr_gender, _FRENCH_ARTICLES)
    word = noun.fr[phrase.plural]
    if phrase.adjective is None:
        return [article, word]
    adjective = phrase.adjective.fr[2 * phrase.plural + (noun.fr_gender == "f")]
    before = phrase.adjective.fr_before_noun
    return [article, adjective, word] if before else [article, word, adjective]


def _spanish(phrase: NounPhrase, *, direct_object: bool = False) -> list[str]:
    noun = phrase.noun
    article = _romance_article(phrase, noun.es_gender, _SPANISH_ARTICLES)
    words = [article, noun.es[phrase.plural]]
    if phrase.adjective is not None:
        words.append(phrase.adjective.es[2 * phrase.plural + (noun.es_gender == "f")])
    if direct_object and noun.animate:
        return ["al", *words[1:]] if article == "el" else ["a", *words]
    return words


def _say_english(meaning: Meaning) -> list[str]:
    words = [*_english(meaning.subject), meaning.verb.en[meaning.subject.plural]]
    if meaning.object is not None:
        words += _english(meaning.object)
    if meaning.preposition is not None and meaning.place is not None:
        words += [meaning.preposition.en, *_english(meaning.place)]
    return [meaning.adverb.en, *words] if meaning.adverb else words


def _say_german(meaning: Meaning) -> list[str]:
    subject = _german(meaning.subject, "nominative")
    verb = meaning.verb.de[meaning.subject.plural]
    # The verb stays second, whatever comes first.
    words = [meaning.adverb.de, verb, *subject] if meaning.adverb else [*subject, verb]
    if meaning.object is not None:
        words += _german(meaning.object, "accusative")
    if meaning.preposition is not None and meaning.place is not None:
        words += [meaning.preposition.de, *_german(meaning.place, meaning.preposition.case)]
    return words


def _say_french(meaning: Meaning) -> list[str]:
    words = [*_french(meaning.subject), meaning.verb.fr[meaning.subject.plural]]
    if meaning.object is not None:
        words += _french(meaning.object)
    if meaning.preposition is not None and meaning.place is not None:
        words += [meaning.preposition.fr, *_french(meaning.place)]
    return [meaning.adverb.fr, *words] if meaning.adverb else words


def _say_spanish(meaning: Meaning) -> list[str]:
    words = [*_spanish(meaning.subject), meaning.verb.es[meaning.subject.plural]]
    if meaning.object is not None:
        words += _spanish(meaning.object, direct_object=True)
    if meaning.preposition is not None and meaning.place is not None:
        words += [meaning.preposition.es, *_spanish(meaning.place)]
    return [meaning.adverb.es, *words] if meaning.adverb else words


_SAY = {"en": _say_english, "de": _say_german, "fr": _say_french, "es": _say_spanish}


def say(meaning: Meaning, language: str) -> str:
    """One meaning in one language of `LANGUAGES`: lower case, without punctuation."""
    return " ".join(_SAY[language](meaning))


def _determiners(size: Size) -> tuple[Determiner, ...]:
    # "the" twice: definite singulars show gender and case best.
    return (
        ("the", "the", "a", "the-plural", "two") if size == "full" else ("the", "a", "the-plural")
    )


def _draw_phrase(
    words: Lexicon, rng: random.Random, nouns: tuple[Noun, ...], size: Size, adjective: float
) -> NounPhrase:
    noun = rng.choice(nouns)
    chosen = rng.choice(words.adjectives_of(noun)) if rng.random() < adjective else None
    return NounPhrase(rng.choice(_determiners(size)), chosen, noun)


def _draw(words: Lexicon, rng: random.Random, size: Size) -> Meaning:
    if size == "tiny":
        if rng.random() < 0.15:
            subject = _draw_phrase(words, rng, words.beings, size, adjective=0.7)
            return Meaning(subject, rng.choice(words.intransitive))
        subject = _draw_phrase(words, rng, words.beings, size, adjective=0.0)
        thing = _draw_phrase(words, rng, words.nouns, size, adjective=0.0)
        return Meaning(subject, rng.choice(words.transitive), object=thing)

    # Every sentence has a being, so things and what describes them would be rare words otherwise.
    def phrase(nouns: tuple[Noun, ...]) -> NounPhrase:
        return _draw_phrase(words, rng, nouns, size, 0.2 if nouns is words.beings else 0.5)

    adverb = rng.choice(words.adverbs) if rng.random() < 0.2 else None
    subject = phrase(words.beings)
    pattern = rng.random()
    if pattern < 0.55:  # the old king buys two boats
        thing = phrase(words.things if rng.random() < 0.75 else words.beings)
        return Meaning(subject, rng.choice(words.transitive), object=thing, adverb=adverb)
    preposition = rng.choice(words.prepositions)
    place = phrase(words.nouns_after(preposition))
    if pattern < 0.92:  # now a girl sleeps under the table
        verb = rng.choice(words.intransitive)
        return Meaning(subject, verb, preposition=preposition, place=place, adverb=adverb)
    # the king paints a bridge for the old mother
    thing = _draw_phrase(words, rng, words.things, size, adjective=0.0)
    verb = rng.choice(words.transitive)
    return Meaning(subject, verb, object=thing, preposition=preposition, place=place)


def split_of(english: str) -> str:
    """The split a sentence belongs to, decided by its English words alone.

    A sentence is in the same split whatever the seed and the counts, so text and speech drawn apart
    never leak a test sentence into training.
    """
    share = int.from_bytes(hashlib.sha256(english.encode()).digest()[:4], "big") / 2**32
    for split, fraction in SPLITS.items():
        if share < fraction:
            return split
        share -= fraction
    return split


def sentences(size: Size, seed: int, counts: Mapping[str, int]) -> dict[str, list[dict[str, str]]]:
    """Distinct parallel sentences, by split.

    Args:
        size: `full` or the micro grammar `tiny`.
        seed: which sentences, and in which order.
        counts: how many of each split; the first `n` of a split are the same whatever the count.

    Returns:
        For every split, `{"en": …, "de": …, "fr": …, "es": …}` per sentence.

    Raises:
        ValueError: an unknown split, or more sentences than the grammar has.
    """
    words = lexicon(size)
    drawn: dict[str, list[dict[str, str]]] = {}
    for split, count in counts.items():
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        rng = random.Random(f"{size} {seed} {split}")
        seen: set[str] = set()
        found: list[dict[str, str]] = []
        misses = 0
        while len(found) < count:
            meaning = _draw(words, rng, size)
            english = say(meaning, "en")
            if english in seen or split_of(english) != split:
                misses += 1
                if misses > 2000:
                    raise ValueError(
                        f"the {size} grammar has no {count} {split} sentences ({len(found)} found)"
                    )
                continue
            misses = 0
            seen.add(english)
            found.append({language: say(meaning, language) for language in LANGUAGES})
        drawn[split] = found
    return drawn


def vocabulary(size: Size) -> list[str]:
    """Every word form the grammar can say, languages in order, each word once."""
    found: dict[str, None] = {}
    for language in LANGUAGES:
        found.update(dict.fromkeys(language_vocabulary(size, language)))
    return list(found)


def language_vocabulary(size: Size, language: str) -> list[str]:
    """Every word form the grammar can say in one language, sorted."""
    words = lexicon(size)
    determiners = dict.fromkeys(_determiners(size))
    being = NounPhrase("the", None, words.beings[0])
    verb, *_ = words.transitive
    meanings = [Meaning(being, verb, adverb=adverb) for adverb in words.adverbs]
    for determiner in determiners:
        subject = NounPhrase(determiner, None, words.beings[0])
        meanings += [Meaning(subject, v) for v in (*words.transitive, *words.intransitive)]
        for noun in words.nouns:
            for adjective in (None, *words.adjectives_of(noun)):
                phrase = NounPhrase(determiner, adjective, noun)
                if noun.animate:
                    meanings.append(Meaning(phrase, verb))
                if size == "full" or adjective is None:  # the micro grammar's objects are bare
                    meanings.append(Meaning(being, verb, object=phrase))
                meanings += [
                    Meaning(being, verb, preposition=preposition, place=phrase)
                    for preposition in words.prepositions
                    if noun in words.nouns_after(preposition)
                ]
    return sorted({word for meaning in meanings for word in say(meaning, language).split()})


def tokenizer(size: Size) -> "PreTrainedTokenizerFast":
    """Word-level tokenizer of the whole vocabulary and of the default prompts' words.

    Lower-cases, splits at white space and punctuation, adds no special token by itself, decodes to
    words joined by spaces.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    special = dict(zip(names, SPECIAL_TOKENS, strict=True))
    words = dict.fromkeys((*SPECIAL_TOKENS, *PROMPT_WORDS, *vocabulary(size)))
    ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="left",
        **special,
    )
