"""The lab's text: parallel grammar, tokenizer, and the decoders trained on them."""

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from workers.config import LANGUAGE_NAMES, PromptSettings
from workers.lab.decoders import CONDITIONS, Family, build_decoder, exact_match
from workers.lab.grammar import (
    LANGUAGES,
    SPLITS,
    Meaning,
    NounPhrase,
    language_vocabulary,
    say,
    sentences,
    split_of,
    tokenizer,
    vocabulary,
)
from workers.lab.lexicon import Adjective, Noun, Verb, lexicon
from workers.lab.prompts import PromptedText

COUNTS = {"full": {"train": 3000, "dev": 200, "test": 200}, "tiny": dict.fromkeys(SPLITS, 60)}


def noun(english: str) -> Noun:
    return next(n for n in lexicon("full").nouns if n.en[0] == english)


def adjective(english: str) -> Adjective:
    return next(a for a in lexicon("full").adjectives if a.en == english)


def verb(english: str) -> Verb:
    words = lexicon("full")
    return next(v for v in (*words.transitive, *words.intransitive) if v.en[0] == english)


def spoken(meaning: Meaning) -> dict[str, str]:
    return {language: say(meaning, language) for language in LANGUAGES}


def test_gender_case_and_number_agree():
    old_boy = NounPhrase("the", adjective("old"), noun("boy"))
    red_door = NounPhrase("a", adjective("red"), noun("door"))
    assert spoken(Meaning(old_boy, verb("sees"), object=red_door)) == {
        "en": "the old boy sees a red door",
        "de": "der alte junge sieht eine rote tür",
        "fr": "le vieux garçon voit une porte rouge",
        "es": "el niño viejo ve una puerta roja",
    }
    assert spoken(Meaning(NounPhrase("two", None, noun("cow")), verb("loves"), object=old_boy)) == {
        "en": "two cows love the old boy",
        "de": "zwei kühe lieben den alten jungen",
        "fr": "deux vaches aiment le vieux garçon",
        "es": "dos vacas aman al niño viejo",
    }


def test_german_keeps_the_verb_second_and_gives_prepositions_their_case():
    words = lexicon("full")
    cases = {preposition.en: preposition for preposition in words.prepositions}
    mothers = NounPhrase("the-plural", adjective("strong"), noun("mother"))
    king = NounPhrase("a", adjective("old"), noun("king"))
    said = [
        say(
            Meaning(
                king,
                verb("waits"),
                preposition=cases[word],
                place=mothers,
                adverb=words.adverbs[0],
            ),
            "de",
        )
        for word in ("with", "for")
    ]
    assert said == [
        "jetzt wartet ein alter könig mit den starken müttern",
        "jetzt wartet ein alter könig für die starken mütter",
    ]
    phrase = NounPhrase("a", adjective("old"), noun("king"))
    assert say(Meaning(phrase, verb("waits")), "en") == "an old king waits"


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_splits_are_disjoint_in_every_language_and_the_same_each_time(size):
    drawn = sentences(size, 0, COUNTS[size])
    assert drawn == sentences(size, 0, COUNTS[size])
    assert drawn["dev"] != sentences(size, 1, COUNTS[size])["dev"]
    for language in LANGUAGES:
        texts = [row[language] for rows in drawn.values() for row in rows]
        assert len(set(texts)) == sum(COUNTS[size].values())
        assert all(text == text.lower() for text in texts)


def test_a_sentence_keeps_its_split_whatever_the_seed_and_the_count():
    few = sentences("full", 5, {"test": 30})["test"]
    assert few == sentences("full", 5, {"train": 10, "test": 60})["test"][:30]
    assert {split_of(row["en"]) for row in few} == {"test"}
    other = sentences("full", 6, {"train": 3000})["train"]
    assert not {row["en"] for row in few} & {row["en"] for row in other}


def test_sentences_that_cannot_be_had_are_refused():
    with pytest.raises(ValueError, match="train, dev, test"):
        sentences("full", 0, {"validation": 3})
    with pytest.raises(ValueError, match="the tiny grammar has no 5000 dev sentences"):
        sentences("tiny", 0, {"dev": 5000})


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_the_vocabulary_is_what_is_said(size):
    rows = sentences(size, 0, COUNTS[size] | {"train": 8000 if size == "full" else 600})
    for language in LANGUAGES:
        heard = {word for part in rows.values() for row in part for word in row[language].split()}
        assert heard <= set(language_vocabulary(size, language))
        if size == "full":
            assert heard == set(language_vocabulary(size, language))
    words = vocabulary(size)
    assert len(words) == len(set(words))
    mean = sum(len(row["en"].split()) for row in rows["train"]) / len(rows["train"])
    assert 6.2 < mean < 6.7 if size == "full" else 3 <= mean <= 5


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_the_tokenizer_knows_every_word_and_every_prompt(size, tmp_path):
    tokenizer(size).save_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    for row in sentences(size, 0, {"test": 50})["test"]:
        for text in row.values():
            ids = words(text).input_ids
            assert words.decode(ids) == text
            assert len(ids) == len(text.split())
    templates = PromptSettings()
    for template in (templates.asr, templates.ast):
        for language in LANGUAGES:
            name = LANGUAGE_NAMES[language]
            ids = words(template.format(source=name, target=name, audio="")).input_ids
            assert words.unk_token_id not in ids
    assert words("der Zug").input_ids[-1] == words.unk_token_id
    special = (words.pad_token, words.bos_token, words.eos_token, words.unk_token)
    assert special == ("<pad>", "<bos>", "<eos>", "<unk>")


def test_training_text_stutters_its_sources_and_asks_for_the_target_alone():
    text = PromptedText("tiny", 0, CONDITIONS, {"train": 60, "dev": 30})
    words = text.tokenizer
    for label, batch in text.development(5, 1.0).items():
        labels = batch.labels.split(batch.lengths)
        for row, target in enumerate(labels):
            said = words.decode(batch.tokens[row][batch.source[row]], skip_special_tokens=True)
            source = " ".join(dict.fromkeys(said.split()))
            assert target[-1] == words.eos_token_id
            copied = " ".join(dict.fromkeys(words.decode(target[:-1]).split()))
            assert (source == copied) == label.startswith("asr")
    assert any(batch.source.sum() > 5 * 5 for batch in text.development(5, 1.0).values())


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, tuple[Path, dict, list[float]]]:
    found = {}
    for name, family in (("llama", "llama"), ("again", "llama"), ("qwen", "qwen")):
        folder, shares = tmp_path_factory.mktemp(name), []
        torch.manual_seed(len(found))  # must not matter
        kind: Family = "llama" if family == "llama" else "qwen"
        figures = build_decoder(kind, "tiny", 0, folder, lambda s, _, to=shares: to.append(s))
        found[name] = (folder, figures, shares)
    return found


def test_the_same_seed_gives_the_same_bytes(built):
    assert digest(built["llama"][0]) == digest(built["again"][0])
    assert digest(built["llama"][0]) != digest(built["qwen"][0])


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_a_decoder_is_a_plain_folder_that_copies_and_translates(built, family):
    folder, figures, shares = built[family]
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type.startswith(family)
    assert model.config.num_hidden_layers == 6
    assert model.config.vocab_size == len(words)
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1
    assert figures["copy_exact"] > 0.6
    assert figures["translation_exact"] > 0.5

    # Greedy decoding through the prompts agrees with the exact match that was reported.
    text = PromptedText("tiny", 0, CONDITIONS, {"train": 600, "dev": 32})
    assert exact_match(model, text.development(32, 0.0)) == figures["dev_exact"]
    rows = sentences("tiny", 0, {"dev": 32})["dev"]
    right = 0
    for row in rows:
        prompt = f"<bos>Translate German to English: {row['de']}\nText:"
        ids = torch.tensor([words(prompt).input_ids])
        output = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        right += words.decode(output, skip_special_tokens=True) == row["en"]
    assert right / len(rows) == figures["dev_exact"]["ast-de-en"]
