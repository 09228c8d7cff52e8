"""What decoders, encoders and projectors are made of, as far as memory and time depend on it."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.estimate.tensors import Shapes, config_shapes, heads_of, tied

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one number."""
_LAYER = re.compile(r"^(.*?)(layers|h|blocks|block|layer)\.(\d+)\.(.+)$")
_BUFFERS = (
    "rotary_emb.inv_freq", ".masked_bias", "running_mean", "running_var", "num_batches_tracked",
)  # fmt: skip
_SHARED_INPUT = re.compile(r"(.*)\b(?:q|k|v|qkv|query|key|value|gate|up|gate_up)(?:_proj)?$")


@dataclass(frozen=True)
class Linear:
    """One linear module inside a layer."""

    name: str
    """Inside its layer: `self_attn.q_proj`."""
    inputs: int
    outputs: int


@dataclass(frozen=True)
class DecoderShape:
    """A decoder, or the whole of a released SpeechLLM."""

    hidden: int
    vocabulary: int
    parameters: int
    """Of all that is loaded, shared storage counted once; encoder and projector of a released
    SpeechLLM among them."""
    layer_parameters: int
    """Of one layer (the mean)."""
    linears: tuple[tuple[Linear, ...], ...]
    """For each layer, the modules LoRA can sit on."""
    queries: int
    """Width of all query heads together."""
    heads: int
    keys: int
    """Width of keys and values of one token in one layer, together."""
    inner: int
    """Width of the feed-forward network that one token sees."""
    norms: int
    """Width of all norms of a layer together, as many times as each is applied to a token."""
    projector: tuple[int, int] = (0, 0)
    """Parameters and tensors of a released SpeechLLM's own projector."""
    tower: int = 0
    """Parameters of a released SpeechLLM's own encoder."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.linears)

    @cached_property
    def head(self) -> int:
        """Multiplications of the language-model head for one token."""
        return self.vocabulary * self.hidden


@dataclass(frozen=True)
class EncoderShape:
    """A speech encoder."""

    width: int
    """Of its frames."""
    parameters: int | None
    """None: cannot be read."""
    frame_rate: float
    """Frames a second."""
    config: Mapping[str, Any]


def decoder_shape(config: Mapping[str, Any], stored: Shapes | None) -> DecoderShape | None:
    """Read a decoder's shape.

    Args:
        config: content of `config.json`.
        stored: shapes of its weights, where they can be looked at.

    Returns:
        None where something that matters cannot be read.
    """
    text = config.get("text_config")
    released = isinstance(text, dict)
    of = text if isinstance(text, dict) else config
    shapes = stored or (None if released else config_shapes(config))
    if shapes is None or "kv_lora_rank" in of:
        return None
    shapes = _parameters(shapes)
    if tied(config) or (released and tied(of)):
        shapes = {name: s for name, s in shapes.items() if not _is_head(name)}
    try:
        layers = _layers(shapes, of.get("num_hidden_layers") or of.get("n_layer"))
        heads, groups, width = heads_of(of)
        hidden = int(of.get("hidden_size") or of["n_embd"])
        vocabulary = int(of["vocab_size"])
        inner = _inner(of, hidden)
    except (KeyError, TypeError, ValueError):
        return None
    turned = of.get("model_type") == "gpt2"  # its Conv1D keeps [inputs, outputs]
    projector = [s for name, s in shapes.items() if released and "projector" in name]
    prefix, found = layers
    language = {name for name in shapes if name.startswith(prefix.split("layers")[0])}
    return DecoderShape(
        hidden=hidden,
        vocabulary=vocabulary,
        parameters=_count(shapes.values()),
        layer_parameters=sum(_count(layer.values()) for layer in found) // len(found),
        linears=tuple(_linears(layer, turned) for layer in found),
        queries=heads * width,
        heads=heads,
        keys=_keys(found[0], 2 * groups * width),
        inner=inner,
        norms=_norms(found[0], heads, groups, width),
        projector=(_count(projector), len(projector)),
        tower=_tower(shapes, language) if released else 0,
    )


def encoder_shape(config: Mapping[str, Any], stored: Shapes | None) -> EncoderShape | None:
    """Read an encoder's shape; None where the width of its frames cannot be read."""
    own = config.get("audio_config") or config.get("encoder_config") or config
    if not isinstance(own, Mapping):
        return None
    width = own.get("d_model") or (own.get("add_adapter") and own.get("output_hidden_size"))
    width = width or own.get("hidden_size") or own.get("hidden_dim")
    if not isinstance(width, int):
        return None
    parameters = _count(_parameters(stored).values()) if stored else None
    return EncoderShape(width, parameters, _frame_rate(own), own)


def projector_size(config: Mapping[str, Any], frame: int, hidden: int) -> tuple[int, int]:
    """Parameters and tensors of a projector of ours.

    Args:
        config: fields of `ProjectorConfig`.
        frame: width of the encoder's frames.
        hidden: width of the decoder's embeddings.
    """
    stack, inner = config["stack"], config["hidden"]
    norm = 2 * hidden
    if config["kind"] == "linear":
        return (frame * stack + 1) * hidden, 2
    if config["kind"] == "mlp":
        return (frame * stack + 1) * inner + (inner + 1) * hidden + norm, 6
    if config["kind"] == "conv":
        local, strided = 3 * frame * inner + inner, config["stack"] * inner * inner + inner
        return local + strided + (inner + 1) * hidden + norm, 8
    tables = (config["queries"] + stack) * inner
    attention = (frame + 1) * inner + 4 * inner + 4 * (inner + 1) * inner
    forward = 2 * inner + (inner + 1) * 2 * inner + (2 * inner + 1) * inner
    return tables + attention + forward + (inner + 1) * hidden + norm, 24


def adapted(linears: tuple[Linear, ...], targets: str | list[str]) -> list[Linear]:
    """The linear modules of a layer that LoRA sits on, as `workers.lora` chooses them."""
    if targets == "all-linear":
        return list(linears)
    if targets == "attention":
        return [one for one in linears if re.search(r"attn|attention", one.name)]
    return [one for one in linears if {one.name, one.name.rpartition(".")[2]} & set(targets)]


def distinct_inputs(linears: list[Linear]) -> int:
    """Width of what enters some modules of a layer, a tensor that several read counted once."""
    widths = {
        shared[1] if (shared := _SHARED_INPUT.match(one.name)) else one.name: one.inputs
        for one in linears
    }
    return sum(widths.values())


def _layers(shapes: Shapes, count: int | None) -> tuple[str, list[Shapes]]:
    """The decoder's layers, and the name of the list they lie in."""
    lists: dict[str, dict[int, Shapes]] = defaultdict(lambda: defaultdict(dict))
    for name, shape in shapes.items():
        match = _LAYER.match(name)
        if match is not None:
            lists[match[1] + match[2]][int(match[3])][match[4]] = shape
    fitting = [
        place
        for place, layers in lists.items()
        if set(layers) == set(range(count or 0))
        and not re.search(r"audio|encoder|tower|vision|speech", place)
    ]
    if len(fitting) != 1:
        raise ValueError(f"{len(fitting)} lists of {count} layers")
    found = lists[fitting[0]]
    return fitting[0], [found[number] for number in sorted(found)]


def _linears(layer: Shapes, turned: bool) -> tuple[Linear, ...]:
    found = []
    for name, shape in layer.items():
        module, _, what = name.rpartition(".")
        # Experts are one tensor in memory and routers no linear modules: LoRA leaves both alone.
        expert = ".experts." in name or module.rpartition(".")[2] in ("gate", "router")
        if what == "weight" and len(shape) == 2 and not expert:
            outputs, inputs = shape[::-1] if turned else shape
            found.append(Linear(module, inputs, outputs))
    return tuple(found)


def _keys(layer: Shapes, otherwise: int) -> int:
    widths = [
        shape[0]
        for name, shape in layer.items()
        if re.search(r"\b[kv]_proj\.weight$", name) and len(shape) == 2
    ]
    return sum(widths) if len(widths) == 2 else otherwise


def _norms(layer: Shapes, heads: int, groups: int, width: int) -> int:
    total = 0
    for name, shape in layer.items():
        if len(shape) == 1 and name.endswith("weight"):
            of_heads = {"q_norm": heads, "k_norm": groups}.get(name.split(".")[-2], 1)
            # One that is as wide as a head is applied to each of them.
            total += shape[0] * (of_heads if shape[0] == width else 1)
    return total


def _inner(config: Mapping[str, Any], hidden: int) -> int:
    experts = config.get("num_experts_per_tok")
    if experts:
        return int(config.get("moe_intermediate_size") or config["intermediate_size"]) * int(
            experts
        )
    return int(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden)


def _tower(shapes: Shapes, language: set[str]) -> int:
    return _count(
        shape
        for name, shape in shapes.items()
        if name not in language and "projector" not in name and not _is_head(name)
    )


def _parameters(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.endswith(_BUFFERS)}


def _is_head(name: str) -> bool:
    return name.endswith("lm_head.weight")


def _count(shapes: Any) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _frame_rate(config: Mapping[str, Any]) -> float:
    """Frames a second, where strides say so; else 50, what nearly every speech encoder has."""
    strides = config.get("conv_stride")
    if isinstance(strides, list) and len(strides) > 1 and all(isinstance(s, int) for s in strides):
        return 16_000 / math.prod(strides)
    return 50.0
