"""Greedy decoding with a key-value cache, a limit per utterance, and no work for finished rows."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from workers.batches import Encoded, Example, Modality, collate, encode, sorted_batches
from workers.checkpoints import Checkpoints, place_of
from workers.config import DecodeSettings
from workers.errors import InvalidInput, Stopped
from workers.lora import fused_lora
from workers.speechllm import SpeechLLM


@dataclass(frozen=True)
class Hypothesis:
    """What the decoder wrote for one utterance."""

    id: str
    text: str
    tokens: tuple[int, ...]
    """New tokens, without the end of sequence."""
    capped: bool
    """It ran into its limit instead of ending by itself."""


def token_cap(duration: float, settings: DecodeSettings) -> int:
    """The most new tokens an utterance of `duration` seconds may get."""
    return math.ceil(settings.tokens_per_second * duration) + settings.extra_tokens


def end_tokens(model: SpeechLLM) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's and the decoder's own.

    Raises:
        InvalidInput: there is none.
    """
    generation = getattr(model.causal_lm, "generation_config", None)
    declared = getattr(generation, "eos_token_id", None)
    found = set(declared if isinstance(declared, list | tuple) else [declared])
    found.add(model.tokenizer.eos_token_id)
    ends = frozenset(int(token) for token in found if token is not None)
    if not ends:
        raise InvalidInput(
            "the decoder has no end-of-sequence token",
            "decoder",
            "set eos_token in its tokenizer_config.json",
        )
    return ends


@torch.inference_mode()
def greedy(
    model: SpeechLLM,
    examples: Sequence[Example],
    settings: DecodeSettings,
    modality: Modality = "speech",
    checkpoints: Checkpoints | None = None,
) -> list[Hypothesis]:
    """Writes the most probable token, again and again, until the end or the limit.

    Args:
        model: the SpeechLLM, its decoder pruned or not.
        examples: conditions may be mixed.
        settings: batch and limits.
        modality: what stands in the audio's place.
        checkpoints: what is decoded is kept there as it goes, and not decoded again.

    Returns:
        One hypothesis for each example, in their order.

    Raises:
        InvalidInput: no end-of-sequence token, or an example without frames.
        Stopped: `checkpoints` was asked to stop, and holds what was decoded.
    """
    if not examples:
        return []
    ends = torch.tensor(sorted(end_tokens(model)), device=model.device)
    encoded = encode(model, examples, modality, with_target=False)
    caps = [token_cap(example.duration, settings) for example in examples]
    # Utterances of like limits end together, and limits follow lengths.
    order = sorted_batches([item.length + cap for item, cap in zip(encoded, caps, strict=True)],
                           settings.batch_size)  # fmt: skip
    written = _kept(checkpoints, model.device)
    kept = time.monotonic()
    with fused_lora(model.decoder):
        for batch in order:
            if all(i in written for i in batch):
                continue
            limits = [caps[i] for i in batch]
            answers = _decode_batch(model, [encoded[i] for i in batch], limits, ends)
            written.update(zip(batch, answers, strict=True))
            if checkpoints is None or len(written) == len(examples):
                continue
            stop = checkpoints.asked_to_stop()
            if stop or time.monotonic() - kept >= checkpoints.seconds:
                _keep(checkpoints, written, model.device)
                kept = time.monotonic()
                if stop:
                    raise Stopped(f"stopped after {len(written)} of {len(examples)} utterances")
    texts = model.tokenizer.batch_decode(
        [written[i][0] for i in range(len(examples))],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return [
        Hypothesis(example.id, text.strip(), tuple(written[i][0]), written[i][1])
        for i, (example, text) in enumerate(zip(examples, texts, strict=True))
    ]


def _keep(
    checkpoints: Checkpoints, written: Mapping[int, tuple[list[int], bool]], device: torch.device
) -> None:
    tensors = {
        "utterances": torch.tensor(list(written)),
        "lengths": torch.tensor([len(tokens) for tokens, _ in written.values()]),
        "tokens": torch.tensor([t for tokens, _ in written.values() for t in tokens]).long(),
        "capped": torch.tensor([capped for _, capped in written.values()]),
    }
    checkpoints.write(len(written), tensors, place_of(device))


def _kept(
    checkpoints: Checkpoints | None, device: torch.device
) -> dict[int, tuple[list[int], bool]]:
    """Answers that an earlier process has decoded, by number of the utterance."""
    saved = None if checkpoints is None else checkpoints.newest(**place_of(device))
    if saved is None:
        return {}
    lists = {name: tensor.tolist() for name, tensor in saved.tensors.items()}
    tokens = iter(lists["tokens"])
    rows = zip(lists["utterances"], lists["lengths"], lists["capped"], strict=True)
    return {i: ([next(tokens) for _ in range(length)], capped) for i, length, capped in rows}


def _decode_batch(
    model: SpeechLLM, batch: Sequence[Encoded], caps: Sequence[int], ends: Tensor
) -> list[tuple[list[int], bool]]:
    """New tokens of each row, and whether it was cut off."""
    decoder, device = model.causal_lm, model.device
    inputs = collate(model, batch, "left")
    cache = DynamicCache(config=decoder.config)
    attention = inputs.attention_mask
    logits = decoder(
        inputs_embeds=inputs.inputs_embeds,
        attention_mask=attention,
        position_ids=inputs.position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    position = inputs.position_ids[:, -1:]
    limit = torch.tensor(caps, device=device)
    rows = torch.arange(len(batch), device=device)  # the utterance each row of the cache decodes
    tokens = torch.full((len(batch), max(caps)), -1, device=device)
    capped = torch.ones(len(batch), dtype=torch.bool, device=device)
    alive = torch.ones(len(batch), dtype=torch.bool, device=device)
    for step in range(max(caps)):
        # float32: on a tie in lower precision the answer would depend on the kernel.
        choice = logits.float().argmax(-1)
        ended = alive & torch.isin(choice, ends)
        capped[rows[ended]] = False
        alive = alive & ~ended
        tokens[rows[alive], step] = choice[alive]
        alive = alive & (step + 1 < limit[rows])
        left = int(alive.sum())
        if left == 0:
            break
        if 2 * left <= len(rows):
            # Copying the cache costs about one step; a halved batch pays that back at once.
            kept = alive.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, choice, attention = rows[kept], choice[kept], attention[kept]
            position, alive = position[kept], alive[kept]
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=1)
        position = position + 1
        logits = decoder(
            input_ids=choice[:, None],
            attention_mask=attention,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return [
        ([token for token in row if token >= 0], cut)
        for row, cut in zip(tokens.tolist(), capped.tolist(), strict=True)
    ]
