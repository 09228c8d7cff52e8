"""Opening a tokenizer as the class it was saved as."""

from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config


def open_tokenizer(source: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Opens a tokenizer as the class it was saved as.

    For some families (Qwen2 among them) `AutoTokenizer` puts the family's own class in place of a
    plain `tokenizer.json`, and every text becomes an empty list of tokens, without a warning.

    Args:
        source: folder or hub id.
        options: as `from_pretrained` takes them (`revision`, `trust_remote_code`, …).
    """
    declared = get_tokenizer_config(str(source), **options).get("tokenizer_class")
    plain = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
    opener = PreTrainedTokenizerFast if plain else AutoTokenizer
    return cast(PreTrainedTokenizerBase, opener.from_pretrained(source, **options))
