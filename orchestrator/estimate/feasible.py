"""Which stages have no place on a cluster, and what to change; said before anything waits for ever."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.connection import Capacity
from cluster.lease import Shape
from orchestrator.driver.retries import TRAINING
from orchestrator.driver.shapes import fits as can_stand
from orchestrator.estimate.memory import CONTEXT_BYTES, HEADROOM, Memory, fits
from orchestrator.graph import Node, Plan
from orchestrator.resources import Resources

GIB = 2**30
ROWS = {
    "adapt": "adapt.micro_batch",
    "heal": "heal.micro_batch",
    "evaluate": "evaluate.batch_size",
    "map": "maps.batch_size",
}
"""The setting that says how many utterances a stage of a kind computes at once."""


@dataclass(frozen=True)
class Obstacle:
    """Why some stages cannot be placed."""

    stages: tuple[str, ...]
    problem: str
    where: str
    """Dotted path of the setting that says so."""
    remedy: str


def gpus_a_job(resources: Resources, capacity: Capacity | None) -> float | None:
    """GPUs one job takes; None: depends on whether the cluster, not known here, has any."""
    if resources.gpus is not None:
        return resources.gpus
    return None if capacity is None else float(capacity.gpus > 0)


def obstacles(
    plan: Plan,
    memory: Mapping[str, Memory | None],
    resources: Resources,
    capacity: Capacity | None = None,
    card_bytes: int | None = None,
    only: Collection[str] | None = None,
) -> list[Obstacle]:
    """What keeps stages from being placed; empty where all of them can be.

    Args:
        plan: the stages.
        memory: of each stage, by node id; a stage whose memory is unknown is not held against it.
        resources: what one job takes.
        capacity: the cluster; None: not known, and only the card is looked at.
        card_bytes: memory of one card; None: not known.
        only: the stages that are to run; None: all.
    """
    ids = [node_id for node_id in plan.nodes if only is None or node_id in only]
    if not ids:
        return []
    found = []
    if capacity is not None:
        found += _missing_room(ids, plan, resources, capacity)
    if card_bytes is not None and gpus_a_job(resources, capacity) != 0:
        room = round(card_bytes * min(1.0, gpus_a_job(resources, capacity) or 1.0))
        found += _too_large((plan.nodes[node_id] for node_id in ids), memory, room)
    return found


def _missing_room(
    ids: list[str], plan: Plan, resources: Resources, capacity: Capacity
) -> list[Obstacle]:
    """What no node of the cluster, or the cluster as a whole, can hold."""
    found = []
    if resources.cpus > capacity.node_cpus:
        found.append(
            Obstacle(
                tuple(ids),
                f"a job wants {resources.cpus:g} CPUs, but no node has more than "
                f"{capacity.node_cpus:g}",
                "sweep.resources.cpus",
                "lower it",
            )
        )
    gpus = gpus_a_job(resources, capacity)
    assert gpus is not None
    if gpus > capacity.node_gpus:
        found.append(
            Obstacle(
                tuple(ids),
                f"a job wants {gpus:g} GPUs, but no node has more than {capacity.node_gpus:g}",
                "sweep.resources.gpus",
                "lower it, or set it to 0 to run on CPUs",
            )
        )
    trained = [i for i in ids if plan.nodes[i].kind in TRAINING]
    wide = Shape(resources.ranks, resources.cpus, gpus)
    if not found and trained and not can_stand([wide], capacity):
        found.append(
            Obstacle(
                tuple(trained),
                f"a training job wants {resources.ranks} ranks of {wide.cpus:g} CPUs and "
                f"{wide.gpus:g} GPUs; the cluster has {capacity.cpus:g} and {capacity.gpus:g} in all",
                "sweep.resources.ranks",
                "lower it",
            )
        )
    return found


def _too_large(
    nodes: Iterable[Node], memory: Mapping[str, Memory | None], room: int
) -> list[Obstacle]:
    kinds: dict[str, list[tuple[Memory, Node]]] = defaultdict(list)
    for node in nodes:
        need = memory[node.id]
        if need is not None and need.total and not fits(need.total, room):
            kinds[node.kind].append((need, node))
    found = []
    for kind, large in kinds.items():
        need, node = max(large, key=lambda pair: pair[0].total)
        where, remedy = _remedy(kind, need, node, room)
        found.append(
            Obstacle(
                tuple(one.id for _, one in large),
                f"needs up to {gib(need.total + CONTEXT_BYTES)} with CUDA's context, but "
                f"{gib((1 - HEADROOM) * room)} of the {gib(room)} a job has can be used",
                where,
                remedy,
            )
        )
    return found


def _remedy(kind: str, need: Memory, node: Node, room: int) -> tuple[str, str]:
    """The setting to change, and to what."""
    fixed = need.weights + need.adapter + need.gradients + need.optimizer
    left = (1 - HEADROOM) * room - CONTEXT_BYTES - fixed
    rows, setting = _rows(node.params.get("settings") or {}), ROWS.get(kind)
    if setting is not None and rows:
        each = (need.total - fixed) / rows
        fitting = int(left // each) if each else 0
        if fitting >= 1:
            same = "; the effective batch stays the same" if kind in ("adapt", "heal") else ""
            return f"sweep.{setting}", f"lower it to {fitting}{same}"
    precision = (node.params.get("decoder") or node.params).get("dtype")
    if precision == "float32" and fits(need.total - need.weights // 2, room):
        return "sweep.models[].dtype", "set it to bfloat16: half the weights"
    whole = math.ceil((need.total + CONTEXT_BYTES) / (1 - HEADROOM) / GIB)
    return "sweep.resources", f"use cards of at least {whole} GiB, or spread it over more ranks"


def _rows(settings: Mapping[str, Any]) -> int | None:
    found = settings.get("micro_batch") or settings.get("batch_size")
    return int(found) if found else None


def gib(size: float) -> str:
    """Bytes for people: `3.4 GiB`, `212 MiB`, `40 KiB`."""
    if size >= GIB:
        return f"{size / GIB:.1f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
