"""Activation checkpointing: less memory in a training step for more time."""

import contextlib
import functools
from collections.abc import Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from workers.surgery.decoder_parts import decoder_layers


@contextlib.contextmanager
def recomputed(decoder: PreTrainedModel, on: bool) -> Iterator[None]:
    """Decoder layers keep their inputs alone for the backward pass until the block ends.

    The loss and the gradients are the same to the last bit; a step computes the forward pass twice
    (Chen et al. 2016, arXiv 1604.06174).
    """
    layers: list[nn.Module] = list(decoder_layers(decoder)) if on else []
    try:
        for layer in layers:
            plain = layer.forward
            layer.__dict__["forward"] = functools.partial(checkpoint, plain, use_reentrant=False)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
