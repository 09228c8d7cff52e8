"""Saving a cut model, and the two gates a saved folder must pass.

The one runs it: the folder is the model in memory, bit for bit, and it decodes. The other needs no
model in memory: every stored tensor is its source's, and all of them fit the configuration.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from workers.errors import InvalidInput, first_line
from workers.surgery.decoder_parts import evaluating, unique_parameters, unwrapped
from workers.surgery.model_files import refuse_in_use
from workers.surgery.shards import StoredTensor, digest_of
from workers.surgery.skeleton import ModelClass, fit, opener, quiet_transformers


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
    refuse_in_use(out)
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
    model: PreTrainedModel,
    folder: Path,
    inputs: Mapping[str, Tensor],
    new_tokens: int = 8,
    *,
    trust_remote_code: bool = False,
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
        trust_remote_code: let the folder's own code run.

    Raises:
        InvalidInput: names what differs.
    """
    where = str(folder)
    try:
        with quiet_transformers():
            loaded, report = opener(type(model), model.config).from_pretrained(
                folder,
                dtype=model.dtype,
                attn_implementation=model.config._attn_implementation,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # a damaged folder fails in any way it likes
        raise InvalidInput(f"the folder does not open: {first_line(error)}", where) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            names = ", ".join(sorted(map(str, report[kind]))[:3])
            raise InvalidInput(
                f"reloading reports {len(report[kind])} {kind.replace('_', ' ')}: {names}", where
            )
    same_model(model, loaded.to(model.device).eval(), inputs, new_tokens, where)


def same_model(
    model: nn.Module, loaded: nn.Module, inputs: Mapping[str, Tensor], new_tokens: int, where: str
) -> None:
    """`reload_gate` for two models in memory, which may carry adapters.

    Raises:
        InvalidInput: names what differs; `where` is the folder the second one was loaded from.
    """
    ours, theirs = unique_parameters(model)[0], unique_parameters(loaded)[0]
    if ours != theirs:
        raise InvalidInput(
            f"the reloaded model has {theirs} parameters, the one in memory {ours}", where
        )
    with evaluating(model), evaluating(loaded), torch.no_grad():
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


def stored_gate(
    model: ModelClass,
    config: PreTrainedConfig,
    written: Mapping[str, StoredTensor],
    sources: Mapping[str, StoredTensor],
    digests: Mapping[str, str],
    where: str,
) -> None:
    """Makes sure of written weights without loading any: the same tensors, and all that is needed.

    Args:
        model: the class the folder opens as.
        config: what the folder says now.
        written: the tensors found in it, by name.
        sources: what each of them should be, by name.
        digests: SHA-256 of the sources' bytes, by name.
        where: the folder, for messages.

    Raises:
        InvalidInput: names what differs.
    """
    for name in sources.keys() | written.keys():
        there, source = written.get(name), sources.get(name)
        if there is None or source is None:
            state = "missing" if there is None else "not meant to be there"
            raise InvalidInput(f"{name} is {state}", where)
        if (there.dtype, there.shape) != (source.dtype, source.shape):
            raise InvalidInput(f"{name} has another type or shape than its source", where)
        if digest_of(there) != digests[name]:
            raise InvalidInput(
                f"{name} differs from {source.name} of {source.file}",
                where,
                "is the disk in order?",
            )
    fit_gate(model, config, written, where)


def fit_gate(
    model: ModelClass, config: PreTrainedConfig, written: Mapping[str, StoredTensor], where: str
) -> None:
    """Makes sure that written weights are all that the folder's configuration asks for.

    Raises:
        InvalidInput: some are missing or of another shape.
    """
    found = fit(model, config, {name: tensor.on_meta() for name, tensor in written.items()})
    for kind, names in (("missing", found.missing), ("misshapen", found.mismatched)):
        if names:
            raise InvalidInput(f"{len(names)} weights are {kind}, such as {names[0]}", where)


def probe_inputs(model: nn.Module, batch: int = 2, time: int = 9) -> dict[str, Tensor]:
    """Token ids `[batch, time]` for the gate, drawn from the vocabulary, special ones left out.

    Deterministic; a placeholder for audio or images is special as well.
    """
    base = unwrapped(model)
    text = base.config.get_text_config(decoder=True)
    special: set[int] = set()
    for config in (base.config, text):
        for name, value in vars(config).items():
            if name.endswith(("token_id", "token_ids", "token_index")) and value is not None:
                special |= {value} if isinstance(value, int) else set(value)
    embeddings = base.get_input_embeddings().weight
    plain = [i for i in range(min(len(embeddings), text.vocab_size)) if i not in special]
    longest = getattr(text, "max_position_embeddings", None) or time
    chosen = torch.randint(
        len(plain), (batch, min(time, longest)), generator=torch.Generator().manual_seed(0)
    )
    return {"input_ids": torch.tensor(plain)[chosen].to(embeddings.device)}


def _cache_gap(
    model: Any, inputs: Mapping[str, Tensor], new_tokens: int, where: str
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
