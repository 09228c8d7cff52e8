import pytest
from tiny_speechllm import ASR, AST, tiny_tokenizer

from workers.config import Condition, PromptSettings
from workers.errors import InvalidInput
from workers.prompts import check_prompts, digest, prompt_pieces

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(list(ids))


def test_plain_prompt_is_cut_at_the_audio_and_begins_with_bos():
    tokenizer = tiny_tokenizer()
    pieces = prompt_pieces(PromptSettings(), AST, tokenizer)
    assert words(tokenizer, pieces.prefix_ids) == [
        "<s>", "Translate", "German", "to", "English", ":",
    ]  # fmt: skip
    assert words(tokenizer, pieces.suffix_ids) == ["Text", ":"]
    assert (pieces.source_prefix, pieces.target_prefix) == (" ", " ")


def test_without_a_bos_token_none_is_added():
    tokenizer = tiny_tokenizer(bos=False)
    pieces = prompt_pieces(PromptSettings(), ASR, tokenizer)
    assert words(tokenizer, pieces.prefix_ids) == ["Transcribe", "English", ":"]


def test_chat_template_wraps_the_user_turn_with_one_bos():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    settings = PromptSettings(asr="{audio} Transcribe {source}", chat=True, target_prefix="")
    pieces = prompt_pieces(settings, ASR, tokenizer)
    assert words(tokenizer, pieces.prefix_ids) == ["<s>", "user", ":"]
    assert words(tokenizer, pieces.suffix_ids) == ["Transcribe", "English", "assistant", ":"]


def test_chat_needs_a_chat_template():
    with pytest.raises(InvalidInput, match="has no chat template") as caught:
        prompt_pieces(PromptSettings(chat=True), ASR, tiny_tokenizer())
    assert caught.value.where == "prompts.chat"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Transcribe {source}:", "has no {audio}"),
        ("{audio} {audio}", "has 2 {audio}"),
        ("{audio} {speaker}", "unknown field {speaker}"),
        ("{audio} {source.__class__}", "unknown field"),
        ("{audio} {target}", "unknown field {target}"),
        ("{audio} {", "cannot be read"),
    ],
)
def test_bad_templates_are_refused_with_their_path(template, message):
    with pytest.raises(InvalidInput) as caught:
        check_prompts(PromptSettings(asr=template), ASR)
    assert message in caught.value.problem
    assert caught.value.where == "prompts.asr"
    assert "{audio}" in caught.value.remedy


def test_unknown_language_is_refused_unless_the_template_names_it_itself():
    klingon = Condition(task="asr", source_language="tlh")
    with pytest.raises(InvalidInput, match="'tlh'") as caught:
        check_prompts(PromptSettings(), klingon)
    assert caught.value.where == "prompts.asr"
    assert "write the language's name" in caught.value.remedy
    check_prompts(PromptSettings(asr="Transcribe Klingon: {audio}"), klingon)


def test_digest_changes_with_every_setting():
    settings = PromptSettings()
    others = [
        settings.model_copy(update=change)
        for change in (
            {"asr": "{audio}"},
            {"ast": "{audio}"},
            {"chat": True},
            {"target_prefix": ""},
        )
    ]
    assert len({digest(s) for s in [settings, *others]}) == 5
    assert digest(settings) == digest(PromptSettings())
