"""What the decoder reads around the audio: templates filled in, tokenised and split at the audio.

The same pieces serve training, maps and decoding, so that no stage can see another prompt.
"""

import hashlib
import json
import string
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from workers.config import LANGUAGE_NAMES, Condition, PromptSettings, RecordedPrompts
from workers.errors import InvalidInput

_AUDIO = "{audio}"
# Stands for the audio while a chat template is filled in: plain letters, which no template alters.
_PLACEHOLDER = "AUDIOGOESHERE"


@dataclass(frozen=True)
class PromptPieces:
    """One condition's prompt, cut where the audio goes."""

    prefix_ids: tuple[int, ...]
    """Tokens before the audio, the beginning-of-sequence token among them if there is one."""
    suffix_ids: tuple[int, ...]
    """Tokens between the audio and the answer."""
    source_prefix: str
    """Stands before a transcript that takes the audio's place."""
    target_prefix: str
    """Stands before the answer's text."""
    end_id: int | None = None
    """Token that ends an answer; None: the tokenizer's end of sequence."""


def prompt_pieces(
    settings: PromptSettings | RecordedPrompts,
    condition: Condition,
    tokenizer: PreTrainedTokenizerBase,
) -> PromptPieces:
    """Fills in and tokenises the prompt of one condition.

    Text before and after the audio is tokenised separately, and spaces right before the audio are
    dropped: a transcript in its place brings its own.

    Raises:
        InvalidInput: the template is malformed, a language has no known name, the tokenizer has no
            usable chat template, or no prompt was recorded for the condition.
    """
    if isinstance(settings, RecordedPrompts):
        return _recorded(settings, condition)
    before, after = filled_template(settings, condition)
    if settings.chat:
        before, after = _through_chat_template(before, after, tokenizer)
    before = before.rstrip(" ")
    prefix = _tokenise(before, tokenizer)
    bos = tokenizer.bos_token_id
    # A chat template says itself which special tokens it begins with.
    if bos is not None and not settings.chat and prefix[:1] != [bos]:
        prefix = [bos, *prefix]
    return PromptPieces(
        prefix_ids=tuple(prefix),
        suffix_ids=tuple(_tokenise(after, tokenizer)),
        source_prefix=" " if before and not before[-1].isspace() else "",
        target_prefix=settings.target_prefix,
    )


def digest(settings: PromptSettings | RecordedPrompts) -> str:
    """SHA-256 (hex) of everything that can change a prompt, for keys and for checks on loading."""
    canonical = json.dumps(settings.model_dump(mode="json"), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def check_prompts(settings: PromptSettings, condition: Condition) -> None:
    """Checks what can be checked without a tokenizer: the template's fields, the languages.

    Raises:
        InvalidInput: as `prompt_pieces` would.
    """
    filled_template(settings, condition)


def filled_template(settings: PromptSettings, condition: Condition) -> tuple[str, str]:
    """The template's text before and after the audio.

    Raises:
        InvalidInput: the template is malformed, or a language has no known name.
    """
    where = f"prompts.{condition.task}"
    template = settings.asr if condition.task == "asr" else settings.ast
    languages = {"source": condition.source_language}
    if condition.task == "ast":
        if condition.target_language is None:
            raise InvalidInput(
                f"the condition {condition.label} has no target language",
                where,
                "name the language to translate into",
            )
        languages["target"] = condition.target_language
    allowed = ", ".join(f"{{{name}}}" for name in ("audio", *languages))
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InvalidInput(
            f"the template {template!r} cannot be read: {error}",
            where,
            f"use only {allowed}; write {{{{ and }}}} for braces",
        ) from None
    parts = [""]
    for literal, field, spec, conversion in parsed:
        parts[-1] += literal
        if field is None:
            continue
        if spec or conversion or field not in ("audio", *languages):
            raise InvalidInput(
                f"the template {template!r} has an unknown field {{{field}}}",
                where,
                f"use only {allowed}",
            )
        if field == "audio":
            parts.append("")
        else:
            parts[-1] += _language_name(languages[field], where, field)
    if len(parts) != 2:
        raise InvalidInput(
            f"the template {template!r} has {len(parts) - 1 or 'no'} {_AUDIO}",
            where,
            f"write {_AUDIO} exactly once, where the audio goes",
        )
    return parts[0], parts[1]


def _recorded(prompts: RecordedPrompts, condition: Condition) -> PromptPieces:
    prompt = prompts.conditions.get(condition.label)
    if prompt is None:
        raise InvalidInput(
            f"the model has no prompt for {condition.label}",
            "speechllm",
            f"it was made for: {', '.join(sorted(prompts.conditions)) or 'nothing'}",
        )
    return PromptPieces(
        prefix_ids=prompt.prefix_ids,
        suffix_ids=prompt.suffix_ids,
        source_prefix="",
        target_prefix=prompt.target_prefix,
        end_id=prompt.end_id,
    )


def _language_name(code: str, where: str, field: str) -> str:
    name = LANGUAGE_NAMES.get(code)
    if name is None:
        raise InvalidInput(
            f"no name is known for the language {code!r}",
            where,
            f"use one of {', '.join(sorted(LANGUAGE_NAMES))}, or write the language's name into "
            f"the template in place of {{{field}}}",
        )
    return name


def _through_chat_template(
    before: str, after: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInput(
            "the decoder's tokenizer has no chat template",
            "prompts.chat",
            "set prompts.chat to false, or use a chat model's tokenizer",
        )
    turn = [{"role": "user", "content": f"{before}{_PLACEHOLDER}{after}"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    parts = text.split(_PLACEHOLDER)
    if len(parts) != 2:
        raise InvalidInput(
            f"the chat template repeats the user's turn {len(parts) - 1} times",
            "prompts.chat",
            "set prompts.chat to false",
        )
    return parts[0], parts[1]


def _tokenise(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
