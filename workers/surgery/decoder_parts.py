"""Where a model keeps its decoder: found through the configuration and the module structure.

There is no table of model classes. The decoder may be the whole model, one wrapped by peft, or one
inside a multimodal model.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from workers.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class DecoderParts:
    """Where a model keeps its decoder."""

    layers: nn.ModuleList
    """The decoder's layers, bottom first."""
    path: str
    """Name of `layers` in the model that was asked."""
    body: PreTrainedModel
    """The module that runs the layers, from embeddings to the final norm: no language-model head.
    An adapter that peft put into the layers is part of it."""
    config: PreTrainedConfig
    """The text configuration; `num_hidden_layers` is the length of `layers`."""


def decoder_parts(model: nn.Module) -> DecoderParts:
    """Finds the decoder in a causal LM, one wrapped by peft, or one inside a multimodal model.

    Raises:
        InvalidInput: there is no list of as many layers as the configuration says, or several.
    """
    base = unwrapped(model)
    name = type(base).__name__
    try:
        config = base.config.get_text_config(decoder=True)
        count = config.num_hidden_layers
    except (AttributeError, ValueError) as error:
        raise InvalidInput(
            f"{name} has no single text configuration with num_hidden_layers: {error}", "decoder"
        ) from error
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    # Routers and norms may be kept in lists of the same length: the outermost one counts, below
    # a module that was built from the text configuration.
    found: list[tuple[int, nn.ModuleList, PreTrainedModel]] = []
    for path, module in decoder.named_modules():
        own = getattr(module, "config", None)
        if not isinstance(own, PreTrainedConfig) or not isinstance(module, PreTrainedModel):
            continue
        if type(own.get_text_config(decoder=True)) is not type(config):
            continue
        found += [
            (path.count(".") + bool(path), child, module)
            for child in module.children()
            if isinstance(child, nn.ModuleList) and len(child) == count
        ]
    outermost = [entry for entry in found if entry[0] == min(depth for depth, _, _ in found)]
    if len(outermost) != 1:
        raise InvalidInput(
            f"{name} has {len(outermost)} lists of {count} decoder layers where one is expected",
            "decoder",
            "use a decoder-only model whose layers lie in one ModuleList",
        )
    _, layers, body = outermost[0]
    place = next(path for path, module in model.named_modules() if module is layers)
    return DecoderParts(layers, place, body, config)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, bottom first, under the conditions of `decoder_parts`."""
    return decoder_parts(model).layers


def unique_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters and their bytes, what is stored once counted once (tied embeddings)."""
    return count_parameters(model.parameters())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode until the block ends, each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def unwrapped(model: nn.Module) -> Any:
    """The model itself, where peft stands around it."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model else model


def count_parameters(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Number and bytes of parameters, storage that several share counted once."""
    unique = {
        (p.device, p.data_ptr() or id(p), p.shape, p.stride()): (p.numel(), p.element_size())
        for p in parameters
    }
    return sum(n for n, _ in unique.values()), sum(n * size for n, size in unique.values())
