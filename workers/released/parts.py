"""Where a released SpeechLLM keeps its encoder, projector and language model."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from workers.errors import InvalidInput

# What a configuration says about files and versions, and not about the model.
_NOT_THE_MODEL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True, eq=False)
class ReleasedParts:
    """The parts of a released SpeechLLM."""

    joint: PreTrainedModel
    """The module that holds the three others side by side; no language-model head."""
    tower: PreTrainedModel
    """The audio encoder."""
    projector: nn.Module
    """What stands between the two."""
    language: PreTrainedModel
    """The decoder, from embeddings to the final norm."""
    tower_name: str
    projector_name: str
    language_name: str


def released_parts(model: PreTrainedModel) -> ReleasedParts:
    """Finds the parts: beside the decoder lie one model (the encoder) and one plain module.

    Raises:
        InvalidInput: the model has another shape; says what was found.
    """
    language = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is language), "")
    parent, _, language_name = path.rpartition(".")
    joint = model.get_submodule(parent)
    others = {
        name: child
        for name, child in joint.named_children()
        if child is not language and any(True for _ in child.parameters())
    }
    towers = [name for name, child in others.items() if isinstance(child, PreTrainedModel)]
    projectors = [name for name in others if name not in towers]
    if path and len(towers) == len(projectors) == 1:
        return ReleasedParts(
            joint,
            others[towers[0]],
            others[projectors[0]],
            language,
            towers[0],
            projectors[0],
            language_name,
        )
    raise InvalidInput(
        f"{type(model).__name__} is not built of one encoder, one projector and one decoder: "
        f"beside the decoder it has {', '.join(others) or 'nothing'}",
        "speechllm",
        "Qwen2-Audio, Voxtral, Granite-Speech and models of their shape can be used",
    )


def described(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration as plain data, without what does not decide how the model is built."""
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return _without(content)


def skeleton(described: Mapping[str, Any]) -> PreTrainedModel:
    """The model a configuration describes, on the meta device: no weights, no memory.

    Raises:
        InvalidInput: transformers has no such model of its own.
    """
    with torch.device("meta"):
        return released_class(configuration(described))(configuration(described))


def configuration(described: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration object that `described` took down.

    Raises:
        InvalidInput: transformers has no such model of its own.
    """
    kind = described.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise InvalidInput(
            f"transformers has no model of its own of the type {kind!r}",
            "speechllm",
            "a newer version of transformers may",
        )
    return CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(described)))


def released_class(config: PreTrainedConfig) -> Any:
    """The class of the whole model, with its head.

    Raises:
        InvalidInput: there is none that hears and writes.
    """
    for mapping in (MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING):
        found = mapping.get(type(config), None)
        if found is not None:
            return found
    raise InvalidInput(
        f"transformers has no model of the type {config.model_type!r} that takes audio and writes "
        "text",
        "speechllm",
        "name another model",
    )


def as_causal_lm(model: PreTrainedModel, language: PreTrainedModel) -> PreTrainedModel:
    """The language model inside as the causal LM of its own kind; no weight is copied.

    The head is the kind's own too: Granite divides its logits by `logits_scaling`, which
    Granite-Speech in transformers leaves out, so that its probabilities (never its greedy answers)
    differ from those it was trained with.

    Raises:
        InvalidInput: there is no such causal LM, or it would answer differently.
    """
    config = language.config
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    head = model.get_output_embeddings()
    if kind is None or head is None:
        raise InvalidInput(
            f"the language model of {type(model).__name__} ({config.model_type}) is no causal LM "
            "that transformers can save on its own",
            "speechllm",
            "name another model",
        )
    config.tie_word_embeddings = head.weight is language.get_input_embeddings().weight
    with torch.device("meta"):
        causal_lm = kind(config)
    setattr(causal_lm, causal_lm.base_model_prefix, language)
    causal_lm.set_output_embeddings(head)
    causal_lm.generation_config = copy.deepcopy(model.generation_config)
    causal_lm.eval()
    if any(parameter.is_meta for parameter in causal_lm.parameters()) or not _same(
        model, causal_lm
    ):
        raise InvalidInput(
            f"{type(model).__name__} does more with its language model than "
            f"{type(causal_lm).__name__} does",
            "speechllm",
            "name another model",
        )
    return causal_lm


@torch.no_grad()
def _same(model: PreTrainedModel, causal_lm: PreTrainedModel) -> bool:
    """Whether both answer a text alike: the same logits, up to a factor."""
    ids = torch.arange(10, device=causal_lm.device)
    ids = ids[ids != model.config.audio_token_id][None]
    theirs, ours = (m(input_ids=ids, use_cache=False).logits.double() for m in (model, causal_lm))
    factor = (theirs * ours).sum() / ours.square().sum()
    gap = (theirs - factor * ours).abs().max()
    return bool(factor > 0 and gap <= 1e-3 * theirs.abs().max())


def _without(content: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in _NOT_THE_MODEL
    }
