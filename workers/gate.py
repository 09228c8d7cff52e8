"""Saving a cut model, and the gate: the folder is the model in memory, and it decodes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from workers.decoder_parts import evaluating, unique_parameters, unwrapped
from workers.errors import InvalidInput, first_line


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
    if unwrapped(model) is not model:
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
        raise InvalidInput(f"the folder does not open: {first_line(error)}", where) from error
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
        raise InvalidInput(f"decoding with the cache fails: {first_line(error)}", where) from error
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
