"""How long stages take: finished stages of the store say how many seconds a unit of work is.

For each kind the median of seconds to work, from stages of the same model on the same kind of
device where there are some, else from any on it, else from any. Where nothing of a kind was ever
finished, the rough figure of the plan itself stands.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from orchestrator.estimate.lengths import Lengths, lab_lengths, together
from orchestrator.estimate.memory import removed_depth
from orchestrator.estimate.shapes import DecoderShape, EncoderShape
from orchestrator.estimate.subjects import Subjects, lab_decoder, lab_identity
from orchestrator.estimate.work import Task, label, work
from orchestrator.graph import Node, Plan
from orchestrator.store import CorruptArtefact, Store
from workers.lab.catalogue import CATALOGUE

READ_A_KIND = 200
"""Finished stages read of each kind, the newest first."""
ENOUGH = 3
"""Finished stages that a ratio of their own is taken from."""


@dataclass(frozen=True)
class Finished:
    """A finished stage: its kind as times are told apart, its model, device, seconds and work."""

    kind: str
    model: str | None
    device: str
    seconds: float
    work: float | None


@dataclass
class Times:
    """Seconds of every stage of a plan, and what they rest on."""

    seconds: dict[str, float]
    """By node id, on one slot."""
    finished: int
    """Finished stages of the store they were fitted to."""
    measured: dict[str, int] = field(default_factory=dict)
    """Of each kind (as `work.label` names it) in the plan: finished stages its ratio is from; 0:
    only the plan's rough figure."""
    device: str | None = None
    """Where those stages ran."""

    @property
    def basis(self) -> str:
        """For people: `from 214 finished stages`."""
        if not self.finished:
            return "rough: nothing was finished in this store yet"
        rough = [kind for kind, count in self.measured.items() if not count]
        told = f"from {self.finished} finished stages on {self.device}"
        return told + (f"; rough for {', '.join(rough)}" if rough else "")


def stage_seconds(plan: Plan, store: Store) -> dict[str, float]:
    """Seconds of every stage of a plan, by node id."""
    return stage_times(plan, store).seconds


def stage_times(plan: Plan, store: Store, subjects: Subjects | None = None) -> Times:
    """Seconds of every stage of a plan, and what they rest on.

    Args:
        plan: the stages.
        store: its finished stages are read, a few hundred of each kind at most.
        subjects: shapes and lengths, where they have been read already.
    """
    subjects = subjects or Subjects(plan)
    finished = _History(plan, subjects, store).read({node.kind for node in plan.nodes.values()})
    devices = Counter(one.device for one in finished)
    device = devices.most_common(1)[0][0] if devices else None
    ratios = _Ratios(finished, device)
    tasks: dict[Any, float | None] = {}
    seconds: dict[str, float] = {}
    measured: dict[str, int] = {}
    for node in plan.nodes.values():
        kind, model = label(node.kind, node.params), _model(subjects, node)
        ratio, count = ratios.of(kind, model)
        measured[kind] = max(measured.get(kind, 0), count)
        amount = None
        if ratio is not None:
            key = _key(subjects, node, kind)
            if key not in tasks:
                tasks[key] = work(_task(subjects, node))
            amount = tasks[key]
        if ratio is None or amount is None:
            seconds[node.id] = node.cost
        else:
            seconds[node.id] = ratio * amount
    return Times(seconds, len(finished), measured, device)


class _Ratios:
    """Median seconds a unit of work, from the most alike stages that are enough."""

    def __init__(self, finished: list[Finished], device: str | None) -> None:
        groups: dict[Any, list[float]] = defaultdict(list)
        for one in finished:
            if not one.work:
                continue
            ratio = one.seconds / one.work
            groups[one.kind, one.model, one.device].append(ratio)
            groups[one.kind, None, one.device].append(ratio)
            groups[one.kind, None, None].append(ratio)
        self._device = device
        self._found = {key: (median(ratios), len(ratios)) for key, ratios in groups.items()}

    def of(self, kind: str, model: str | None) -> tuple[float | None, int]:
        """The ratio and how many stages it is from."""
        keys = [(kind, model, self._device), (kind, None, self._device), (kind, None, None)]
        found = [self._found[key] for key in keys if key in self._found]
        return next((f for f in found if f[1] >= ENOUGH), found[0] if found else (None, 0))


class _History:
    """Finished stages, described as the plan describes its own."""

    def __init__(self, plan: Plan, subjects: Subjects, store: Store) -> None:
        self.store, self.subjects = store, subjects
        self._builds: dict[str, str | None] = {}
        self._lengths: dict[tuple[str, str | None], Lengths | None] = {}
        self._decoders: dict[str, DecoderShape | None] = {}
        self._depths: dict[str, int] = {}
        self._encoders: dict[str, EncoderShape | None] = {}
        for node in plan.nodes.values():
            if node.kind == "encode":
                identity = subjects.identity(node, "encoder")
                if identity is not None and identity not in self._encoders:
                    self._encoders[identity] = subjects.encoder(node)
            for source in node.sources.values():
                self._note(node, source.fingerprint)

    def read(self, kinds: set[str]) -> list[Finished]:
        """The newest finished stages of some kinds."""
        found = []
        for kind in sorted(kinds):
            for stage in self.store.recent(kind, READ_A_KIND):
                one = self._finished(kind, stage if isinstance(stage, dict) else {})
                if one is not None:
                    found.append(one)
        return found

    def _stage(self, kind: str, key: str) -> dict[str, Any]:
        """`stage.json` of an artefact; empty where it cannot be read."""
        try:
            stage = self.store.stage(kind, key)
        except (OSError, ValueError, CorruptArtefact):
            return {}
        return stage if isinstance(stage, dict) else {}

    def _note(self, node: Node, fingerprint: str) -> None:
        """Remember what the plan knows of a source: stage.json names it by fingerprint alone."""
        if fingerprint in self._decoders or (fingerprint, None) in self._lengths:
            return
        if node.sources.get("decoder") and node.sources["decoder"].fingerprint == fingerprint:
            self._decoders[fingerprint] = self.subjects.decoder(node)
        elif fingerprint.startswith("manifest:"):
            self._lengths[fingerprint, None] = self.subjects.corpus(node, fingerprint, None)

    def _finished(self, kind: str, stage: dict[str, Any]) -> Finished | None:
        try:
            params, provenance = stage["params"], stage["provenance"]
            seconds, device = float(provenance["seconds"]), str(provenance["device"])
            model = self._identity(stage, "encoder" if kind == "encode" else "decoder")
            if kind == "build":
                model = lab_identity(params)
            task = Task(
                kind,
                params,
                self._depth(stage),
                self._data(stage),
                self._decoder(model),
                self._encoders.get(model or ""),
            )
            return Finished(
                label(kind, params), _run_as(model, params), device, seconds, work(task)
            )
        except (KeyError, TypeError, ValueError):
            return None  # written by another version

    def _identity(self, stage: dict[str, Any], role: str) -> str | None:
        source = stage["sources"].get(role)
        if source is not None:
            return str(source)
        kind, key = stage["inputs"].get(role, (None, None))
        if kind != "build":
            return None
        if key not in self._builds:
            built = self._stage(kind, key)
            self._builds[key] = lab_identity(built["params"]) if built else None
        return self._builds[key]

    def _decoder(self, model: str | None) -> DecoderShape | None:
        if model is None:
            return None
        if model not in self._decoders:
            item = CATALOGUE.get(model)
            known = item is not None and item.role == "decoder"
            self._decoders[model] = lab_decoder(model) if known else None
        return self._decoders[model]

    def _depth(self, stage: dict[str, Any]) -> int:
        block = stage["params"].get("block")
        if block:
            return int(block["depth"])
        kind, key = stage["inputs"].get("model", (None, None))
        if kind != "heal":
            return 0
        if key not in self._depths:
            healed = self._stage(kind, key)
            self._depths[key] = self._depth(healed) if healed else 0
        return self._depths[key]

    def _data(self, stage: dict[str, Any]) -> Lengths | None:
        params = stage["params"]
        wanted = params.get("conditions") if stage["kind"] in ("adapt", "heal") else None
        roles = (
            [(e["data"], e["split"]) for e in wanted] if wanted else [("data", params.get("split"))]
        )
        parts = []
        for role, split in roles:
            identity = self._identity(stage, role)
            if identity is None:
                return None
            key = identity, split
            if key not in self._lengths:
                name = identity.partition("/")[0]
                self._lengths[key] = lab_lengths(name, split) if name in CATALOGUE else None
            parts.append(self._lengths[key])
        return together(parts)


def _task(subjects: Subjects, node: Node) -> Task:
    encoder = subjects.encoder(node) if node.kind == "encode" else None
    decoder = None if node.kind in ("encode", "build") else subjects.decoder(node)
    return Task(
        node.kind, node.params, _depth(subjects, node), subjects.lengths(node), decoder, encoder
    )


def _depth(subjects: Subjects, node: Node) -> int:
    above = node.inputs.get("model")
    return removed_depth(subjects.plan.nodes[above] if above else node)


def _key(subjects: Subjects, node: Node, kind: str) -> Any:
    """What a stage's work depends on."""
    settings = node.params.get("settings") or {}
    return (
        kind,
        _model(subjects, node),
        _depth(subjects, node),
        node.params.get("modality"),
        settings.get("steps"),
        settings.get("batch_size"),
        settings.get("samples"),
        str(settings.get("depths")),
        subjects.data(node),
    )


def _model(subjects: Subjects, node: Node) -> str | None:
    if node.kind == "build":
        return _run_as(lab_identity(node.params), node.params)
    role = "encoder" if node.kind == "encode" else "decoder"
    return _run_as(subjects.identity(node, role), node.params)


def _run_as(model: str | None, params: Mapping[str, Any]) -> str | None:
    """A model in the precision it is run in, which its speed depends on."""
    dtype = (params.get("decoder") or params).get("dtype")
    return None if model is None else f"{model} {dtype}"
