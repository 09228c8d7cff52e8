"""From utterances to the tensors a decoder reads, and which utterances share a batch.

Texts are tokenised once (`encode`); a batch is then filled from ready token arrays (`collate`).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from workers.config import POOLS, Condition, Pool
from workers.errors import InvalidInput
from workers.prompts import PromptPieces, prompt_pieces

if TYPE_CHECKING:
    from workers.speechllm import SpeechLLM

Modality = Literal["speech", "text"]
IGNORED = -100
"""Label of positions that predict nothing."""

_PADDING, _PROMPT, _AUDIO, _TARGET = range(4)
# Batches are sorted by length inside windows of this many batches: the waste in padding is small
# and the order still random.
_BUCKET = 16


@dataclass(frozen=True, eq=False)
class Example:
    """One utterance under one condition."""

    id: str
    condition: Condition
    frames: Tensor | None
    """Encoder output `[time, encoder_dim]`; None where only text is used."""
    source_text: str
    target_text: str
    duration: float
    """Seconds of audio."""
    words: tuple[tuple[str, float, float], ...] = ()
    """Words of the source with start and end in seconds."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """An example as the decoder's positions, without padding."""

    example: Example
    ids: np.ndarray
    """Token at each position `[length]`; 0 where the audio goes."""
    kinds: np.ndarray
    """What each position is `[length]`: prompt, audio or target."""
    next_ids: np.ndarray
    """Token each position should predict `[length]`, the last one the end of sequence; `IGNORED`
    where nothing is learnt."""

    @property
    def length(self) -> int:
        """Positions in the decoder."""
        return len(self.ids)

    @property
    def prompt_length(self) -> int:
        """Positions before the first target token."""
        return int(np.count_nonzero(self.kinds != _TARGET))


@dataclass(frozen=True, eq=False)
class Inputs:
    """One padded batch, ready for the decoder. All tensors lie on the model's device."""

    inputs_embeds: Tensor
    """`[batch, length, decoder_dim]` in the decoder's dtype, zero at padding."""
    attention_mask: Tensor
    """`[batch, length]`, 1 at real positions."""
    position_ids: Tensor
    """`[batch, length]`, counted from each row's first real position."""
    labels: Tensor
    """`[batch, length]`: the token each position should predict (already shifted: the label of
    the last target token is the end of sequence), `IGNORED` elsewhere."""
    pools: dict[Pool, Tensor]
    """Boolean masks `[batch, length]`. `last`: the last position before the first target token;
    `prompt`: the prompt's tokens, with the transcript when it stands in the audio's place;
    `audio`: the projected audio; `target`: positions of target tokens; `all`: no padding. A pool
    without a position in this modality is missing."""


def encode(
    model: "SpeechLLM",
    examples: Sequence[Example],
    modality: Modality = "speech",
    *,
    with_target: bool = True,
) -> list[Encoded]:
    """Tokenises examples, everything once.

    Args:
        model: whose tokenizer, prompts and projector are used.
        examples: conditions may be mixed.
        modality: `speech`, or `text` with the source transcript in the audio's place.
        with_target: add the target (training, maps); without it the prompt ends the sequence.

    Raises:
        InvalidInput: no end-of-sequence token, bad prompts, or an example without frames.
    """
    pieces: dict[Condition, PromptPieces] = {}
    ends: dict[Condition, int] = {}
    for example in examples:
        condition = example.condition
        if condition not in pieces:
            pieces[condition] = prompt_pieces(model.config.prompts, condition, model.tokenizer)
            ends[condition] = _end_token(model, pieces[condition])
    texts = (
        [pieces[e.condition].target_prefix + e.target_text for e in examples] if with_target else []
    )
    if modality == "text":
        texts += [pieces[e.condition].source_prefix + e.source_text for e in examples]
    tokens: list[list[int]] = (
        list(model.tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []
    )
    sources = tokens[len(examples) if with_target else 0 :]
    encoded = []
    for i, example in enumerate(examples):
        piece = pieces[example.condition]
        if modality == "text":
            audio = 0
            middle = list(sources[i])
        else:
            audio = model.projector.output_length(len(_frames(example)))
            middle = [0] * audio
        prompt = [*piece.prefix_ids, *middle, *piece.suffix_ids]
        target = list(tokens[i]) if with_target else []
        kinds = np.full(len(prompt) + len(target), _PROMPT, dtype=np.int8)
        kinds[len(piece.prefix_ids) : len(piece.prefix_ids) + audio] = _AUDIO
        kinds[len(prompt) :] = _TARGET
        next_ids = np.full(len(kinds), IGNORED, dtype=np.int64)
        if with_target:
            next_ids[len(prompt) - 1 :] = [*target, ends[example.condition]]
        encoded.append(
            Encoded(example, np.array([*prompt, *target], dtype=np.int64), kinds, next_ids)
        )
    return encoded


def collate(
    model: "SpeechLLM", batch: Sequence[Encoded], padding: Literal["left", "right"]
) -> Inputs:
    """Embeds and pads one batch; gradients flow into the projector.

    Args:
        model: whose embeddings and projector are used.
        batch: utterances of one modality.
        padding: `right` for training and maps, `left` for decoding.
    """
    length = max(item.length for item in batch)
    ids = np.zeros((len(batch), length), dtype=np.int64)
    kinds = np.full((len(batch), length), _PADDING, dtype=np.int8)
    labels = np.full((len(batch), length), IGNORED, dtype=np.int64)
    last = np.zeros((len(batch), length), dtype=bool)
    for row, item in enumerate(batch):
        start = length - item.length if padding == "left" else 0
        here = slice(start, start + item.length)
        ids[row, here] = item.ids
        kinds[row, here] = item.kinds
        labels[row, here] = item.next_ids
        last[row, start + item.prompt_length - 1] = True
    masks: dict[Pool, np.ndarray] = {
        "last": last,
        "prompt": kinds == _PROMPT,
        "audio": kinds == _AUDIO,
        "target": kinds == _TARGET,
        "all": kinds != _PADDING,
    }
    device = model.device
    pools: dict[Pool, Tensor] = {
        name: torch.from_numpy(masks[name]).to(device) for name in POOLS if masks[name].any()
    }
    embeds = model.embed(torch.from_numpy(ids).to(device))
    embeds = embeds * pools["all"][..., None]
    if "audio" in pools:
        projected, lengths = model.projector(*pad_frames([item.example for item in batch], device))
        real = torch.arange(projected.shape[1], device=device) < lengths[:, None]
        # Both masks run through rows and time in the same order.
        embeds = embeds.masked_scatter(pools["audio"][..., None], projected[real].to(embeds.dtype))
    attention = pools["all"].long()
    return Inputs(
        inputs_embeds=embeds,
        attention_mask=attention,
        position_ids=(attention.cumsum(1) - 1).clamp(min=0),
        labels=torch.from_numpy(labels).to(device),
        pools=pools,
    )


def pad_frames(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """Encoder frames of several utterances, padded with zeros, and their lengths.

    Returns:
        `[batch, time, encoder_dim]` in float32 and `[batch]`, on `device`.
    """
    frames = [_frames(example) for example in examples]
    padded = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True).float()
    lengths = torch.tensor([len(f) for f in frames])
    return padded.to(device), lengths.to(device)


def batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches for training: similar lengths together, in a seeded random order.

    The order depends on nothing but the arguments. Every batch has `batch_size` utterances; those
    left over change with the epoch and are dropped (data smaller than a batch is one batch).

    Returns:
        Indices into `lengths`, a list for each batch.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    usable = len(order) - len(order) % batch_size if len(order) > batch_size else len(order)
    window = batch_size * _BUCKET
    found = []
    for start in range(0, usable, window):
        bucket = sorted(order[start : min(start + window, usable)], key=lambda i: lengths[i])
        found += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    rng.shuffle(found)
    return found


def sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """All indices, longest first, `batch_size` at a time: for decoding and maps."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _end_token(model: "SpeechLLM", pieces: PromptPieces) -> int:
    found = model.tokenizer.eos_token_id if pieces.end_id is None else pieces.end_id
    if found is None:
        raise InvalidInput(
            "the decoder's tokenizer has no end-of-sequence token",
            "decoder",
            "set eos_token in its tokenizer_config.json",
        )
    return int(found)


def _frames(example: Example) -> Tensor:
    if example.frames is None or not len(example.frames):
        raise InvalidInput(
            f"utterance {example.id!r} has no encoder frames",
            remedy="encode its audio first, or use the text modality",
        )
    return example.frames
