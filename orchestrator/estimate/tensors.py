"""Names and shapes of a model's weights, without its weights: from headers, else from its config.

A safetensors header is exact for every architecture. Where no weights can be looked at, the layout
of the common families is written down here; any other family is unknown, never guessed.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.sources import Source

Shapes = dict[str, tuple[int, ...]]
"""Shape of every weight by its name."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER = 100 << 20
"""Bytes; what safetensors itself accepts."""

_TIED = {"gemma", "gemma2", "gemma3_text", "smollm3"}
_HEAD_DIM = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}
_KEY_VALUE_HEADS = {
    "mistral": 8, "qwen2": 32, "qwen3": 32, "gemma": 16, "gemma2": 4, "gemma3_text": 4, "smollm3": 4,
}  # fmt: skip
_OWN_BIASES = {"qwen2": ("q_proj", "k_proj", "v_proj")}
_SANDWICHED = {"gemma2", "gemma3_text"}
FAMILIES = {"llama", "granite", "olmo2", "phi3", *_KEY_VALUE_HEADS}
"""Families whose layout follows from their `config.json`; what a file leaves out has the defaults
of transformers 5."""


def tied(config: Mapping[str, Any]) -> bool:
    """Whether output and input embeddings are one tensor."""
    found = config.get("tie_word_embeddings")
    return config.get("model_type") in _TIED if found is None else bool(found)


def stored_shapes(source: Source) -> Shapes | None:
    """Shapes in the headers of a model's safetensors files on this machine.

    Args:
        source: a folder, or a hub repository in the local cache.

    Returns:
        None where there are no such files, or none that can be read.
    """
    if source.revision is None:
        return _of_folder(Path(source.path))
    from huggingface_hub import try_to_load_from_cache

    for name in (WEIGHTS, INDEX):
        cached = try_to_load_from_cache(source.path, name, revision=source.revision)
        if isinstance(cached, str):
            found = _of_folder(Path(cached).parent)
            if found is not None:
                return found
    return None


def hub_shapes(source: Source) -> Shapes | None:
    """Shapes in the headers of a hub repository's files, which alone are fetched; None: no answer."""
    if source.revision is None:
        return None
    from huggingface_hub import HfApi

    try:
        found = HfApi().get_safetensors_metadata(source.path, revision=source.revision)
    except Exception:  # noqa: BLE001 - whatever stands in the way, the shapes are unknown
        return None
    return {
        name: tuple(tensor.shape)
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def config_shapes(config: Mapping[str, Any]) -> Shapes | None:
    """Shapes that a causal LM of a known family has by its `config.json`; None for other families."""
    family = config.get("model_type")
    try:
        if family not in FAMILIES:
            return None
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
        layer = _layer(str(family), config)
    except KeyError:
        return None
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not tied(config):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def heads_of(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the width of one.

    Raises:
        KeyError: the file does not say.
    """
    family = config.get("model_type", "")
    heads = config.get("num_attention_heads") or config["n_head"]
    groups = config.get("num_key_value_heads") or _KEY_VALUE_HEADS.get(family, heads)
    width = config.get("head_dim") or _HEAD_DIM.get(family)
    hidden = config.get("hidden_size") or config["n_embd"]
    return int(heads), int(groups), int(width or hidden // heads)


def _layer(family: str, config: Mapping[str, Any]) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, groups, width = heads_of(config)
    queries, keys = heads * width, groups * width
    if family == "phi3":
        linears = {
            "self_attn.qkv_proj": (queries + 2 * keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_up_proj": (2 * inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
    else:
        linears = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
    shapes: Shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    for name, (outputs, _) in linears.items():
        part, _, own = name.partition(".")
        asked = config.get("attention_bias" if part == "self_attn" else "mlp_bias", False)
        if own in _OWN_BIASES.get(family, ()) or (asked and family not in _OWN_BIASES):
            shapes[f"{name}.bias"] = (outputs,)
    norms = ["post_attention_layernorm"]
    norms += ["post_feedforward_layernorm"] if family == "olmo2" else ["input_layernorm"]
    if family in _SANDWICHED:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes |= {f"{name}.weight": (hidden,) for name in norms}
    if family in ("qwen3", "gemma3_text"):
        shapes |= {"self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,)}
    if family == "olmo2":
        shapes |= {"self_attn.q_norm.weight": (queries,), "self_attn.k_norm.weight": (keys,)}
    return shapes


def _of_folder(folder: Path) -> Shapes | None:
    try:
        if (folder / WEIGHTS).is_file():
            return _of_files([folder / WEIGHTS])
        names = json.loads((folder / INDEX).read_text())["weight_map"].values()
        return _of_files(folder / name for name in sorted(set(names)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _of_files(files: Iterable[Path]) -> Shapes:
    shapes: Shapes = {}
    for file in files:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError(f"{file} is no safetensors file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
    return shapes
