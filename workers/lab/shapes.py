"""Sizes of what the lab makes: known before anything is made, and without torch.

The builders make their models from these, and a plan reckons memory and time with them.
"""

from dataclasses import dataclass
from typing import Any

from workers.lab.catalogue import Size

COUNTS: dict[Size, dict[str, int]] = {
    "full": {"train": 1200, "dev": 100, "test": 200, "ood": 100},
    "tiny": {"train": 120, "dev": 24, "test": 24, "ood": 16},
}
"""Utterances of each split of one language's data."""
SECONDS, LONGEST_SECONDS = 1.4, 2.7
"""Audio of an utterance: the mean over the three languages, and the longest there is."""
WORDS, LONGEST_WORDS, PROMPT_WORDS = 7, 11, 5
"""Tokens of a text with its end, mean and longest, and of a prompt: the lab's tokens are words."""


@dataclass(frozen=True)
class DecoderSize:
    """Size of a decoder."""

    copies: tuple[int, ...]
    """How many layers each layer of the core becomes.

    The first stays alone: it reads the embeddings, and cut into four it takes exact match from .72
    to .04, where cutting the second or third costs .03.
    """
    hidden: int
    feed_forward: int
    heads: int
    vocabulary: int


DECODERS: dict[Size, DecoderSize] = {
    "full": DecoderSize((1, 5, 6), hidden=128, feed_forward=256, heads=4, vocabulary=450),
    "tiny": DecoderSize((1, 5), hidden=64, feed_forward=128, heads=2, vocabulary=151),
}


@dataclass(frozen=True)
class EncoderSize:
    """Size of an encoder."""

    width: int
    parameters: int
    """Of the finished encoder."""


ENCODERS: dict[tuple[str, Size], EncoderSize] = {
    ("whisper", "full"): EncoderSize(128, 510976),
    ("conformer", "full"): EncoderSize(128, 523520),
    ("whisper", "tiny"): EncoderSize(64, 111872),
    ("conformer", "tiny"): EncoderSize(64, 75232),
}
FRAME_RATE = 25
"""Frames a second of every lab encoder."""


def decoder_config(family: str, of: DecoderSize, layers: int | None = None) -> dict[str, Any]:
    """What `config.json` says of a lab decoder's shape.

    Args:
        family: `llama` or `qwen` (Qwen3, two query heads to a key-value head).
        of: its size.
        layers: None: all of the finished decoder.
    """
    return {
        "model_type": "llama" if family == "llama" else "qwen3",
        "vocab_size": of.vocabulary,
        "hidden_size": of.hidden,
        "intermediate_size": of.feed_forward,
        "num_hidden_layers": sum(of.copies) if layers is None else layers,
        "num_attention_heads": of.heads,
        "num_key_value_heads": of.heads if family == "llama" else of.heads // 2,
        "head_dim": of.hidden // of.heads,
        "tie_word_embeddings": True,
    }
