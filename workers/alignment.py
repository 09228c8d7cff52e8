"""Warming a projector up from word times, before it is trained through the decoder."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from workers.batches import Example, pad_frames
from workers.errors import InvalidInput, NotFinite
from workers.speechllm import SpeechLLM
from workers.training import endless_batches, learning


def align_projector(
    model: SpeechLLM,
    examples: Sequence[Example],
    *,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> list[float]:
    """Warms the projector up from word times, without running the decoder.

    Each embedding whose time falls into a word is drawn towards the mean of that word's frozen
    token embeddings: `1 - cosine` plus the squared error relative to the size of the target.

    Args:
        model: whose projector is trained in place.
        examples: with frames, duration and words (`word, start, end` in seconds).
        steps: optimizer steps, with a cosine from `lr` to 0.
        lr: peak learning rate.
        batch_size: utterances per step.
        seed: of the order of the data.

    Returns:
        The loss of each step.

    Raises:
        InvalidInput: no example has words.
        NotFinite: the loss became NaN or infinite.
    """
    # The same audio under several conditions teaches the same thing once.
    distinct = list(
        {(e.id, e.source_text): e for e in examples if e.words and e.frames is not None}.values()
    )
    if not distinct:
        raise InvalidInput(
            "no training example has word times",
            "adapt.alignment_steps",
            "set it to 0, or give the data a words column",
        )
    targets, vocabulary = _word_embeddings(model, distinct)
    rows = [_aligned_words(model, example, vocabulary) for example in distinct]
    size = targets.square().mean(-1).clamp(min=1e-12)
    parameters = model.parameters_of("projector")
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    order = endless_batches([len(row) for row in rows], batch_size, seed)
    losses = []
    with learning(model, parameters):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            chosen = next(order)
            embeddings, _ = model.projector(
                *pad_frames([distinct[i] for i in chosen], model.device)
            )
            words = np.full(embeddings.shape[:2], -1, dtype=np.int64)
            for row, i in enumerate(chosen):
                words[row, : len(rows[i])] = rows[i]
            word = torch.from_numpy(words).to(model.device)
            covered = word >= 0
            predicted, index = embeddings[covered], word[covered]
            target = targets[index]
            cosine = functional.cosine_similarity(predicted, target, dim=-1)
            error = (predicted - target).square().mean(-1) / size[index]
            loss = (1 - cosine + error).mean()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise NotFinite(
                    f"the alignment's loss is {losses[-1]} at step {step + 1} (utterances "
                    f"{', '.join(distinct[i].id for i in chosen)})",
                    "adapt.alignment_lr",
                    "lower it, or look at these utterances",
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return losses


def _word_embeddings(
    model: SpeechLLM, examples: Sequence[Example]
) -> tuple[Tensor, dict[str, int]]:
    """The mean embedding of each distinct word `[words, decoder_dim]`, and the words' rows."""
    vocabulary = {w: i for i, w in enumerate(sorted({w for e in examples for w, _, _ in e.words}))}
    tokens = model.tokenizer([f" {word}" for word in vocabulary], add_special_tokens=False)
    table = model.causal_lm.get_input_embeddings().weight.detach()
    means = [
        table[torch.tensor(ids, device=table.device)].float().mean(0)
        if ids
        else table.new_zeros(table.shape[1], dtype=torch.float32)
        for ids in tokens["input_ids"]
    ]
    return torch.stack(means), vocabulary


def _aligned_words(model: SpeechLLM, example: Example, vocabulary: dict[str, int]) -> np.ndarray:
    """Row of the word that covers the middle of each of an utterance's embeddings; -1 for none."""
    assert example.frames is not None
    frames = len(example.frames)
    positions = model.projector.output_length(frames)
    # The last window may reach beyond the audio.
    windows = -(-frames // model.projector.stack) * model.projector.stack
    seconds = example.duration * windows / frames / positions
    middles = (np.arange(positions) + 0.5) * seconds
    covering = np.full(positions, -1, dtype=np.int64)
    for word, start, end in example.words:
        inside = (middles >= start) & (middles < end)
        if not inside.any():
            inside[int(np.abs(middles - (start + end) / 2).argmin())] = True
        covering[inside] = vocabulary[word]
    return covering
