"""Memory of one stage on the device it computes on, in bytes, before it is run.

Weights, adapter, gradients and optimizer are counted exactly (the tests hold them against real
models). Activations are reckoned the way Korthikanti et al. 2022 (arXiv 2205.05198, section 4) do,
tensor by tensor of what the backward pass needs, for what is trained here: a frozen decoder with
LoRA, RMSNorm, a gated feed-forward network and fused attention, whose score matrix is never kept.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from orchestrator.estimate.lengths import Lengths
from orchestrator.estimate.shapes import (
    BYTES,
    DecoderShape,
    EncoderShape,
    adapted,
    distinct_inputs,
    projector_size,
)
from orchestrator.estimate.subjects import Subjects
from orchestrator.graph import Node, Plan
from workers.config import LoraSettings, ProjectorConfig

CONTEXT_BYTES = round(0.6 * 2**30)
"""What a process takes on a card before it holds a tensor: CUDA's context and its libraries."""
HEADROOM = 0.1
"""Part of a card that is left free: fragmentation, and what an estimate misses."""
SHARES = (1, 2, 3, 4, 6, 8)
"""How many jobs may share a card."""

_STATES, _WORKING, _RUNS = 2 << 30, 256 << 20, 1 << 30
# As workers.maps bounds them: states of one forward pass, float64 copies, runs (and their logits)
# of a damage map.
_DAMAGE_BATCH, _DAMAGE_TOKENS = 8, 65536
_ENCODER_SECONDS = 160.0
# Audio in one forward pass of an encoder (workers.encoder).
_RELEASED_FRAME_RATE = 25.0
# Embeddings a second of a released SpeechLLM: the most among those known.
_PAIRWISE = {"wavlm", "wav2vec2-bert", "wav2vec2-conformer", "seamless_m4t", "seamless_m4t_v2"}
# Encoders whose attention adds relative positions, and so holds its scores in memory.


@dataclass(frozen=True)
class Memory:
    """Bytes of one stage at its peak."""

    weights: int = 0
    """Decoder (removed layers too: they stay loaded), and the encoder where it is loaded."""
    adapter: int = 0
    """LoRA and projector, in float32."""
    gradients: int = 0
    optimizer: int = 0
    """AdamW's two moments."""
    activations: int = 0
    cache: int = 0
    """Keys and values while decoding."""
    logits: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def stage_memory(plan: Plan, subjects: Subjects | None = None) -> dict[str, Memory | None]:
    """Memory of every stage of a plan, by node id.

    A node whose block is still undetermined is reckoned with the depth it will have. Lab builds
    take none: they compute on the CPU.

    Args:
        plan: the stages.
        subjects: shapes and lengths, where they have been read already.

    Returns:
        None where a shape cannot be read: unknown, not zero.
    """
    reckoning = _Reckoning(subjects or Subjects(plan))
    return {node.id: reckoning.of(node) for node in plan.nodes.values()}


def card_share(need_bytes: int, card_bytes: int) -> float:
    """The fraction of a GPU one job is given.

    The smallest of 1, 1/2, 1/3, 1/4, 1/6 and 1/8 at which so many jobs of this need fit on the card
    together, each with its CUDA context, and a tenth of the card stays free. 1.0 where no two fit.

    Args:
        need_bytes: of the stage (`Memory.total`).
        card_bytes: memory of one card.
    """
    for jobs in reversed(SHARES):
        if jobs * (need_bytes + CONTEXT_BYTES) <= (1 - HEADROOM) * card_bytes:
            return 1 / jobs
    return 1.0


def fits(need_bytes: int, card_bytes: int) -> bool:
    """Whether one such job fits on a card that it has to itself."""
    return need_bytes + CONTEXT_BYTES <= (1 - HEADROOM) * card_bytes


def removed_depth(node: Node) -> int:
    """How many layers a heal removes, its block determined or not."""
    if node.choice is not None:
        return node.choice.depth
    block = node.params.get("block")
    return int(block["depth"]) if block else 0


@dataclass(frozen=True)
class _Setup:
    """A SpeechLLM as it stands in memory."""

    decoder: DecoderShape
    size: int
    """Bytes of one number of the decoder."""
    lora: dict[str, Any]
    projector: tuple[int, int]
    """Parameters and tensors."""
    hidden: int
    """Width inside the projector."""
    frame: int
    """Width of the encoder's frames times the frames of a window."""


class _Reckoning:
    def __init__(self, subjects: Subjects) -> None:
        self.subjects = subjects
        self._known: dict[Any, Memory | None] = {}

    def of(self, node: Node) -> Memory | None:
        if node.kind == "build":
            return Memory()
        key = self._key(node)
        if key not in self._known:
            self._known[key] = self._reckon(node)
        return self._known[key]

    def _key(self, node: Node) -> Any:
        """What a stage's memory depends on."""
        params, base = node.params, self.subjects.base(node)
        settings = params.get("settings") or {}
        model = node.inputs.get("model")
        above = removed_depth(self.subjects.plan.nodes[model]) if model else 0
        return (
            node.kind,
            node.base,
            base.id if base else None,
            removed_depth(node) + above,
            params.get("mode"),
            params.get("modality"),
            params.get("dtype"),
            settings.get("micro_batch") or settings.get("batch_size"),
            settings.get("samples"),
            settings.get("tokens_per_second"),
            settings.get("extra_tokens"),
            str(settings.get("criteria")),
            str(settings.get("depths")),
            self.subjects.identity(node, "encoder"),
            self.subjects.data(node),
        )

    def _reckon(self, node: Node) -> Memory | None:
        if node.kind == "encode":
            return self._encode(node)
        setup = self._setup(node)
        if setup is None:
            return None
        if node.kind == "adopt" or node.params.get("mode") == "none":
            return _loaded(setup)
        lengths = self.subjects.lengths(node)
        if lengths is None:
            return None
        positions = self._positions(node, lengths)
        match node.kind:
            case "adapt":
                return _training(setup, node.params["settings"], "joint", 0, positions, lengths)
            case "heal":
                settings, mode = node.params["settings"], node.params["mode"]
                depth = removed_depth(node)
                return _training(setup, settings, mode, depth, positions, lengths)
            case "map":
                return _map(setup, node.params["settings"], positions)
            case "damage":
                return _damage(setup, node.params["settings"], positions, lengths)
            case "evaluate":
                model = self.subjects.plan.nodes[node.inputs["model"]]
                kept = setup.decoder.layers - removed_depth(model)
                return _decoding(setup, node.params["settings"], kept, positions, lengths)
        return None

    def _setup(self, node: Node) -> _Setup | None:
        decoder, base = self.subjects.decoder(node), self.subjects.base(node)
        params = node.params.get("decoder")
        if decoder is None or params is None:
            return None
        size = BYTES[params["dtype"]]
        if base is not None and base.kind == "adopt":
            lora = base.params["lora"]
            return _Setup(decoder, size, lora, decoder.projector, decoder.hidden, decoder.hidden)
        if base is None:  # it reads text alone, with what `text_only_config` puts on
            own = ProjectorConfig().model_dump()
            projector = (
                decoder.projector if decoder.tower else projector_size(own, 1, decoder.hidden)
            )
            return _Setup(decoder, size, LoraSettings().model_dump(), projector, own["hidden"], 1)
        encoder = self.subjects.encoder(base)
        if encoder is None:
            return None
        own = base.params["projector"]
        return _Setup(
            decoder,
            size,
            base.params["settings"]["lora"],
            projector_size(own, encoder.width, decoder.hidden),
            own["hidden"],
            encoder.width * own["stack"],
        )

    def _positions(self, node: Node, lengths: Lengths) -> int:
        """Decoder positions of the longest utterance, without what is yet to be decoded."""
        if node.params.get("modality") == "text":
            return lengths.prompt + 2 * lengths.longest_text
        audio = self._audio(node, lengths.longest)
        return lengths.prompt + audio + (0 if node.kind == "evaluate" else lengths.longest_text)

    def _audio(self, node: Node, seconds: float) -> int:
        base = self.subjects.base(node)
        if base is None or base.kind == "adopt":
            return math.ceil(seconds * _RELEASED_FRAME_RATE)
        encoder, own = self.subjects.encoder(base), base.params["projector"]
        assert encoder is not None
        windows = math.ceil(seconds * encoder.frame_rate / own["stack"])
        return windows * (own["queries"] if own["kind"] == "qformer" else 1)

    def _encode(self, node: Node) -> Memory | None:
        encoder, lengths = self.subjects.encoder(node), self.subjects.lengths(node)
        if encoder is None or encoder.parameters is None or lengths is None:
            return None
        size = BYTES[node.params["dtype"]]
        working = _encoding(encoder, max(_ENCODER_SECONDS, lengths.longest), lengths.longest, size)
        return Memory(weights=encoder.parameters * size, activations=working)


def _loaded(setup: _Setup) -> Memory:
    decoder = setup.decoder
    lora, _ = _lora(setup, 0)
    return Memory(weights=decoder.parameters * setup.size, adapter=4 * (lora + setup.projector[0]))


def _lora(setup: _Setup, depth: int) -> tuple[int, int]:
    """LoRA parameters and tensors of a decoder without `depth` of its layers.

    Where layers differ, those that go are taken to be the smallest: memory is rather overestimated.
    """
    rank = setup.lora["rank"]
    of_layers = sorted(
        (
            (sum(rank * (one.inputs + one.outputs) for one in chosen), 2 * len(chosen))
            for chosen in (adapted(layer, setup.lora["targets"]) for layer in setup.decoder.linears)
        ),
        reverse=True,
    )
    kept = of_layers[: len(of_layers) - depth]
    return sum(n for n, _ in kept), sum(tensors for _, tensors in kept)


def _training(
    setup: _Setup, settings: Any, mode: str, depth: int, positions: int, lengths: Lengths
) -> Memory:
    lora, lora_tensors = _lora(setup, depth)
    trained = [(lora, lora_tensors)] if mode in ("decoder", "joint") else []
    trained += [setup.projector] if mode in ("projector", "joint") else []
    parameters = sum(n for n, _ in trained)
    rows = min(settings["micro_batch"] or settings["batch_size"], settings["batch_size"])
    loaded = _loaded(setup)
    kept = setup.decoder.layers - depth
    a_layer = _saved(setup, lora_trained=mode != "projector")
    audio = max(0, positions - lengths.prompt - lengths.longest_text)
    projected = audio * 4 * (setup.frame + 2 * setup.hidden + 3 * setup.decoder.hidden)
    embedded = 2 * positions * setup.decoder.hidden * setup.size
    backward = positions * setup.size * 2 * (setup.decoder.hidden + setup.decoder.inner)
    return Memory(
        weights=loaded.weights,
        adapter=loaded.adapter,
        gradients=4 * parameters,
        # Each tensor also has a step counter of its own.
        optimizer=8 * parameters + 4 * sum(tensors for _, tensors in trained),
        activations=rows * (positions * kept * a_layer + projected + embedded + backward),
        logits=rows * lengths.longest_text * setup.decoder.vocabulary * _logit_bytes(setup.size),
    )


def _saved(setup: _Setup, *, lora_trained: bool) -> int:
    """Bytes that one position leaves in one layer for the backward pass.

    Norms keep their input in float32. Attention keeps queries, keys, values (copied once for every
    query head under a padding mask), its output and a log-sum per head; the feed-forward network the
    gate before and after its activation, and what it is multiplied by. A LoRA module keeps its input
    and the inner product: in float32 the input is shared by modules that read the same; in half
    precision peft casts it to float32 for each module.
    """
    decoder, size = setup.decoder, setup.size
    chosen = adapted(decoder.linears[0], setup.lora["targets"])
    attention = 4 * decoder.queries * size + 4 * decoder.heads
    saved = 4 * decoder.norms + attention + 3 * decoder.inner * size
    if size == 4:
        saved += 4 * (distinct_inputs(chosen) + len(chosen) * setup.lora["rank"])
    elif lora_trained:
        saved += 4 * sum(one.inputs + setup.lora["rank"] for one in chosen)
    return saved


def _passing(setup: _Setup) -> int:
    """Bytes of one position inside one layer of a forward pass that keeps nothing."""
    decoder = setup.decoder
    widest = max(3 * decoder.inner, 4 * decoder.queries + decoder.keys)
    return setup.size * (3 * decoder.hidden + widest) + 4 * decoder.hidden


def _logit_bytes(size: int) -> int:
    """Bytes of one logit while the loss is taken: itself, in float32, its log, and its gradients."""
    return 12 if size == 4 else 12 + 2 * size


def _map(setup: _Setup, settings: Any, positions: int) -> Memory:
    decoder, rows = setup.decoder, min(settings["batch_size"], settings["samples"])
    ends, width = decoder.layers + 1, decoder.hidden
    states = min(ends * rows * positions * width * setup.size, _STATES)
    working = 2 * min(ends * rows * positions * width * 8, _WORKING)
    if "cka" in settings["criteria"]:
        grams = min(ends * positions * positions * 8, _WORKING)
        working = max(working, ends * positions * width * 8 + 2 * grams)
    passing = rows * positions * _passing(setup)
    loaded = _loaded(setup)
    return Memory(loaded.weights, loaded.adapter, activations=states + max(working, passing))


def _damage(setup: _Setup, settings: Any, positions: int, lengths: Lengths) -> Memory:
    decoder, rows = setup.decoder, min(_DAMAGE_BATCH, settings["samples"])
    layers = decoder.layers
    blocks = sum(layers - depth + 1 for depth in settings["depths"] or range(1, layers + 1))
    one = rows * positions * decoder.hidden * setup.size
    runs = min(blocks * one, _RUNS)
    tokens = min(_DAMAGE_TOKENS, blocks * rows * positions)
    targets = rows * lengths.longest_text * blocks
    loaded = _loaded(setup)
    return Memory(
        loaded.weights,
        loaded.adapter,
        activations=(layers + 1) * one + runs + tokens * _passing(setup),
        logits=min(2 * 4 * targets * decoder.vocabulary, _RUNS),
    )


def _decoding(setup: _Setup, settings: Any, kept: int, positions: int, lengths: Lengths) -> Memory:
    decoder = setup.decoder
    rows = min(settings["batch_size"], max(1, lengths.utterances))
    new = math.ceil(settings["tokens_per_second"] * lengths.longest) + settings["extra_tokens"]
    a_layer = rows * (positions + new) * decoder.keys * setup.size
    loaded = _loaded(setup)
    return Memory(
        loaded.weights,
        loaded.adapter,
        activations=rows * positions * (_passing(setup) + decoder.hidden * setup.size),
        # A cache grows by copying, one layer at a time.
        cache=a_layer * (kept + 1),
        logits=rows * decoder.vocabulary * (setup.size + 4),
    )


def _encoding(encoder: EncoderShape, seconds: float, longest: float, size: int) -> int:
    """Bytes of a forward pass of an encoder over `seconds` of padded audio."""
    config, frames = encoder.config, seconds * encoder.frame_rate
    inner = config.get("encoder_ffn_dim") or config.get("intermediate_size") or 4 * encoder.width
    total = frames * size * (4 * encoder.width + 2 * int(inner))
    convolutions, strides = config.get("conv_dim"), config.get("conv_stride")
    if isinstance(convolutions, list) and isinstance(strides, list):
        # The first convolution works nearly at the rate of the samples.
        total = max(total, 3 * seconds * 16_000 / strides[0] * convolutions[0] * size)
    if config.get("model_type") in _PAIRWISE:
        heads = int(config.get("num_attention_heads") or 16)
        total += 2 * heads * frames * longest * encoder.frame_rate * size
    return round(total)
