"""What maps are measured on, as batches: examples of a SpeechLLM, or plain text for a decoder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workers.batches import IGNORED, Encoded, collate, sorted_batches
from workers.config import Pool
from workers.errors import InvalidInput
from workers.maps.measure import MapBatch
from workers.speechllm import SpeechLLM


@dataclass(frozen=True)
class TextSample:
    """A line of text."""

    id: str
    text: str
    where: str
    """File and line."""


def example_batches(
    model: SpeechLLM, encoded: Sequence[Encoded], batch_size: int
) -> Iterator[MapBatch]:
    """Prompt, audio (or transcript) and target of each example, longest first."""
    for indices in sorted_batches([item.length for item in encoded], batch_size):
        rows = [encoded[i] for i in indices]
        with torch.no_grad():
            inputs = collate(model, rows, "right")
        yield MapBatch(
            ids=[item.example.id for item in rows],
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            pools=inputs.pools,
            labels=inputs.labels,
        )


def text_tokens(
    decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: TextSample
) -> list[int]:
    """Token ids of a line, with the special tokens that the tokenizer puts in front.

    Raises:
        InvalidInput: fewer than two tokens, or more than the decoder's context.
    """
    ids = list(tokenizer(sample.text)["input_ids"])
    if len(ids) < 2:
        raise InvalidInput(
            f"the text has {len(ids)} token(s), and a map needs two",
            sample.where,
            "leave the line out, or use --skip-bad",
        )
    check_length(decoder, len(ids), sample.where)
    return ids


def check_length(decoder: PreTrainedModel, length: int, where: str) -> None:
    """Refuses what the decoder's context can't hold.

    Raises:
        InvalidInput: more positions than `max_position_embeddings`.
    """
    config = decoder.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise InvalidInput(
            f"it takes {length} positions, the decoder's context holds {limit}",
            where,
            "split it, or leave it out with --skip-bad",
        )


def text_batches(
    decoder: PreTrainedModel,
    tokenized: Sequence[tuple[TextSample, list[int]]],
    batch_size: int,
) -> Iterator[MapBatch]:
    """Lines as the decoder reads them, longest first.

    Every token after the first is a target: pools are `last`, `target` and `all`.
    """
    embeddings = decoder.get_input_embeddings()
    device = embeddings.weight.device
    for indices in sorted_batches([len(ids) for _, ids in tokenized], batch_size):
        rows = [tokenized[i] for i in indices]
        length = max(len(ids) for _, ids in rows)
        tokens = np.zeros((len(rows), length), dtype=np.int64)
        labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=bool)
        last = np.zeros((len(rows), length), dtype=bool)
        for row, (_, ids) in enumerate(rows):
            tokens[row, : len(ids)] = ids
            labels[row, : len(ids) - 1] = ids[1:]
            mask[row, : len(ids)] = True
            last[row, len(ids) - 1] = True
        target = mask.copy()
        target[:, 0] = False
        pools: dict[Pool, np.ndarray] = {"last": last, "target": target, "all": mask}
        with torch.no_grad():
            embeds: Tensor = embeddings(torch.from_numpy(tokens).to(device))
        yield MapBatch(
            ids=[sample.id for sample, _ in rows],
            inputs_embeds=embeds,
            attention_mask=torch.from_numpy(mask).long().to(device),
            pools={name: torch.from_numpy(pool).to(device) for name, pool in pools.items()},
            labels=torch.from_numpy(labels).to(device),
        )
