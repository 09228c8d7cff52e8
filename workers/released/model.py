"""Opening a released SpeechLLM, and a SpeechLLM of ours made of its parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from workers.config import (
    Condition,
    LoraSettings,
    OwnProjectorConfig,
    PromptSettings,
    RecordedPrompts,
)
from workers.errors import InvalidInput, first_line, refuse_missing
from workers.released.audio import OwnEncoder
from workers.released.parts import as_causal_lm, described, released_class
from workers.released.processor import open_processor
from workers.released.prompts import record_prompts
from workers.speechllm import SpeechLLM, SpeechLLMConfig


@dataclass(frozen=True, eq=False)
class Released:
    """A released SpeechLLM in memory, in evaluation mode, nothing in it requiring a gradient."""

    decoder: PreTrainedModel
    """Its language model as a causal LM, weights shared."""
    tokenizer: PreTrainedTokenizerBase
    encoder: OwnEncoder
    projector: nn.Module
    """Its projector itself, in the model's dtype."""
    config: dict[str, Any]
    """How the model is built, as plain data."""

    def prompts(self, settings: PromptSettings, conditions: Sequence[Condition]) -> RecordedPrompts:
        """The prompts of some conditions as its processor makes them."""
        declared = self.decoder.generation_config.eos_token_id
        ends = {*(declared if isinstance(declared, list | tuple) else [declared])}
        ends.add(self.tokenizer.eos_token_id)
        return record_prompts(
            self.encoder.processor,
            self.encoder.model.config.audio_token_id,
            sorted(end for end in ends if end is not None),
            settings,
            conditions,
        )

    def speechllm(
        self,
        conditions: Sequence[Condition],
        prompts: PromptSettings = PromptSettings(),  # noqa: B008 - frozen
        lora: LoraSettings = LoraSettings(),  # noqa: B008 - frozen
        seed: int = 0,
        *,
        name: str = "",
    ) -> SpeechLLM:
        """The model as it was released, with a fresh adapter, which changes nothing yet.

        Args:
            conditions: what it will be asked to do.
            prompts: of the sweep; the defaults stand for the model's own.
            lora: the adapter.
            seed: of the adapter's weights.
            name: for people.
        """
        config = SpeechLLMConfig(
            encoder_dim=self.encoder.dim,
            projector=OwnProjectorConfig(model=self.config),
            lora=lora,
            prompts=self.prompts(prompts, conditions),
            decoder_name=name,
            encoder_name=name,
        )
        model = SpeechLLM.create(self.decoder, self.tokenizer, config, seed, self.encoder)
        own = {f"module.{key}": value for key, value in self.projector.state_dict().items()}
        model.projector.load_state_dict(own)
        return model


def open_released(
    reference: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    own_adapter: bool = True,
) -> Released:
    """Opens a released SpeechLLM.

    Args:
        reference: a folder or a hub id.
        revision: of a hub repository.
        dtype: of all of it; `auto`: as stored.
        device: where it goes.
        trust_remote_code: let the repository's own code run.
        own_adapter: merge the LoRA adapter some bring for speech (Granite-Speech) into the decoder;
            without it, the decoder is what such a model reads text with.

    Raises:
        InvalidInput: it cannot be opened, weights are missing, or it has another shape.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(reference, **options)
        content = described(config)
        model, report = released_class(config).from_pretrained(
            reference, dtype=dtype, output_loading_info=True, **options
        )
        processor = open_processor(reference, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise InvalidInput(f"the model cannot be opened: {first_line(error)}", reference) from error
    refuse_missing(report["missing_keys"], reference)
    adapted = _take_off_adapter(model, merge=own_adapter)
    if getattr(config, "has_lora_adapter", False) and not adapted:
        raise InvalidInput(
            "the configuration says that an adapter belongs to it (has_lora_adapter), but none is "
            "there",
            reference,
            "put adapter_config.json and its weights back, or set has_lora_adapter to false if the "
            "adapter has been merged",
        )
    model.to(device).eval().requires_grad_(False)
    encoder = OwnEncoder(model, processor)
    decoder = as_causal_lm(model, encoder.parts.language)
    return Released(decoder, processor.tokenizer, encoder, encoder.parts.projector, content)


def _take_off_adapter(model: PreTrainedModel, *, merge: bool) -> bool:
    """Puts plain layers back where peft's stand; returns whether there were any."""
    places = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    for name, module in places:
        if merge:
            module.merge(adapter_names=list(model.peft_config))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.get_base_layer())
    if places:
        model._hf_peft_config_loaded = False
        del model.peft_config
    return bool(places)
