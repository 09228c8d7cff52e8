"""Opening a released SpeechLLM's processor, tokenizer included."""

from typing import Any

from transformers import AutoProcessor, GraniteSpeechProcessor

from workers.released.logmel import log_mel_extractor
from workers.tokenizer import open_tokenizer


def open_processor(reference: str, **options: Any) -> Any:
    """Opens a processor; its tokenizer is opened as every other one here.

    Args:
        reference: folder or hub id.
        options: as `from_pretrained` takes them (`revision`, `trust_remote_code`, …).
    """
    tokenizer = open_tokenizer(reference, **options)
    extractor = log_mel_extractor(reference, **options)
    if extractor is None:
        processor = AutoProcessor.from_pretrained(reference, **options)
        processor.tokenizer = tokenizer
        return processor
    content, _ = GraniteSpeechProcessor.get_processor_dict(reference, **options)
    return GraniteSpeechProcessor.from_args_and_dict([extractor, tokenizer], content)


def audio_extractor(processor: Any) -> Any:
    """The feature extractor in a processor, which two names are in use for."""
    return getattr(processor, "feature_extractor", None) or processor.audio_processor
