"""Cutting whole layers out of a decoder, for good or for a while, in place and without copies.

Everything is found through the configuration and the module structure; there is no table of model
classes. Before anything is touched, the decoder is built twice on the meta device, from its
configuration as it is and as it will be after the cut: a cut that the configuration cannot express
(the saved folder would open as another model) is refused with the reason.
"""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from workers.errors import InvalidInput

# Where a module keeps the number of its layer; what these say is renumbered.
_INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number")
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
_WHOLE = "map or evaluate it whole, or choose another decoder"


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
    base = _unwrapped(model)
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
    return _count(model.parameters())


def refuse_uncuttable(model: nn.Module) -> None:
    """Says why layers of this decoder depend on one another, if they do.

    Raises:
        InvalidInput: the architecture can't be cut safely; holds the reason.
    """
    parts = decoder_parts(model)
    name = type(_unwrapped(model)).__name__
    for setting, reason in _ENTANGLED.items():
        value = getattr(parts.config, setting, None)
        if value and not (setting == "indexer_types" and "shared" not in value):
            raise InvalidInput(
                f"{name} cannot be cut: {reason} ({setting} = {value!r})", "decoder", _WHOLE
            )
    owners: dict[int, int] = {}
    for index, layer in enumerate(parts.layers):
        for parameter in layer.parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise InvalidInput(
                    f"{name} cannot be cut: layers {owners[id(parameter)]} and {index} share "
                    "weights",
                    "decoder",
                    _WHOLE,
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


def save_pruned(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, out: Path
) -> None:
    """Writes a folder that opens with `AutoModelForCausalLM.from_pretrained`, safetensors only.

    Args:
        model: cut by `remove_layers` or inside `pruned`.
        tokenizer: written beside it.
        out: new or empty.

    Raises:
        InvalidInput: the folder is in use, or the model carries an adapter.
    """
    if _unwrapped(model) is not model:
        raise InvalidInput(
            "the model carries an adapter, which a plain folder cannot hold",
            "decoder",
            "merge the adapter first (merge_and_unload)",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInput("the output folder is not empty", str(out), "name a new folder")
    # save_pretrained writes class names and dtype into the configuration it saves.
    configs = {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}
    settings = [(config, dict(vars(config))) for config in configs.values()]
    model.save_pretrained(out)
    for config, before in settings:
        vars(config).clear()
        vars(config).update(before)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)


def reload_gate(
    model: PreTrainedModel, folder: Path, inputs: Mapping[str, Tensor], new_tokens: int = 8
) -> None:
    """Makes sure that a folder `save_pruned` wrote is the model in memory, and that it decodes.

    Weights found and none left over; as many unique parameters; the same logits (bit-equal on CPU);
    greedy decoding with the cache gives at each step the logits of a run without.

    Args:
        model: the cut model the folder was saved from.
        folder: what `save_pruned` wrote.
        inputs: keyword arguments of the forward pass, `input_ids` `[batch, time]` among them; a
            batch with padding needs `attention_mask`.
        new_tokens: decoded for the check of the cache.

    Raises:
        InvalidInput: names what differs.
    """
    where = str(folder)
    known = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    try:
        loaded, report = (AutoModelForCausalLM if known else type(model)).from_pretrained(
            folder,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as error:  # a damaged folder fails in any way it likes
        raise InvalidInput(f"the folder does not open: {_first_line(error)}", where) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            names = ", ".join(sorted(map(str, report[kind]))[:3])
            raise InvalidInput(
                f"reloading reports {len(report[kind])} {kind.replace('_', ' ')}: {names}", where
            )
    loaded.to(model.device).eval()
    ours, theirs = unique_parameters(model)[0], unique_parameters(loaded)[0]
    if ours != theirs:
        raise InvalidInput(
            f"the reloaded model has {theirs} parameters, the one in memory {ours}", where
        )
    with evaluating(model), torch.no_grad():
        expected, logits = (m(**inputs, use_cache=False).logits for m in (model, loaded))
        exact = expected.device.type == "cpu"
        if not (torch.equal(expected, logits) if exact else _close(expected, logits)):
            raise InvalidInput(
                f"the reloaded model's logits differ by up to {_gap(expected, logits):.2g}", where
            )
        for name, one in (("model in memory", model), ("reloaded model", loaded)):
            gap = _cache_gap(one, inputs, new_tokens, where)
            if gap is not None:
                raise InvalidInput(
                    f"the {name} decodes differently with the cache than without: logits differ "
                    f"by up to {gap:.2g}",
                    where,
                )


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


def _unwrapped(model: nn.Module) -> Any:
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model else model


def _count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    unique = {
        (p.device, p.data_ptr() or id(p), p.shape, p.stride()): (p.numel(), p.element_size())
        for p in parameters
    }
    return sum(n for n, _ in unique.values()), sum(n * size for n, size in unique.values())


def _cut(model: nn.Module, layers: Sequence[int]) -> Callable[[], None]:
    """Removes layers in place; the returned function puts everything back."""
    parts = decoder_parts(model)
    removed = _checked(layers, len(parts.layers))
    if not removed:
        return lambda: None
    refuse_uncuttable(model)
    kept = [i for i in range(len(parts.layers)) if i not in removed]
    settings = _cut_settings(parts.config, kept)
    attributes = _check_rebuilt(parts, settings, kept)
    before, original = unique_parameters(model)[0], list(parts.layers)
    gone = _count(p for i in removed for p in original[i].parameters())[0]

    with ExitStack() as undo:
        undo.callback(_refill, parts.layers, original)
        _refill(parts.layers, [original[i] for i in kept])
        for config in _copies_of(model, parts):
            for name, value in settings.items():
                _set(undo, config, name, value)
        for name, value in attributes.items():
            _set(undo, parts.body, name, value)
        for new, old in enumerate(kept):
            for module in original[old].modules():
                for name in _INDEX_NAMES:
                    if isinstance(vars(module).get(name), int):
                        _set(undo, module, name, vars(module)[name] + new - old)
        if before - unique_parameters(model)[0] != gone:
            raise InvalidInput(
                "removed layers share weights with the rest of the model", "decoder", _WHOLE
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


def _cut_settings(config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
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


def _check_rebuilt(
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
            _WHOLE,
        )
    before, after = _plain_attributes(whole), _plain_attributes(cut)
    return {
        name: value
        for name, value in after.items()
        if name in before and before[name] != value and vars(parts.body).get(name) == before[name]
    }


def _skeleton(parts: DecoderParts, config: PreTrainedConfig) -> nn.Module:
    """The body without weights, built from the configuration as a folder would hold it."""
    try:
        reread = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
        with torch.device("meta"):
            return type(parts.body)(reread)
    except Exception as error:  # what a model's own code raises is its own affair
        raise InvalidInput(
            f"{type(parts.body).__name__} cannot be cut: its configuration does not hold "
            f"together with {config.num_hidden_layers} layers: {_first_line(error)}",
            "decoder",
            _WHOLE,
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
        and name not in (*_INDEX_NAMES, "training")
        and isinstance(value, bool | int | float | str | list | tuple | None)
    }


def _copies_of(model: nn.Module, parts: DecoderParts) -> list[PreTrainedConfig]:
    """Every configuration object that describes this decoder; usually one, shared by all modules."""
    above = [_unwrapped(model)]
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


def _set(undo: ExitStack, target: object, name: str, value: Any) -> None:
    undo.callback(setattr, target, name, getattr(target, name))
    # Lists are copied: configurations and modules must not share what one of them may change.
    setattr(target, name, copy.copy(value))


def _refill(layers: nn.ModuleList, content: Sequence[nn.Module]) -> None:
    del layers[:]
    layers.extend(content)


def _cache_gap(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], new_tokens: int, where: str
) -> float | None:
    """Largest difference of logits between cached steps and one uncached run, if it is too large."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    end = model.generation_config.eos_token_id
    pad = end[0] if isinstance(end, list) else end or 0
    given: dict[str, Any] = {**inputs, "attention_mask": mask}
    try:
        decoded = model.generate(
            **given,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=pad,
        )
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InvalidInput(f"decoding with the cache fails: {_first_line(error)}", where) from error
    cached = torch.stack(decoded.logits, dim=1)
    given["input_ids"] = decoded.sequences[:, :-1]
    given["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), new_tokens - 1)], dim=1)
    if not bool(mask.all()):
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    uncached = model(**given, use_cache=False).logits[:, -new_tokens:]
    return None if _close(uncached, cached) else _gap(uncached, cached)


def _close(expected: Tensor, actual: Tensor) -> bool:
    if expected.shape != actual.shape or not bool(actual.isfinite().all()):
        return False
    scale = max(1.0, expected.abs().max().item())
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    return _gap(expected, actual) <= tolerance * scale


def _gap(expected: Tensor, actual: Tensor) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    return (expected.float() - actual.float()).abs().max().item()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
