"""The plan's data: nodes of a DAG of stages, their keys, and the block a node waits to be told."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.keys import stage_key
from orchestrator.sources import Source
from workers.stages import STAGES


@dataclass(frozen=True)
class Choice:
    """How a heal's block is chosen; from maps, once they exist."""

    selector: str
    depth: int
    pool: str
    layers: int
    criterion: str = "angular"
    maps: tuple[str, ...] = ()
    """Ids of the map nodes it is chosen from; empty when it needs none."""
    start: int | None = None
    """For `fixed`."""
    seed: int = 0
    """For `random`."""


@dataclass
class Node:
    """One stage of a plan."""

    id: str
    """Unique in the plan, made for people: `heal/llama+whisper/all/consensus/d4/joint/s0`."""
    kind: str
    params: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    """Node ids by role."""
    sources: dict[str, Source] = field(default_factory=dict)
    """Weights and data from outside the store, by role."""
    choice: Choice | None = None
    """What decides `params["block"]`; None once (or where always) determined."""
    base: str | None = None
    """Node or source the process must hold: the lease's base model."""
    cell: dict[str, Any] = field(default_factory=dict)
    """Labels for the tables: model, encoder, task, … (not part of the identity)."""
    cost: float = 1.0
    """Rough seconds, for ordering."""

    def dependencies(self) -> set[str]:
        """Ids this node waits for."""
        maps = self.choice.maps if self.choice else ()
        return {*self.inputs.values(), *maps}


@dataclass
class Plan:
    """All stages of a sweep, in an order in which every stage follows what it needs."""

    sweep: str
    nodes: dict[str, Node]
    starts: dict[Choice, int] = field(default_factory=dict, repr=False)
    """Blocks chosen so far: modes and encoders share a choice, and its maps are read once."""
    _keys: dict[str, str] = field(default_factory=dict, repr=False)

    def key(self, node_id: str) -> str | None:
        """The node's key; None while a block it depends on is undetermined."""
        known = self._keys.get(node_id)
        if known is not None:
            return known
        node = self.nodes[node_id]
        if node.choice is not None:
            return None
        inputs = {}
        for role, other in node.inputs.items():
            key = self.key(other)
            if key is None:
                return None
            inputs[role] = key
        sources = {role: source.fingerprint for role, source in node.sources.items()}
        key = stage_key(node.kind, STAGES[node.kind].version, node.params, inputs, sources)
        self._keys[node_id] = key
        return key

    def determine(self, node_id: str, start: int | None) -> None:
        """Fix the block of a node that was waiting for its choice."""
        node = self.nodes[node_id]
        assert node.choice is not None
        node.params["block"] = (
            None if start is None else {"start": start, "depth": node.choice.depth}
        )
        node.choice = None

    def dependents(self) -> Mapping[str, list[str]]:
        """For every node, the ids of the nodes that wait for it."""
        table: dict[str, list[str]] = {node_id: [] for node_id in self.nodes}
        for node in self.nodes.values():
            for other in node.dependencies():
                table[other].append(node.id)
        return table

    def by_kind(self, kind: str) -> Iterator[Node]:
        """Nodes of one kind, in plan order."""
        return (node for node in self.nodes.values() if node.kind == kind)
