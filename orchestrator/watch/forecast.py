"""How long a run still takes: the cost model's estimates, corrected by what stages really lasted.

A guess, and shown as one. Nothing is guessed before something has finished.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from orchestrator.graph import Plan
from orchestrator.watch.board import SETTLED, Board

if TYPE_CHECKING:
    from orchestrator.driver import Running

ENOUGH = 3
"""Finished stages of a kind from which it is corrected by its own ratio, not by that of all."""


class Forecast:
    """Time left of one run.

    Args:
        plan: whose longest chain of stages bounds the time from below, however many slots.
        board: the stages' states; is given the estimates.
        estimates: seconds by stage.
    """

    def __init__(self, plan: Plan, board: Board, estimates: Mapping[str, float]) -> None:
        self.board = board
        board.estimate(estimates)
        chain: dict[str, float] = {}
        for node in reversed(plan.nodes.values()):
            seconds = chain.get(node.id, 0.0) + estimates.get(node.id, 0.0)
            chain[node.id] = seconds
            for other in node.dependencies():
                chain[other] = max(chain.get(other, 0.0), seconds)
        self._chain = sorted(chain.items(), key=lambda item: -item[1])
        self._longest = 0
        self._seen = 0
        self._took: defaultdict[str, float] = defaultdict(float)
        self._estimated: defaultdict[str, float] = defaultdict(float)
        self._finished: Counter[str] = Counter()

    def remaining(
        self, took: Mapping[str, float], running: "Sequence[Running]", slots: int
    ) -> float | None:
        """Seconds until all is done; None while there is nothing to guess from.

        Args:
            took: seconds of the stages that finished in this run; only ever grows.
            running: what runs now.
            slots: jobs at once.
        """
        self._learn(took)
        overall = self._overall()
        if not slots or overall is None:
            return None
        left = {
            kind: max(0.0, seconds) * self._ratio(kind, overall)
            for kind, seconds in self.board.left.items()
        }
        for now in running:
            kind = self.board.kind[now.node_id]
            expected = self._expected(now.node_id, overall)
            left[kind] = left.get(kind, 0.0) - min(now.seconds, expected)
        head, chain = self._longest_chain()
        begun = sum(now.seconds for now in running if now.node_id == head)
        return max(sum(left.values()) / slots, chain * overall - begun, 0.0)

    def expected(self, node_id: str) -> float | None:
        """Seconds a stage should last from start to end; None while nothing is known."""
        overall = self._overall()
        return None if overall is None else self._expected(node_id, overall) or None

    def _overall(self) -> float | None:
        estimated = sum(self._estimated.values())
        return sum(self._took.values()) / estimated if estimated else None

    def _expected(self, node_id: str, overall: float) -> float:
        seconds = self.board.estimates.get(node_id, 0.0)
        return seconds * self._ratio(self.board.kind[node_id], overall)

    def _ratio(self, kind: str, overall: float) -> float:
        if self._finished[kind] < ENOUGH or not self._estimated[kind]:
            return overall
        return self._took[kind] / self._estimated[kind]

    def _learn(self, took: Mapping[str, float]) -> None:
        fresh: Iterable[tuple[str, float]] = islice(took.items(), self._seen, None)
        for node_id, seconds in fresh:
            self._seen += 1
            kind = self.board.kind[node_id]
            self._finished[kind] += 1
            self._took[kind] += seconds
            self._estimated[kind] += self.board.estimates.get(node_id, 0.0)

    def _longest_chain(self) -> tuple[str, float]:
        """The longest chain still open: its first stage, and estimated seconds from there on.

        Amortised constant time: what is settled stays settled.
        """
        while self._longest < len(self._chain):
            node_id, seconds = self._chain[self._longest]
            if self.board.state.get(node_id) not in SETTLED:
                return node_id, seconds
            self._longest += 1
        return "", 0.0
