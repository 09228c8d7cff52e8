"""What a plan's stages work on: the shapes of their models and the lengths of their data, read once.

A stage names its decoder, encoder and data by role, as a `lab:` build or as a source from outside;
what a heal or an evaluation leaves to its base is looked up there.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.estimate.lengths import (
    Lengths,
    lab_lengths,
    manifest_lengths,
    prompt_tokens,
    together,
)
from orchestrator.estimate.shapes import (
    DecoderShape,
    EncoderShape,
    decoder_shape,
    encoder_shape,
)
from orchestrator.estimate.tensors import hub_shapes, stored_shapes
from orchestrator.graph import Node, Plan
from orchestrator.sources import Source, model_config
from workers.errors import InvalidInput
from workers.lab.catalogue import CATALOGUE
from workers.lab.shapes import DECODERS, ENCODERS, FRAME_RATE, decoder_config

T = TypeVar("T")


class Subjects:
    """Shapes and lengths by stage, each read once.

    Args:
        plan: the stages.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._decoders: dict[str, DecoderShape | None] = {}
        self._encoders: dict[str, EncoderShape | None] = {}
        self._lengths: dict[Any, Lengths | None] = {}
        self._corpora: dict[tuple[str, str | None], Lengths | None] = {}
        self._bases: dict[str, Node | None] = {}

    def identity(self, node: Node, role: str) -> str | None:
        """What a role stands for, the same in every plan; None where there is no such role.

        `lab:llama`, `lab:speech/de`, or the fingerprint of a source.
        """
        source = node.sources.get(role)
        if source is not None:
            return source.fingerprint
        builder = self.plan.nodes.get(node.inputs.get(role, ""))
        return None if builder is None else lab_identity(builder.params)

    def decoder(self, node: Node) -> DecoderShape | None:
        """Shape of the stage's decoder (or released SpeechLLM); None: cannot be read."""
        role = "decoder" if "decoder" in {*node.inputs, *node.sources} else "encoder"
        identity = self.identity(node, role)
        if identity is None:
            return None
        return self._once(
            self._decoders, identity, lambda: _decoder(identity, node.sources.get(role))
        )

    def encoder(self, node: Node) -> EncoderShape | None:
        """Shape of the encoder a stage runs or whose features it reads; None: cannot be read."""
        while node.kind != "encode":
            features = [other for role, other in node.inputs.items() if role.startswith("features")]
            if not features:
                return None
            node = self.plan.nodes[features[0]]
        identity = self.identity(node, "encoder")
        if identity is None:
            return None
        return self._once(
            self._encoders, identity, lambda: _encoder(identity, node.sources.get("encoder"))
        )

    def base(self, node: Node) -> Node | None:
        """The `adapt` or `adopt` stage whose projector, adapter and prompts a stage uses."""
        if node.kind in ("adapt", "adopt"):
            return node
        if node.id not in self._bases:
            above = node.inputs.get("base") or node.inputs.get("model")
            self._bases[node.id] = None if above is None else self.base(self.plan.nodes[above])
        return self._bases[node.id]

    def data(self, node: Node) -> tuple[tuple[str, str | None], ...]:
        """Identity and split of every corpus a stage reads."""
        wanted = node.params.get("conditions") if node.kind in ("adapt", "heal") else None
        roles = (
            [(str(entry["data"]), entry["split"]) for entry in wanted]
            if wanted
            else [("data", node.params.get("split"))]
        )
        found = ((self.identity(node, role), split) for role, split in roles)
        return tuple((identity, split) for identity, split in found if identity is not None)

    def lengths(self, node: Node) -> Lengths | None:
        """Lengths of the data a stage reads, with its prompt; None: it reads none, or unknown."""
        corpora = self.data(node)
        base = self.base(node)
        prompts = (base or node).params.get("prompts")
        key = (corpora, base.id if base else node.kind)

        if key not in self._lengths:
            whole = together([self.corpus(node, *corpus) for corpus in corpora])
            if whole is not None and "decoder" not in (base or node).inputs:
                asked = prompt_tokens(prompts if isinstance(prompts, dict) else None)
                whole = replace(whole, prompt=asked)
            self._lengths[key] = whole
        return self._lengths[key]

    def corpus(self, node: Node, identity: str, split: str | None) -> Lengths | None:
        """Lengths of one split of one corpus that a stage reads; None: unknown."""
        if (identity, split) not in self._corpora:
            name, _, language = identity.partition("/")
            source = next((s for s in node.sources.values() if s.fingerprint == identity), None)
            of = None
            if language and name in CATALOGUE:
                of = lab_lengths(name, split)
            elif source is not None:
                of = manifest_lengths(Path(source.path))
            self._corpora[identity, split] = of
        return self._corpora[identity, split]

    def _once(self, known: dict[Any, T], key: Any, read: Callable[[], T]) -> T:
        if key not in known:
            known[key] = read()
        return known[key]


def lab_identity(params: Any) -> str:
    """What a build stage's parameters stand for: `lab:llama`, `lab:speech/de`."""
    language = params.get("language")
    return f"{params['name']}/{language}" if language else str(params["name"])


def lab_decoder(name: str) -> DecoderShape | None:
    """Shape of a lab decoder."""
    item = CATALOGUE[name]
    return decoder_shape(decoder_config(item.kind, DECODERS[item.size]), None)


def _decoder(identity: str, source: Source | None) -> DecoderShape | None:
    if source is None:
        return lab_decoder(identity) if identity in CATALOGUE else None
    config = _config(source)
    if config is None:
        return None
    shape = decoder_shape(config, stored_shapes(source))
    return shape or decoder_shape(config, hub_shapes(source))


def _encoder(identity: str, source: Source | None) -> EncoderShape | None:
    if source is None:
        item = CATALOGUE.get(identity)
        if item is None or item.role != "encoder":
            return None
        of = ENCODERS[item.kind, item.size]
        return EncoderShape(of.width, of.parameters, FRAME_RATE, {})
    config = _config(source)
    if config is None:
        return None
    return encoder_shape(config, stored_shapes(source) or hub_shapes(source))


def _config(source: Source) -> dict[str, Any] | None:
    try:
        return model_config(source, "")
    except InvalidInput:
        return None
