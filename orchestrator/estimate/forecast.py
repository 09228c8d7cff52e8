"""What the driver is told of a plan's stages before they run: seconds, memory, and parts of a card."""

from collections import defaultdict
from dataclasses import dataclass

from orchestrator.estimate.feasible import GIB
from orchestrator.estimate.memory import card_share, stage_memory
from orchestrator.estimate.seconds import stage_times
from orchestrator.estimate.subjects import Subjects
from orchestrator.graph import Plan
from orchestrator.resources import Resources
from orchestrator.store import Store


@dataclass(frozen=True)
class Forecast:
    """Estimates for the driver."""

    seconds: dict[str, float]
    """By stage; empty: not estimated."""
    needs: dict[str, int]
    """Bytes of GPU memory by stage, where they are known."""
    shares: dict[str | None, float]
    """By base model, the part of a card that its most demanding stage fits in; 1 where one of its
    stages isn't known."""


def forecast_of(plan: Plan, store: Store, resources: Resources, card_bytes: int | None) -> Forecast:
    """Estimate what stages take.

    Args:
        plan: the stages.
        store: for the times of finished stages.
        resources: of the sweep; `gpu_memory_gib` counts before `card_bytes`.
        card_bytes: memory of the cluster's smallest GPU; None: there is none, or it isn't known.
    """
    subjects = Subjects(plan)
    memory = stage_memory(plan, subjects)
    needs = {i: found.total for i, found in memory.items() if found is not None}
    if resources.gpu_memory_gib is not None:
        card_bytes = round(resources.gpu_memory_gib * GIB)
    shares: dict[str | None, float] = {}
    if card_bytes is not None:
        largest: dict[str | None, float] = defaultdict(float)
        for node in plan.nodes.values():
            need = needs.get(node.id, float("inf"))
            largest[node.base] = max(largest[node.base], need)
        shares = {
            base: card_share(int(need), card_bytes) if need < card_bytes else 1.0
            for base, need in largest.items()
        }
    return Forecast(stage_times(plan, store, subjects).seconds, needs, shares)
