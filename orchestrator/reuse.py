"""What a plan would run, what is there already, and why: the store held against the plan."""

import contextlib
import io
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from orchestrator.graph import Node, Plan
from orchestrator.selectors import choose_start
from orchestrator.store import Artefacts, CorruptArtefact, Store

Verdict = Literal["run", "reuse", "undetermined", "unneeded"]
TARGETS = ("evaluate", "map", "damage")
"""Kinds a sweep is run for; the others are made only where one of these needs them."""


@dataclass(frozen=True)
class Assessment:
    """What a plan would do now, by node."""

    verdicts: dict[str, Verdict]
    reasons: dict[str, str]

    def count(self, verdict: Verdict) -> int:
        """How many nodes have this verdict."""
        return sum(v == verdict for v in self.verdicts.values())


def decide(plan: Plan, node: Node, store: Artefacts) -> bool:
    """Determine the node's block if its maps are there.

    Returns:
        Whether the node's block is determined (or it never had a choice).

    Raises:
        CorruptArtefact: a map is not what was written.
        StoreUnreachable: the store is away.
    """
    choice = node.choice
    if choice is None:
        return True
    if choice not in plan.starts:
        tables = []
        for map_id in choice.maps:
            kind, key = plan.nodes[map_id].kind, plan.key(map_id)
            if key is None or not store.has(kind, key):
                return False
            tables.append(pd.read_parquet(io.BytesIO(store.read(kind, key, "map.parquet"))))
        plan.starts[choice] = choose_start(choice, tables)
    plan.determine(node.id, plan.starts[choice])
    return True


def assess(plan: Plan, store: Store) -> Assessment:
    """Hold every node of the plan against the store; determines what blocks it can."""
    verdicts: dict[str, Verdict] = {}
    reasons: dict[str, str] = {}
    known = store.snapshot()
    for node in plan.nodes.values():
        # A damaged map is made anew by a run; here it is as if it were not there yet.
        with contextlib.suppress(CorruptArtefact):
            decide(plan, node, known)
        key = plan.key(node.id)
        if key is None:
            verdicts[node.id] = "undetermined"
            reasons[node.id] = (
                "its block is chosen from maps still to be made"
                if node.choice
                else "waits for a block chosen from maps still to be made"
            )
        elif known.has(node.kind, key):
            verdicts[node.id] = "reuse"
            reasons[node.id] = "in the store"
        else:
            verdicts[node.id] = "run"
            reasons[node.id] = "not in the store"
    dependents = plan.dependents()
    for node_id in reversed(plan.nodes):
        if (
            verdicts[node_id] == "run"
            and plan.nodes[node_id].kind not in TARGETS
            and all(verdicts[other] in ("reuse", "unneeded") for other in dependents[node_id])
        ):
            verdicts[node_id] = "unneeded"
            reasons[node_id] = "all that needs it is in the store"
    return Assessment(verdicts, reasons)
