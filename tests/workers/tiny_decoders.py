"""Tiny decoders with random weights, one of each family people use."""

import torch
import transformers as hf
from transformers import PreTrainedModel

LAYERS = 6

# Windows shorter than the test sequences, so that the kind of each layer shows in its output.
FAMILIES: dict[str, tuple[type, dict]] = {
    "llama": (hf.LlamaConfig, {}),
    "llama-tied": (hf.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (
        hf.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    ),
    "qwen3": (
        hf.Qwen3Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "head_dim": 8},
    ),
    "mistral": (hf.MistralConfig, {"sliding_window": 4}),
    "gemma2": (hf.Gemma2Config, {"sliding_window": 4, "head_dim": 8}),
    "gemma3": (
        hf.Gemma3TextConfig,
        {"sliding_window": 4, "head_dim": 8, "sliding_window_pattern": 3},
    ),
    "phi3": (hf.Phi3Config, {}),
    "olmo2": (hf.Olmo2Config, {}),
    "smollm3": (hf.SmolLM3Config, {"no_rope_layer_interval": 3}),
    "granite": (hf.GraniteConfig, {"residual_multiplier": 0.7, "embedding_multiplier": 2.0}),
}


def tiny_text_config(family: str, layers: int = LAYERS, **changes) -> hf.PreTrainedConfig:
    config, own = FAMILIES[family]
    return config(
        **{
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **own,
            **changes,
        }
    )


def built(config: hf.PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A causal LM with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        # Norms begin as ones, which no direction notices: a state taken after a norm would pass.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.4 * torch.randn(parameter.shape))
        return model


def tiny_lm(family: str, layers: int = LAYERS, **changes) -> PreTrainedModel:
    return built(tiny_text_config(family, layers, **changes))


def token_ids(batch: int = 2, time: int = 9) -> torch.Tensor:
    return torch.randint(3, 40, (batch, time), generator=torch.Generator().manual_seed(1))
