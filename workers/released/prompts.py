"""A released SpeechLLM's prompts: its own chat template or transcription request, taken down.

They are recorded as tokens, cut where the audio goes, so that training, maps and decoding read
exactly what the model's own processor would give it.
"""

import base64
import inspect
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import soundfile

from workers.config import Condition, PromptSettings, RecordedPrompt, RecordedPrompts
from workers.errors import InvalidInput
from workers.prompts import filled_template
from workers.released.processor import audio_extractor

INSTRUCTIONS = PromptSettings(
    asr="{audio}Can you transcribe the {source} speech into a written format?",
    ast="{audio}Can you translate the {source} speech into written {target} text?",
    target_prefix="",
)
"""What is asked where neither the sweep nor the processor says anything."""
_ANSWER = "ANSWERGOESHERE"


def record_prompts(
    processor: Any,
    audio_id: int,
    ends: Sequence[int],
    settings: PromptSettings,
    conditions: Sequence[Condition],
) -> RecordedPrompts:
    """Renders and tokenises the prompt of each condition.

    A template that is not the default is asked through the model's chat template. Where it is the
    default, a processor that has a transcription request of its own makes it (`asr` alone);
    otherwise one of `INSTRUCTIONS` is asked.

    Args:
        processor: the released model's.
        audio_id: token that stands for the audio.
        ends: tokens that end an answer.
        settings: the sweep's; `chat` is passed over, as the model knows its own template alone.
        conditions: to render.

    Raises:
        InvalidInput: a template that is malformed, or a processor that cannot render it.
    """
    default = PromptSettings()
    end_id = _end(processor, ends)
    target_prefix = settings.target_prefix
    if target_prefix == default.target_prefix:
        target_prefix = INSTRUCTIONS.target_prefix
    recorded = {}
    for condition in conditions:
        chosen = getattr(settings, condition.task) != getattr(default, condition.task)
        ids = None
        if condition.task == "asr" and not chosen:
            ids = _requested(processor, condition)
        if ids is None:
            ids = _asked(
                processor, *filled_template(settings if chosen else INSTRUCTIONS, condition)
            )
        prefix, suffix = _cut(ids, audio_id, condition)
        before, after = (
            processor.tokenizer.decode(list(part), skip_special_tokens=False)
            for part in (prefix, suffix)
        )
        recorded[condition.label] = RecordedPrompt(
            text=f"{before}{{audio}}{after}",
            prefix_ids=prefix,
            suffix_ids=suffix,
            target_prefix=target_prefix,
            end_id=end_id,
        )
    return RecordedPrompts(conditions=recorded)


def _requested(processor: Any, condition: Condition) -> list[int] | None:
    """The prompt of the processor's own transcription request; None if it cannot make one."""
    request = getattr(processor, "apply_transcription_request", None)
    if request is None:
        return None
    rate = int(audio_extractor(processor).sampling_rate)
    offered = {
        "language": condition.source_language,
        "tokenize": False,
        "model_id": "model",
        "sampling_rate": rate,
        "format": "wav",
    }
    known = inspect.signature(request).parameters
    given = {name: value for name, value in offered.items() if name in known}
    try:
        found = request(audio=[np.zeros(rate, np.float32)], **given)
    except (ImportError, AttributeError):
        return None  # Voxtral's needs mistral-common and its tokenizer
    except ValueError as error:
        raise InvalidInput(
            f"the model's processor refuses a transcription of {condition.source_language}: {error}",
            "prompts.asr",
            "write a prompt of your own",
        ) from error
    return _tokens(processor, found[0]) if isinstance(found, list) else found["input_ids"][0]


def _asked(processor: Any, before: str, after: str) -> list[int]:
    """A user's turn through the chat template, as parts if it takes them, else as one text."""
    parts: list[dict[str, Any]] = [{"type": "audio"}]
    if before.strip():
        parts.insert(0, {"type": "text", "text": before.strip()})
    if after.strip():
        parts.append({"type": "text", "text": after.strip()})
    audio = processor.audio_token
    for content in (parts, f"{before}{audio}{after}"):
        rendered = _rendered(processor, [{"role": "user", "content": content}])
        if rendered is not None and rendered.count(audio) == 1:
            return _tokens(processor, rendered)
    if _template(processor) is None and not hasattr(processor.tokenizer, "backend_tokenizer"):
        return _asked_with_sound(processor, parts)
    raise InvalidInput(
        "the model's chat template cannot be filled in with one audio and a text",
        "speechllm",
        "see that chat_template.jinja lies beside the model (Voxtral needs it, or the package "
        "mistral-common)",
    )


def _asked_with_sound(processor: Any, parts: list[dict[str, Any]]) -> list[int]:
    """The same with mistral-common, which has no template and wants a sound to ask about."""
    file = io.BytesIO()
    rate = int(audio_extractor(processor).sampling_rate)
    soundfile.write(file, np.zeros(rate, np.float32), rate, format="WAV")
    sound = {"type": "audio", "base64": base64.b64encode(file.getvalue()).decode()}
    content = [sound if part["type"] == "audio" else part for part in parts]
    found = processor.apply_chat_template([{"role": "user", "content": content}])
    return list(found["input_ids"][0])


def _template(processor: Any) -> str | None:
    own = getattr(processor, "chat_template", None)
    return own or getattr(processor.tokenizer, "chat_template", None) or None


def _rendered(processor: Any, turns: list[dict[str, Any]], *, answer: bool = False) -> str | None:
    template = _template(processor)
    if template is None:
        return None
    try:
        text = processor.tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=not answer
        )
    except Exception:  # noqa: BLE001 - a template raises whatever it likes on parts it does not know
        return None
    return str(text)


def _tokens(processor: Any, text: str) -> list[int]:
    tokenizer = processor.tokenizer
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not begins)["input_ids"])


def _cut(ids: Any, audio_id: int, condition: Condition) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens before and after the one run of audio tokens."""
    tokens = [int(token) for token in ids]
    places = [i for i, token in enumerate(tokens) if token == audio_id]
    if not places or places[-1] - places[0] != len(places) - 1:
        raise InvalidInput(
            f"the model's processor puts the audio of {condition.label} in "
            f"{'no' if not places else 'more than one'} place",
            f"prompts.{condition.task}",
            "write {audio} exactly once",
        )
    return tuple(tokens[: places[0]]), tuple(tokens[places[-1] + 1 :])


def _end(processor: Any, ends: Sequence[int]) -> int | None:
    """The token that ends an answer in a chat; None: nothing tells."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    rendered = _rendered(processor, turns, answer=True) or ""
    _, found, after = rendered.rpartition(_ANSWER)
    first = _tokens(processor, after)[:1] if found and after else []
    return first[0] if first and first[0] in ends else None
