"""What sharing saves: the plan against one process for each result that does everything itself."""

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.graph import Plan


@dataclass(frozen=True)
class Saving:
    """Amounts (seconds, or GPU-seconds) with and without sharing."""

    cells: int
    """Evaluations: each is one cell of the results."""
    alone: float
    """If each cell ran by itself all that it needs: encode, adapt, map, heal, evaluate."""
    shared: float
    """The same work, each distinct stage once."""

    @property
    def saved(self) -> float:
        """What sharing saves."""
        return max(0.0, self.alone - self.shared)


def saving(plan: Plan, amounts: Mapping[str, float]) -> Saving:
    """Reckon what a whole sweep takes with and without sharing, whatever of it is done already.

    Lab builds stand for downloads and count once either way; loading the model anew for each cell,
    which sharing saves too, does not count.

    Args:
        plan: the stages.
        amounts: of each stage, by node id.
    """
    above: dict[str, frozenset[str]] = {}
    totals: dict[str, float] = {}
    unions: dict[frozenset[str], frozenset[str]] = {}
    needed: set[str] = set()
    alone, cells = 0.0, 0
    for node in plan.nodes.values():
        direct = frozenset(i for i in node.dependencies() if plan.nodes[i].kind != "build")
        if node.kind != "evaluate":
            if direct not in unions:
                unions[direct] = direct.union(*(above[other] for other in direct))
            above[node.id] = unions[direct]
            continue
        model = node.inputs["model"]
        if model not in totals:
            totals[model] = amounts[model] + sum(amounts[other] for other in above[model])
        more = direct.union(*(above[other] for other in direct if other != model))
        more -= above[model]
        cells += 1
        alone += totals[model] + amounts[node.id] + sum(amounts[i] for i in more if i != model)
        needed |= more
        needed.add(node.id)
    needed = needed.union(*(above[model] for model in totals))
    distinct = {plan.key(node_id) or node_id: amounts[node_id] for node_id in needed}
    return Saving(cells, alone, sum(distinct.values()))
