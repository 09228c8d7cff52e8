"""Stages that could start now, and those that wait for their next try."""

import heapq
import time
from collections import defaultdict
from typing import Any

from cluster.lease import Shape
from orchestrator.driver.order import Order

Where = tuple[str | None, Shape]
"""A queue: the base its stages need in their process, and the lease they ask for."""


class Ready:
    """The queues of ready stages.

    Args:
        order: smaller is earlier.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._queues: dict[Where, list[tuple[Any, str]]] = defaultdict(list)
        self._delayed: list[tuple[float, str]] = []

    def __bool__(self) -> bool:
        """Whether there is any, now or later."""
        return bool(self._delayed) or self.any()

    def any(self) -> bool:
        """Whether one could start now."""
        return any(self._queues.values())

    def add(self, node_id: str, base: str | None, shape: Shape) -> None:
        """Queue a stage."""
        heapq.heappush(self._queues[base, shape], (self._order(node_id), node_id))

    def add_later(self, node_id: str, seconds: float) -> None:
        """Have a stage come back from `due` after a while."""
        self._delayed.append((time.monotonic() + seconds, node_id))

    def due(self) -> list[str]:
        """Take out those whose while is over."""
        if not self._delayed:
            return []
        now = time.monotonic()
        found = [node_id for when, node_id in self._delayed if when <= now]
        self._delayed = [(when, node_id) for when, node_id in self._delayed if when > now]
        return found

    def first(self, base: str | None, shape: Shape) -> str | None:
        """The first stage of a queue."""
        queue = self._queues.get((base, shape))
        return queue[0][1] if queue else None

    def heads(self) -> list[tuple[str, Where]]:
        """The first stage of each queue, in order."""
        firsts = sorted((queue[0], where) for where, queue in self._queues.items() if queue)
        return [(node_id, where) for (_, node_id), where in firsts]

    def take(self, where: Where) -> str:
        """Take the first stage out of a queue."""
        queue = self._queues[where]
        node_id = heapq.heappop(queue)[1]
        if not queue:
            del self._queues[where]
        return node_id

    def remove(self, node_id: str) -> None:
        """Take a stage out, wherever it is."""
        self._delayed = [(when, other) for when, other in self._delayed if other != node_id]
        for where, queue in list(self._queues.items()):
            kept = [entry for entry in queue if entry[1] != node_id]
            if len(kept) != len(queue):
                heapq.heapify(kept)
                self._queues[where] = kept

    def of_shapes(self) -> list[tuple[Shape, list[str]]]:
        """The stages that ask for each lease."""
        return [
            (shape, [node_id for _, node_id in queue])
            for (_, shape), queue in self._queues.items()
            if queue
        ]
