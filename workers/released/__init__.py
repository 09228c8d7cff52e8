"""SpeechLLMs that transformers itself supports (Qwen2-Audio, Voxtral, Granite-Speech, …).

Their encoder and projector are their own. Parts are found through configuration and module
structure, and where a model's code decides something (which frames its projector reads, which of
its outputs take the audio's place), that code runs and is watched: nothing of it is written again
here. Importing this costs no torch.
"""

from collections.abc import Mapping
from typing import Any

_AUDIO_CONFIGS = ("audio_config", "encoder_config")


def is_released(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` describes an audio encoder and a text decoder, and nothing besides.

    Args:
        config: the file's content.
    """
    return (
        isinstance(config.get("text_config"), dict)
        and any(isinstance(config.get(name), dict) for name in _AUDIO_CONFIGS)
        and not isinstance(config.get("vision_config"), dict)
    )
