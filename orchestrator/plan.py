"""From a sweep to a plan: which stages, on what, with what shared.

Every refusal that needs no job to run happens here, with the path of the key in the sweep file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.graph import Choice, Node, Plan
from orchestrator.named import Cell, Corpus, Decoder, Names
from orchestrator.sources import (
    DigestCache,
    Source,
)
from orchestrator.sweep import EncoderEntry, SelectorEntry, Sweep, TestSet
from workers.config import Condition, HealMode, MapSettings

OWN_ENCODER = "own"
"""What tables call the encoder of a released SpeechLLM."""


def build_plan(sweep: Sweep, base: Path, digests: DigestCache) -> Plan:
    """Lay out every stage of a sweep.

    Args:
        sweep: what the user asked for.
        base: folder that relative paths in the sweep start from.
        digests: remembered digests of local files.

    Raises:
        InvalidInput: missing folders or data, a depth the decoder does not have, a language the
            data does not have; with the dotted path of the key.
    """
    plan = _Layout(sweep, base, digests).lay_out()
    digests.save()
    return plan


@dataclass(frozen=True)
class _HealPorts:
    """What heals of a group read, the same for every block, mode and seed."""

    conditions: list[dict[str, Any]]
    inputs: dict[str, str]
    sources: dict[str, Source]


class _Layout:
    def __init__(self, sweep: Sweep, base: Path, digests: DigestCache) -> None:
        self.sweep, self.base, self.digests = sweep, base, digests
        self.nodes: dict[str, Node] = {}
        # Parameters that thousands of nodes have in common are one object, which none of them changes.
        self.heal_settings = sweep.heal.model_dump(exclude={"modes"})
        self.decode_settings = sweep.evaluate.model_dump()
        self.conditions = {c.label: c.model_dump() for c in sweep.conditions()}
        self.decoders: dict[tuple[str, bool], dict[str, Any]] = {}

    def lay_out(self) -> Plan:
        names = Names(self.sweep, self.base, self.digests, self._add)
        decoders = [
            names.decoder(entry, f"sweep.models[{i}]") for i, entry in enumerate(self.sweep.models)
        ]
        cells = names.all_cells()
        encoders = [
            (entry, *names.encoder(entry, f"sweep.encoders[{i}]"))
            for i, entry in enumerate(self.sweep.encoders)
        ]
        for decoder in decoders:
            self._model(decoder, [_own_encoder(decoder)] if decoder.released else encoders, cells)
        return Plan(self.sweep.name, self.nodes)

    def _add(self, node: Node) -> str:
        self.nodes.setdefault(node.id, node)
        return node.id

    def _features(
        self,
        decoder: Decoder,
        entry: EncoderEntry,
        node: str | None,
        source: Source | None,
        corpus: Corpus,
    ) -> str:
        inputs, sources = _ports(("encoder", node, source), ("data", corpus.node, corpus.source))
        own = decoder.released
        return self._add(
            Node(
                id=f"encode/{_who(decoder, entry) if own else entry.name}/{corpus.label}",
                kind="encode",
                params={
                    "split": corpus.split,
                    "dtype": entry.dtype,
                    "trust_remote_code": entry.trust_remote_code,
                    **({"speechllm": True} if own else {}),
                },
                inputs=inputs,
                sources=sources,
                base=_identity(decoder) if own else None,
                cost=5.0,
            )
        )

    def _model(
        self,
        decoder: Decoder,
        encoders: Sequence[tuple[EncoderEntry, str | None, Source | None]],
        cells: Sequence[Cell],
    ) -> None:
        """All stages of one decoder."""
        sweep = self.sweep
        if sweep.maps.text:
            for cell in cells:
                self._map(decoder, None, cell, "text", None, None)
        speech_maps: dict[tuple[str, str], str] = {}
        damages: dict[tuple[str, str], str] = {}
        bases: dict[tuple[str, str], str] = {}
        features: dict[tuple[str, str], str] = {}
        for entry, node, source in encoders:
            for cell in cells:
                for corpus in (cell.train, cell.dev, *(c for _, c in cell.tests)):
                    features[entry.name, corpus.label] = self._features(
                        decoder, entry, node, source, corpus
                    )
            groups = [list(cells)] if sweep.share.base else [[cell] for cell in cells]
            for group in groups:
                if decoder.released:
                    base = self._adopt(decoder, entry, group)
                else:
                    base = self._adapt(decoder, entry, group, features)
                for cell in group:
                    label = cell.condition.label
                    bases[entry.name, label] = base
                    if sweep.maps.text:
                        self._map(decoder, entry, cell, "text", base, None)
                    speech = (decoder, entry, cell, "speech", base)
                    heard = features[entry.name, cell.dev.label]
                    speech_maps[entry.name, label] = self._map(*speech, heard)
                    if sweep.maps.damage is not None:
                        damages[entry.name, label] = self._map(*speech, heard, "damage")
        for entry, _, _ in encoders:
            groups = [list(cells)] if sweep.share.heal else [[cell] for cell in cells]
            for group in groups:
                base = bases[entry.name, group[0].condition.label]
                self._heals(decoder, entry, group, base, speech_maps, damages, features)

    def _conditions(
        self,
        entry: EncoderEntry,
        group: Sequence[Cell],
        features: dict[tuple[str, str], str],
    ) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, Source]]:
        """Training conditions of a group as params, with the inputs they name."""
        listed, inputs, sources = [], {}, {}
        roles: dict[str, str] = {}
        for cell in group:
            corpus = cell.train
            number = roles.setdefault(corpus.label, str(len(roles)))
            ported = _ports(
                (f"data{number}", corpus.node, corpus.source),
                (f"features{number}", features[entry.name, corpus.label], None),
            )
            inputs.update(ported[0])
            sources.update(ported[1])
            listed.append(
                {
                    **cell.condition.model_dump(),
                    "data": f"data{number}",
                    "features": f"features{number}",
                    "split": corpus.split,
                }
            )
        return listed, inputs, sources

    def _decoder_params(self, decoder: Decoder, *, adapted: bool = True) -> dict[str, Any]:
        known = self.decoders.get((decoder.entry.name, adapted))
        if known is not None:
            return known
        params: dict[str, Any] = {
            "dtype": decoder.entry.dtype,
            "trust_remote_code": decoder.entry.trust_remote_code,
        }
        if decoder.released:
            params["speechllm"] = True
        if decoder.own_adapter and not adapted:
            params["own_adapter"] = False
        self.decoders[decoder.entry.name, adapted] = params
        return params

    def _prompts(self, decoder: Decoder) -> dict[str, Any]:
        # A released SpeechLLM always uses its own chat template.
        return self.sweep.prompts.model_dump(exclude={"chat"} if decoder.released else None)

    def _adopt(self, decoder: Decoder, entry: EncoderEntry, group: Sequence[Cell]) -> str:
        """A released SpeechLLM as it is: nothing is trained, so no data count."""
        inputs, sources = _ports(("decoder", decoder.node, decoder.source))
        what = "all" if self.sweep.share.base else group[0].condition.label
        return self._add(
            Node(
                id=f"adopt/{_who(decoder, entry)}/{what}",
                kind="adopt",
                params={
                    "decoder": self._decoder_params(decoder),
                    "prompts": self._prompts(decoder),
                    "lora": self.sweep.adapt.lora.model_dump(),
                    "seed": self.sweep.adapt.seed,
                    "conditions": [cell.condition.model_dump() for cell in group],
                },
                inputs=inputs,
                sources=sources,
                base=_identity(decoder),
                cost=2.0,
            )
        )

    def _adapt(
        self,
        decoder: Decoder,
        entry: EncoderEntry,
        group: Sequence[Cell],
        features: dict[tuple[str, str], str],
    ) -> str:
        conditions, inputs, sources = self._conditions(entry, group, features)
        ported = _ports(("decoder", decoder.node, decoder.source))
        what = "all" if self.sweep.share.base else group[0].condition.label
        return self._add(
            Node(
                id=f"adapt/{decoder.entry.name}+{entry.name}/{what}",
                kind="adapt",
                params={
                    "decoder": self._decoder_params(decoder),
                    "projector": entry.projector.model_dump(),
                    "prompts": self.sweep.prompts.model_dump(),
                    "settings": self.sweep.adapt.model_dump(),
                    "conditions": conditions,
                },
                inputs={**inputs, **ported[0]},
                sources={**sources, **ported[1]},
                base=_identity(decoder),
                cost=self.sweep.adapt.steps * 0.25,
            )
        )

    def _map(
        self,
        decoder: Decoder,
        entry: EncoderEntry | None,
        cell: Cell,
        modality: str,
        base: str | None,
        features: str | None,
        kind: Literal["map", "damage"] = "map",
    ) -> str:
        """A stage that measures every block under one condition."""
        maps = self.sweep.maps
        if kind == "map":
            settings = maps.model_dump(mode="json", include=set(MapSettings.model_fields))
        else:
            assert maps.damage is not None
            settings = maps.damage.model_dump(mode="json")
        ported = _ports(
            ("decoder", decoder.node, decoder.source),
            ("data", cell.dev.node, cell.dev.source),
        )
        inputs, sources = ported
        if base is not None:
            inputs["base"] = base
        if features is not None:
            inputs["features"] = features
        condition = cell.condition
        who = decoder.entry.name if entry is None else f"{decoder.entry.name}+{entry.name}"
        return self._add(
            Node(
                id=f"{kind}/{who}/{condition.label}/{modality}",
                kind=kind,
                params={
                    "decoder": self._decoder_params(decoder, adapted=base is not None),
                    "condition": condition.model_dump(),
                    "modality": modality,
                    "split": cell.dev.split,
                    "settings": settings,
                    # With a base, its prompts count, and they are part of its key.
                    "prompts": None if base else self._prompts(decoder),
                },
                inputs=inputs,
                sources=sources,
                base=_identity(decoder, adapted=base is not None),
                cell={
                    "model": decoder.entry.name,
                    "encoder": entry.name if entry else None,
                    **condition.model_dump(),
                    "modality": modality,
                    "adapted": base is not None,
                    "layers": decoder.layers,
                },
                cost=2.0 if kind == "map" else 6.0,
            )
        )

    def _heals(
        self,
        decoder: Decoder,
        entry: EncoderEntry,
        group: Sequence[Cell],
        base: str,
        speech_maps: dict[tuple[str, str], str],
        damages: dict[tuple[str, str], str],
        features: dict[tuple[str, str], str],
    ) -> None:
        sweep = self.sweep
        own = [(entry.name, cell.condition.label) for cell in group]
        ports = self._heal_ports(decoder, entry, group, base, features)
        for depth in sweep.depths:
            for selector in sweep.selectors if depth else [None]:
                random_block = selector is not None and selector.selector == "random"
                choices: dict[int, Choice | None] = dict.fromkeys(sweep.seeds)
                if selector is not None:
                    source = damages if selector.criterion == "damage" else speech_maps
                    read = {"own": own, "consensus": list(source)}
                    maps = tuple(source[name] for name in read.get(selector.selector, ()))
                    choices = self._choices(selector, depth, decoder.layers, maps)
                for mode in sweep.heal.modes:
                    for seed in sweep.seeds:
                        if mode == "none" and not random_block and seed != sweep.seeds[0]:
                            continue  # nothing in it depends on a seed
                        shown_seed = None if mode == "none" and not random_block else seed
                        self._heal(
                            decoder, entry, group, ports[mode != "none"], features, depth,
                            choices[seed], selector, mode, seed, shown_seed,
                        )  # fmt: skip

    def _choices(
        self, selector: SelectorEntry, depth: int, layers: int, maps: tuple[str, ...]
    ) -> dict[int, Choice | None]:
        """How each seed's block is chosen; all seeds share one choice unless the block is drawn."""
        if selector.selector == "random":
            return {
                seed: self._choice(selector, depth, layers, maps, seed) for seed in self.sweep.seeds
            }
        return dict.fromkeys(self.sweep.seeds, self._choice(selector, depth, layers, maps, 0))

    def _choice(
        self,
        selector: SelectorEntry,
        depth: int,
        layers: int,
        maps: tuple[str, ...],
        seed: int,
    ) -> Choice:
        return Choice(
            selector=selector.selector,
            depth=depth,
            pool=self.sweep.maps.pool_of(selector.criterion),
            layers=layers,
            criterion=selector.criterion,
            maps=maps,
            start=selector.start,
            seed=seed,
        )

    def _heal_ports(
        self,
        decoder: Decoder,
        entry: EncoderEntry,
        group: Sequence[Cell],
        base: str,
        features: dict[tuple[str, str], str],
    ) -> tuple[_HealPorts, _HealPorts]:
        """What heals of a group read: those that train nothing, and the others."""
        inputs, sources = _ports(("decoder", decoder.node, decoder.source))
        inputs["base"] = base
        conditions, more_inputs, more_sources = self._conditions(entry, group, features)
        return (
            _HealPorts([], inputs, sources),
            _HealPorts(conditions, {**inputs, **more_inputs}, {**sources, **more_sources}),
        )

    def _heal(
        self,
        decoder: Decoder,
        entry: EncoderEntry,
        group: Sequence[Cell],
        ports: _HealPorts,
        features: dict[tuple[str, str], str],
        depth: int,
        choice: Choice | None,
        selector: SelectorEntry | None,
        mode: HealMode,
        seed: int,
        shown_seed: int | None,
    ) -> None:
        sweep = self.sweep
        params: dict[str, Any] = {
            "decoder": self._decoder_params(decoder),
            "mode": mode,
            "block": None,
        }
        cost = 0.5
        if mode != "none":
            params |= {
                "settings": self.heal_settings,
                "seed": seed,
                "conditions": ports.conditions,
            }
            cost = sweep.heal.steps * 0.25
        what = "all" if sweep.share.heal else group[0].condition.label
        who = f"{decoder.entry.name}+{entry.name}/{what}"
        chosen = f"{selector.label}/d{depth}" if selector else "d0"
        tail = f"{chosen}/{mode}" + ("" if shown_seed is None else f"/s{shown_seed}")
        heal = self._add(
            Node(
                id=f"heal/{who}/{tail}",
                kind="heal",
                params=params,
                inputs=ports.inputs,
                sources=ports.sources,
                choice=choice,
                base=_identity(decoder),
                cost=cost,
            )
        )
        for cell in group:
            for test, corpus in cell.tests:
                self._evaluate(
                    decoder, entry, cell.condition, test, corpus, heal,
                    features[entry.name, corpus.label], tail,
                    {
                        "selector": selector.label if selector else None,
                        "depth": depth,
                        "heal": mode,
                        "seed": shown_seed,
                    },
                )  # fmt: skip

    def _evaluate(
        self,
        decoder: Decoder,
        entry: EncoderEntry,
        condition: Condition,
        test: TestSet,
        corpus: Corpus,
        heal: str,
        features: str,
        tail: str,
        labels: dict[str, Any],
    ) -> None:
        inputs, sources = _ports(
            ("decoder", decoder.node, decoder.source), ("data", corpus.node, corpus.source)
        )
        inputs |= {"model": heal, "features": features}
        self._add(
            Node(
                id=f"evaluate/{decoder.entry.name}+{entry.name}/{condition.label}/{test.name}/{tail}",
                kind="evaluate",
                params={
                    "decoder": self._decoder_params(decoder),
                    "condition": self.conditions[condition.label],
                    "split": corpus.split,
                    "settings": self.decode_settings,
                },
                inputs=inputs,
                sources=sources,
                base=_identity(decoder),
                cell={
                    "model": decoder.entry.name,
                    "encoder": entry.name,
                    **self.conditions[condition.label],
                    "test_set": test.name,
                    "in_domain": test.in_domain,
                    "layers": decoder.layers,
                    **labels,
                },
                cost=0.5,
            )
        )


def _own_encoder(decoder: Decoder) -> tuple[EncoderEntry, str | None, Source | None]:
    entry = decoder.entry
    own = EncoderEntry(
        encoder=entry.reference,
        name=OWN_ENCODER,
        dtype=entry.dtype,
        trust_remote_code=entry.trust_remote_code,
    )
    return own, decoder.node, decoder.source


def _who(decoder: Decoder, entry: EncoderEntry) -> str:
    return f"{decoder.entry.name}+{entry.name}"


def _identity(decoder: Decoder, *, adapted: bool = True) -> str:
    """What a process must hold; without a model's own adapter it is another base."""
    if decoder.node is not None:
        return f"{decoder.node}:{decoder.entry.dtype}"
    assert decoder.source is not None
    identity = f"{decoder.source.fingerprint}:{decoder.entry.dtype}"
    return f"{identity}:plain" if decoder.own_adapter and not adapted else identity


def _ports(
    *roles: tuple[str, str | None, Source | None],
) -> tuple[dict[str, str], dict[str, Source]]:
    """Inputs and sources of a node, from (role, node id or None, source or None)."""
    inputs = {role: node for role, node, _ in roles if node is not None}
    sources = {role: source for role, node, source in roles if node is None and source is not None}
    return inputs, sources
