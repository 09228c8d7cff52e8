"""In which order ready stages start.

What the sweep puts first, first. Then the stages everything waits for, the longest way to the end
first; then the cells of the results, the cheapest first, so that a report says something early.
"""

from collections.abc import Mapping, Sequence

from orchestrator.graph import Node, Plan
from orchestrator.resources import PriorityEntry

CELLS = ("heal", "evaluate")


class Order:
    """The place of every stage of a plan.

    Args:
        plan: the stages.
        dependents: of each node, those that wait for it.
        seconds: that each stage is expected to take.
        priorities: of the sweep, the first the most urgent.
    """

    def __init__(
        self,
        plan: Plan,
        dependents: Mapping[str, Sequence[str]],
        seconds: Mapping[str, float],
        priorities: Sequence[PriorityEntry],
    ) -> None:
        self._places: dict[str, tuple[int, int, float, int]] = {}
        self.path: dict[str, float] = {}
        """Expected seconds from the start of a stage to the end of the plan."""
        urgency: dict[str, int] = {}
        indices = {node_id: index for index, node_id in enumerate(plan.nodes)}
        for node_id in reversed(plan.nodes):
            node, after = plan.nodes[node_id], dependents[node_id]
            self.path[node_id] = seconds[node_id] + max(
                map(self.path.__getitem__, after), default=0
            )
            # What an urgent cell needs is as urgent.
            urgency[node_id] = min(
                [_urgency(node, priorities), *(urgency[other] for other in after)]
            )
            cell = node.kind in CELLS
            length = seconds[node_id] if cell else -self.path[node_id]
            self._places[node_id] = (urgency[node_id], int(cell), length, indices[node_id])

    def __call__(self, node_id: str) -> tuple[int, int, float, int]:
        """Smaller is earlier."""
        return self._places[node_id]

    def urgency(self, node_id: str) -> int:
        """0 is the most urgent."""
        return self._places[node_id][0]


def _urgency(node: Node, priorities: Sequence[PriorityEntry]) -> int:
    if not node.cell:
        return len(priorities)
    return next(
        (i for i, entry in enumerate(priorities) if entry.covers(node.cell)), len(priorities)
    )
