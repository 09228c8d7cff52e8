"""What a decoder's configuration must say after a cut, and whether it can say it at all.

Before anything is touched, the decoder is built twice on the meta device, from its configuration as
it is and as it will be after the cut: a cut that the configuration cannot express (the saved folder
would open as another model) is refused with the reason.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from workers.errors import InvalidInput, first_line
from workers.surgery.decoder_parts import DecoderParts, decoder_parts, unwrapped

# Where a module keeps the number of its layer; what these say is renumbered.
INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number")
# Settings that list layers by number.
_LAYER_NUMBERS = (
    "attn_layer_indices",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "local_layer_ids",
    "mlp_only_layers",
    "moe_layers",
)
# Settings that say how many layers at the bottom are of one kind.
_BOTTOM_COUNTS = (
    "first_k_dense_replace",
    "max_window_layers",
    "moe_layer_start_index",
    "num_dense_layers",
)
# Settings that, when truthy, make one layer need another one (or the layer count itself).
_ENTANGLED = {
    "cross_attention_layers": "layers with cross-attention are counted from outside the decoder",
    "hidden_size_per_layer_input": "every layer has an input of its own, cut from one table",
    "indexer_types": "layers use the token choice of an earlier layer",
    "kv_sharing_modes": "layers share the keys and values of an earlier layer",
    "n_layers_per_attn_res_block": "layers attend to the outputs of earlier layers",
    "num_kv_shared_layers": "layers share the keys and values of an earlier layer",
    "num_layers_per_stack": "its layers are run several times",
    "ple_layer_ids": "layers have inputs of their own",
    "is_encoder_decoder": "it is the decoder of an encoder-decoder model",
    "is_heterogeneous": "its layers are configured one by one (per_layer_config)",
}
WHOLE = "map or evaluate it whole, or choose another decoder"


def refuse_uncuttable(model: nn.Module) -> None:
    """Says why layers of this decoder depend on one another, if they do.

    Raises:
        InvalidInput: the architecture can't be cut safely; holds the reason.
    """
    parts = decoder_parts(model)
    name = type(unwrapped(model)).__name__
    for setting, reason in _ENTANGLED.items():
        value = getattr(parts.config, setting, None)
        if value and not (setting == "indexer_types" and "shared" not in value):
            raise InvalidInput(
                f"{name} cannot be cut: {reason} ({setting} = {value!r})", "decoder", WHOLE
            )
    owners: dict[int, int] = {}
    for index, layer in enumerate(parts.layers):
        for parameter in layer.parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise InvalidInput(
                    f"{name} cannot be cut: layers {owners[id(parameter)]} and {index} share "
                    "weights",
                    "decoder",
                    WHOLE,
                )


def cut_settings(config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """What the configuration must say after the cut, position-derived settings made explicit."""
    count = config.num_hidden_layers
    settings = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    changed: dict[str, Any] = {}
    step = settings.get("decoder_sparse_step") or 1
    if step > 1 and settings.get("mlp_only_layers") is not None:
        settings["mlp_only_layers"] = [
            i for i in range(count) if i in settings["mlp_only_layers"] or (i + 1) % step
        ]
        changed["decoder_sparse_step"] = 1
    for name, value in settings.items():
        if name in _LAYER_NUMBERS:
            if value is not None:
                changed[name] = type(value)(kept.index(i) for i in value if i in kept)
        elif name in _BOTTOM_COUNTS:
            if isinstance(value, int) and value < count:
                changed[name] = sum(i < value for i in kept)
        elif isinstance(value, list | tuple) and len(value) == count and _per_layer(name):
            changed[name] = type(value)(value[i] for i in kept)
    changed["num_hidden_layers"] = len(kept)
    return changed


def _per_layer(name: str) -> bool:
    # Other lists that may happen to be as long as the decoder is deep.
    return "token" not in name and name not in ("architectures", "labels")


def check_rebuilt(
    parts: DecoderParts, settings: Mapping[str, Any], kept: Sequence[int]
) -> dict[str, Any]:
    """Holds the decoder the cut configuration describes against the one being cut.

    Returns:
        Attributes of the body itself that follow from the configuration and change.
    """
    config = copy.deepcopy(parts.config)
    for name, value in settings.items():
        setattr(config, name, copy.deepcopy(value))
    whole, cut = _skeleton(parts, parts.config), _skeleton(parts, config)
    place = next(name for name, module in parts.body.named_modules() if module is parts.layers)
    layers, cut_layers = [list(m.get_submodule(place).children()) for m in (whole, cut)]
    for new, old in enumerate(kept):
        difference = _difference(layers[old], cut_layers[new])
        if difference:
            raise InvalidInput(
                f"{type(parts.body).__name__} cannot be cut here: layer {old} would become layer "
                f"{new} and then differ in {difference}, which its position decides",
                "decoder",
                "remove another block, or choose another decoder",
            )
    outside = [
        {n: p.shape for n, p in m.named_parameters() if not n.startswith(f"{place}.")}
        for m in (whole, cut)
    ]
    if outside[0] != outside[1]:
        name = next(iter(dict(outside[0].items() ^ outside[1].items())))
        raise InvalidInput(
            f"{type(parts.body).__name__} cannot be cut: the size of {name} depends on the number "
            "of layers",
            "decoder",
            WHOLE,
        )
    before, after = _plain_attributes(whole), _plain_attributes(cut)
    return {
        name: value
        for name, value in after.items()
        if name in before and before[name] != value and vars(parts.body).get(name) == before[name]
    }


def copies_of(model: nn.Module, parts: DecoderParts) -> list[PreTrainedConfig]:
    """Every configuration object that describes this decoder; usually one, shared by all modules."""
    above = [unwrapped(model)]
    prefix = ""
    for name in parts.path.split("."):
        prefix = f"{prefix}.{name}".lstrip(".")
        above.append(model.get_submodule(prefix))
    found = {id(parts.config): parts.config}
    for module in (*above, *parts.body.modules()):
        own = getattr(module, "config", None)
        if isinstance(own, PreTrainedConfig):
            text = own.get_text_config(decoder=True)
            if type(text) is type(parts.config):
                found[id(text)] = text
    count = parts.config.num_hidden_layers
    return [config for config in found.values() if config.num_hidden_layers == count]


def _skeleton(parts: DecoderParts, config: PreTrainedConfig) -> nn.Module:
    """The body without weights, built from the configuration as a folder would hold it."""
    try:
        reread = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
        with torch.device("meta"):
            return type(parts.body)(reread)
    except Exception as error:  # what a model's own code raises is its own affair
        raise InvalidInput(
            f"{type(parts.body).__name__} cannot be cut: its configuration does not hold "
            f"together with {config.num_hidden_layers} layers: {first_line(error)}",
            "decoder",
            WHOLE,
        ) from error


def _difference(one: nn.Module, other: nn.Module) -> str | None:
    """The first thing two layers differ in, their numbers aside."""
    ones, others = dict(one.named_modules()), dict(other.named_modules())
    for name, module in ones.items():
        twin = others.get(name)
        if twin is None or type(module) is not type(twin):
            return name or "its class"
        for attribute, value in _plain_attributes(module).items():
            if vars(twin).get(attribute) != value:
                return f"{name}.{attribute}".lstrip(".")
        shapes = [
            {n: p.shape for n, p in m.named_parameters(recurse=False)} for m in (module, twin)
        ]
        if shapes[0] != shapes[1]:
            return f"the weights of {name}"
    return next(iter(others.keys() - ones.keys()), None)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in (*INDEX_NAMES, "training")
        and isinstance(value, bool | int | float | str | list | tuple | None)
    }
