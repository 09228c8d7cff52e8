"""All that is said of a plan before it is run, put together: what `plan` prints and `--json` holds."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.connection import Capacity
from cluster.lease import Shape
from orchestrator.driver.shapes import slots
from orchestrator.estimate.feasible import GIB, Obstacle, gpus_a_job, obstacles
from orchestrator.estimate.memory import Memory, card_share, fits, stage_memory
from orchestrator.estimate.saving import Saving, saving
from orchestrator.estimate.seconds import Times, stage_times
from orchestrator.estimate.subjects import Subjects
from orchestrator.graph import Plan
from orchestrator.planfile import Difference, difference
from orchestrator.resources import Resources
from orchestrator.reuse import Assessment
from orchestrator.store import Store


@dataclass(frozen=True)
class Outlook:
    """What a plan will take."""

    plan: Plan
    assessment: Assessment
    memory: dict[str, Memory | None]
    times: Times
    sharing: Saving
    """In seconds of a job."""
    gpus: dict[str, float] | None
    """GPUs a job, by node id; None: depends on a cluster that is not known."""
    capacity: Capacity | None
    slots: int | None
    """Jobs at once; None: not known without the cluster."""
    obstacles: list[Obstacle]
    difference: Difference | None
    """Against the last plan of the run; None: there is none."""

    @property
    def to_run(self) -> list[str]:
        """Stages that are still to be run."""
        verdicts = self.assessment.verdicts
        return [i for i, verdict in verdicts.items() if verdict in ("run", "undetermined")]

    @property
    def seconds(self) -> float:
        """Of all that is to run, one job at a time."""
        return sum(self.times.seconds[node_id] for node_id in self.to_run)

    @property
    def gpu_seconds(self) -> float | None:
        """Of all that is to run; None: not known without the cluster."""
        if self.gpus is None:
            return None
        return sum(self.times.seconds[i] * self.gpus[i] for i in self.to_run)

    @property
    def longest_chain(self) -> float:
        """Seconds of the longest chain of stages that wait for one another."""
        run, ends = set(self.to_run), dict[str, float]()
        for node in self.plan.nodes.values():
            before = max((ends[other] for other in node.dependencies()), default=0.0)
            ends[node.id] = before + (self.times.seconds[node.id] if node.id in run else 0.0)
        return max(ends.values(), default=0.0)

    @property
    def wall_seconds(self) -> float | None:
        """With as many jobs at once as there is room for; None: not known."""
        if self.slots is None:
            return None
        return max(self.seconds / self.slots, self.longest_chain)

    def largest(self, kind: str | None = None) -> tuple[str, Memory] | None:
        """The stage with the largest memory among those to run, of one kind or all."""
        known = [
            (found.total, node_id)
            for node_id in self.to_run
            if (kind is None or self.plan.nodes[node_id].kind == kind)
            and (found := self.memory[node_id]) is not None
        ]
        if not known:
            return None
        _, node_id = max(known)
        largest = self.memory[node_id]
        assert largest is not None
        return node_id, largest


def look_ahead(
    plan: Plan,
    store: Store,
    assessment: Assessment,
    resources: Resources,
    *,
    capacity: Capacity | None = None,
    last: Mapping[str, Any] | None = None,
) -> Outlook:
    """Estimate what a plan takes.

    Args:
        plan: the stages.
        store: for the times of finished stages.
        assessment: the plan held against the store.
        resources: what one job takes.
        capacity: of the cluster, where it is known.
        last: `plan.json` of the run, where there is one.
    """
    subjects = Subjects(plan)
    memory = stage_memory(plan, subjects)
    times = stage_times(plan, store, subjects)
    card = None if resources.gpu_memory_gib is None else round(resources.gpu_memory_gib * GIB)
    open_ = {i for i, v in assessment.verdicts.items() if v in ("run", "undetermined")}
    return Outlook(
        plan=plan,
        assessment=assessment,
        memory=memory,
        times=times,
        sharing=saving(plan, times.seconds),
        gpus=_gpus(plan, memory, resources, capacity, card),
        capacity=capacity,
        slots=_slots(resources, capacity),
        obstacles=obstacles(plan, memory, resources, capacity, card, open_),
        difference=None if last is None else difference(last, plan),
    )


def _gpus(
    plan: Plan,
    memory: Mapping[str, Memory | None],
    resources: Resources,
    capacity: Capacity | None,
    card: int | None,
) -> dict[str, float] | None:
    a_job = gpus_a_job(resources, capacity)
    if a_job is None:
        return None
    found = {}
    for node_id in plan.nodes:
        need = memory[node_id]
        shared = resources.gpus is None and a_job and card is not None and need is not None
        if shared and need is not None and card is not None and fits(need.total, card):
            found[node_id] = card_share(need.total, card)
        else:
            found[node_id] = a_job
    return found


def _slots(resources: Resources, capacity: Capacity | None) -> int | None:
    if capacity is None:
        # Without an address a run starts Ray on this machine; its GPUs are not looked for here.
        return None if resources.gpus else max(1, int((os.cpu_count() or 1) // resources.cpus))
    shape = Shape(cpus=resources.cpus, gpus=gpus_a_job(resources, capacity) or 0.0)
    return max(1, slots(shape, capacity))
