"""Models without weights: which class a folder opens as, and whether stored tensors fit it.

A skeleton lies on the meta device. Names are held against it by transformers itself, so that a
checkpoint whose names are converted on loading (multimodal prefixes, fused experts) is judged as it
will be loaded.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)
from transformers.utils import logging as transformers_logging

from workers.errors import InvalidInput, first_line

ModelClass = type[PreTrainedModel]


@dataclass(frozen=True)
class Fit:
    """How names and shapes of stored tensors agree with a model, in the model's own names."""

    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    unexpected: tuple[str, ...]
    """Stored, and nothing the model would load."""


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A model folder's configuration.

    Raises:
        InvalidInput: it is damaged, or of a kind transformers does not know.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # configurations check themselves, each in its own way
        raise InvalidInput(
            f"its configuration cannot be used: {first_line(error)}",
            str(folder / "config.json"),
            "a model that brings its own code needs --trust-remote-code",
        ) from error


def model_class(
    config: PreTrainedConfig, folder: Path, *, trust_remote_code: bool = False
) -> ModelClass:
    """The class that generates text from what this folder holds.

    The one the folder names itself if it can generate: some multimodal checkpoints would otherwise
    open as their text model alone.

    Raises:
        InvalidInput: there is none.
    """
    own_code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    try:
        if own_code and trust_remote_code:
            return cast(ModelClass, get_class_from_dynamic_module(own_code, str(folder)))
        for name in config.architectures or ():
            named = getattr(transformers, name, None)
            if (
                isinstance(named, type)
                and issubclass(named, GenerationMixin)
                and getattr(named, "config_class", None) is type(config)
            ):
                return cast(ModelClass, named)
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
            if type(config) in mapping:
                return cast(ModelClass, mapping[type(config)])
    except Exception as error:  # what a model's own code raises is its own affair
        raise InvalidInput(
            f"its class cannot be found: {first_line(error)}", str(folder)
        ) from error
    raise InvalidInput(
        f"no class of transformers generates text with a {type(config).__name__}",
        str(folder),
        "use a causal LM, or a SpeechLLM that transformers supports",
    )


def opener(model: ModelClass, config: PreTrainedConfig) -> Any:
    """What a person would open such a folder with: the auto class wherever it gives this class."""
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    plain = known and MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] is model
    return AutoModelForCausalLM if plain or getattr(config, "auto_map", None) else model


def skeleton(model: ModelClass, config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights, in evaluation mode.

    Raises:
        InvalidInput: its class can't be built from this configuration on the meta device.
    """
    try:
        with torch.device("meta"):
            return model(copy.deepcopy(config)).eval()
    except Exception as error:  # what a model's own code raises is its own affair
        raise InvalidInput(
            f"{model.__name__} cannot be built without weights: {first_line(error)}", "MODEL"
        ) from error


def fit(model: ModelClass, config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor]) -> Fit:
    """Lets transformers load tensors of the meta device.

    Raises:
        InvalidInput: loading fails altogether.
    """
    try:
        with quiet_transformers():
            _, report = model.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # conversions raise whatever they like
        raise InvalidInput(
            f"the weights cannot be brought into {model.__name__}: {first_line(error)}", "MODEL"
        ) from error
    return Fit(
        tuple(sorted(report["missing_keys"])),
        tuple(sorted(name for name, *_ in report["mismatched_keys"])),
        tuple(sorted(report["unexpected_keys"])),
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars and no loading report until the block ends: the caller speaks for itself."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
