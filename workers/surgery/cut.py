"""Cutting whole layers out of a decoder, for good or for a while, in place and without copies.

What the configuration says afterwards is `cut_config`'s business; what a saved folder must pass,
`gate`'s.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from workers.errors import InvalidInput
from workers.surgery.cut_config import (
    INDEX_NAMES,
    WHOLE,
    check_rebuilt,
    copies_of,
    cut_settings,
    refuse_uncuttable,
)
from workers.surgery.decoder_parts import (
    count_parameters,
    decoder_parts,
    unique_parameters,
)


def remove_layers(model: nn.Module, layers: Sequence[int]) -> None:
    """Removes layers in place and for good; layers and configuration then belong together.

    Args:
        model: as for `decoder_parts`; adapters that peft put into the layers go with them.
        layers: numbers of the layers to remove, from 0, in any order; none is fine.

    Raises:
        InvalidInput: a number is out of range or doubled, no layer would be left, or the
            architecture can't be cut. The model is untouched then.
    """
    _cut(model, layers)


@contextmanager
def pruned(model: nn.Module, layers: Sequence[int]) -> Iterator[None]:
    """`remove_layers` until the block ends; no weight is copied, and all is undone on any exit.

    Blocks nest: inner numbers are those of the decoder as the outer block left it.
    """
    undo = _cut(model, layers)
    try:
        yield
    finally:
        undo()


def _cut(model: nn.Module, layers: Sequence[int]) -> Callable[[], None]:
    """Removes layers in place; the returned function puts everything back."""
    parts = decoder_parts(model)
    removed = _checked(layers, len(parts.layers))
    if not removed:
        return lambda: None
    refuse_uncuttable(model)
    kept = [i for i in range(len(parts.layers)) if i not in removed]
    settings = cut_settings(parts.config, kept)
    attributes = check_rebuilt(parts, settings, kept)
    before, original = unique_parameters(model)[0], list(parts.layers)
    gone = count_parameters(p for i in removed for p in original[i].parameters())[0]

    with ExitStack() as undo:
        undo.callback(_refill, parts.layers, original)
        _refill(parts.layers, [original[i] for i in kept])
        for config in copies_of(model, parts):
            for name, value in settings.items():
                _set(undo, config, name, value)
        for name, value in attributes.items():
            _set(undo, parts.body, name, value)
        for new, old in enumerate(kept):
            for module in original[old].modules():
                for name in INDEX_NAMES:
                    if isinstance(vars(module).get(name), int):
                        _set(undo, module, name, vars(module)[name] + new - old)
        if before - unique_parameters(model)[0] != gone:
            raise InvalidInput(
                "removed layers share weights with the rest of the model", "decoder", WHOLE
            )
        return undo.pop_all().close


def _checked(layers: Sequence[int], count: int) -> set[int]:
    removed = set(layers)
    outside = sorted(i for i in removed if not 0 <= i < count)
    if outside:
        raise InvalidInput(
            f"layer {outside[0]} does not exist: the decoder has {count} layers",
            "layers",
            f"choose layers 0 to {count - 1}",
        )
    if len(removed) != len(layers):
        raise InvalidInput(f"a layer is named twice in {list(layers)}", "layers", "name it once")
    if len(removed) == count:
        raise InvalidInput(
            f"all {count} layers would be removed", "layers", f"remove at most {count - 1}"
        )
    return removed


def _set(undo: ExitStack, target: object, name: str, value: Any) -> None:
    undo.callback(setattr, target, name, getattr(target, name))
    # Lists are copied: configurations and modules must not share what one of them may change.
    setattr(target, name, copy.copy(value))


def _refill(layers: nn.ModuleList, content: Sequence[nn.Module]) -> None:
    del layers[:]
    layers.extend(content)
