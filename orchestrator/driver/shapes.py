"""What a stage's lease holds: ranks, CPUs, GPUs or a part of one, from the sweep and the cluster."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.connection import Capacity
from cluster.lease import Shape
from orchestrator.driver.retries import TRAINING, Rung
from orchestrator.graph import Node
from orchestrator.resources import Resources

WITHOUT_GPU = ("build",)
MEMORY_ALONE = 0.8
"""Part of a node's memory that a stage declares after it ran out of it, beside all of its CPUs."""


@dataclass(frozen=True)
class Shapes:
    """Shapes of a sweep's jobs.

    Args:
        resources: of the sweep.
        gpus: whether the cluster has any.
        shares: by base model, the part of a GPU its stages fit in; 1 where it isn't known.
    """

    resources: Resources
    gpus: bool
    shares: Mapping[str | None, float]

    def of(self, node: Node, rung: Rung, alone: bool, capacity: Capacity) -> Shape:
        """The lease a stage asks for.

        Args:
            node: the stage.
            rung: of the OOM ladder it stands on.
            alone: whether it ran out of the host's memory, and gets a node to itself.
            capacity: of the cluster now.
        """
        ranks = rung.ranks or (self.resources.ranks if node.kind in TRAINING else 1)
        cpus, memory = self.resources.cpus, 0
        threads = max(1, int(cpus))
        if alone and ranks == 1 and capacity.rooms:
            largest = max(capacity.rooms, key=lambda room: (room.memory, room.cpus))
            cpus = max(cpus, largest.cpus)
            memory = int(MEMORY_ALONE * largest.memory)
        return Shape(ranks, cpus, self._gpus(node, ranks), threads, memory)

    def _gpus(self, node: Node, ranks: int) -> float:
        if not self.gpus or node.kind in WITHOUT_GPU:
            return 0.0
        if self.resources.gpus is not None:
            return self.resources.gpus
        return 1.0 if ranks > 1 else self.shares.get(node.base, 1.0)


def fits(shapes: list[Shape], capacity: Capacity) -> bool:
    """Whether leases of these shapes can stand on the cluster together (largest first, first fit)."""
    free = [[room.cpus, room.gpus, room.memory] for room in capacity.rooms]
    counted = Counter(
        (shape.gpus, shape.cpus, float(shape.memory))
        for shape in shapes
        for _ in range(shape.ranks)
    )
    for (gpus, cpus, memory), count in sorted(counted.items(), reverse=True):
        wanted = (cpus, gpus, memory)
        for room in free:
            while count and all(h >= w - 1e-9 for h, w in zip(room, wanted, strict=True)):
                for i, amount in enumerate(wanted):
                    room[i] -= amount
                count -= 1
        if count:
            return False
    return True


def slots(shape: Shape, capacity: Capacity) -> int:
    """How many leases of one shape the cluster holds at once."""
    per_node = []
    for room in capacity.rooms:
        count = room.cpus / shape.cpus
        if shape.gpus:
            whole = shape.gpus >= 1
            count = min(count, room.gpus / shape.gpus if whole else room.gpus * (1 // shape.gpus))
        per_node.append(int(count + 1e-9))
    return sum(per_node) // shape.ranks
