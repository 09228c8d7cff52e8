"""What was tried of every stage, and what its next try is to be."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.connection import Capacity
from cluster.lease import Shape
from orchestrator.driver.retries import (
    GROUND,
    RETRIES,
    Rung,
    budget_class,
    delay,
    higher,
    next_rung,
)
from orchestrator.driver.shapes import Shapes, fits
from orchestrator.graph import Node


@dataclass(frozen=True)
class Again:
    """A stage is to be tried again."""

    delay: float = 0.0
    """Seconds from now."""
    relief: str = ""
    """What is different then."""


class Tries:
    """Attempts, failures and rungs of the OOM ladder of all stages.

    Args:
        shapes: of the sweep's leases.
        most_ranks: that the sweep allows a job that ran out of GPU memory; None: one node's GPUs.
    """

    def __init__(self, shapes: Shapes, most_ranks: int | None) -> None:
        self._shapes, self._most_ranks = shapes, most_ranks
        self.attempts: Counter[str] = Counter()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._rungs: dict[str, Rung] = {}
        self._learnt: dict[tuple[str | None, str], Rung] = {}
        """What stages of a kind on a base needed: the next ones begin there."""
        self._alone: set[str] = set()

    def rung(self, node: Node) -> Rung:
        """Where on the ladder the next try stands."""
        learnt = self._learnt.get((node.base, node.kind), GROUND)
        return higher(self._rungs.get(node.id, GROUND), learnt)

    def shape(self, node: Node, capacity: Capacity) -> Shape:
        """The lease that the next try asks for."""
        return self._shapes.of(node, self.rung(node), node.id in self._alone, capacity)

    def relief(self, node: Node, shape: Shape) -> str:
        """What a try on a lease of this shape does differently to need less memory, for people.

        Siblings may have learnt of more ranks since the lease was asked for: it has those it has.
        """
        rung = self.rung(node)
        if rung.ranks != shape.ranks:
            rung = replace(rung, ranks=0)
        return rung.describe(node.kind, node.params)

    def after(
        self, node: Node, verdict: Mapping[str, Any], shape: Shape, capacity: Capacity
    ) -> Again | None:
        """What follows a failure; None: the stage has failed for good.

        Args:
            node: the stage.
            verdict: of the try that failed.
            shape: of the lease it ran on.
            capacity: of the cluster.
        """
        failure = budget_class(verdict)
        self._failures[node.id, failure] += 1
        tries = self._failures[node.id, failure]
        if failure == "device-oom":
            if not self._climb(node, shape, capacity):
                return None
            return Again(relief=self.rung(node).describe(node.kind, node.params))
        if tries > RETRIES.get(failure, 0):
            return None
        if failure == "host-oom":
            self._alone.add(node.id)
            return Again(relief="alone on a node")
        return Again(delay(failure, tries))

    def _climb(self, node: Node, shape: Shape, capacity: Capacity) -> bool:
        most = self._most_ranks or int(capacity.node_gpus) or 1
        rung = next_rung(node.kind, node.params, self.rung(node), shape.ranks, most)
        if rung is None or not fits([self._shapes.of(node, rung, False, capacity)], capacity):
            return False
        self._rungs[node.id] = rung
        where = (node.base, node.kind)
        self._learnt[where] = higher(self._learnt.get(where, GROUND), rung)
        return True
