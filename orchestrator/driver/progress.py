"""How far a plan is: the state of every stage, and what follows when one of them changes.

Knows the graph, the store and the journal. Knows nothing of leases: what is to run is handed on.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from orchestrator.driver.retries import UNREACHABLE_SECONDS
from orchestrator.graph import Plan
from orchestrator.reuse import Assessment, decide
from orchestrator.runs import RunFolder
from orchestrator.store import CorruptArtefact, Store, StoreUnreachable

Event = Callable[[str, str, dict[str, Any]], None]
LONGEST_LOOK_SECONDS = 30.0


class Queue(Protocol):
    """Where stages go that can start."""

    def enqueue(self, node_id: str) -> None:
        """It can start now."""

    def enqueue_later(self, node_id: str, seconds: float) -> None:
        """It may be able to after a while."""

    def dequeue(self, node_id: str) -> None:
        """It cannot any more."""


class Progress:
    """States of the stages of a plan.

    Args:
        plan: the stages.
        store: where artefacts are.
        run: whose journal is written.
        event: told of every change.
        queue: gets what can start.
        state: filled with the state of each node: `waiting`, `ready`, `running`, `done`, `failed`,
            `blocked` or `stopped`.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        run: RunFolder,
        event: Event,
        queue: Queue,
        state: dict[str, str],
    ) -> None:
        self._plan, self._store, self._run, self._event = plan, store, run, event
        self._queue, self.state = queue, state
        self.dependents = plan.dependents()
        self.reused = 0
        self._missing: dict[str, int] = {}
        self._twins: dict[str, list[str]] = defaultdict(list)
        self._in_flight: dict[str, str] = {}
        self._unreachable_since: dict[str, float] = {}

    def begin(self, assessment: Assessment, told: Mapping[str, str | None]) -> None:
        """Take what is there as done, and queue what can start.

        Args:
            assessment: the plan held against the store.
            told: keys, by stage, that the journal has as done already.
        """
        finished = [i for i, v in assessment.verdicts.items() if v in ("reuse", "unneeded")]
        for node_id, node in self._plan.nodes.items():
            self.state[node_id] = "waiting"
            self._missing[node_id] = len(node.dependencies())
        with self._run.noting_many():
            for node_id in finished:
                self._reuse(node_id, noted=told.get(node_id) == self._plan.key(node_id))
        for node_id in finished:
            for other in self.dependents[node_id]:
                self._missing[other] -= 1
        for node_id in self._plan.nodes:
            if self.state[node_id] == "waiting" and self._missing[node_id] == 0:
                self.look_at(node_id)

    def look_at(self, node_id: str) -> None:
        """All it waits for is done: decide its block, find its key, reuse or queue it."""
        node = self._plan.nodes[node_id]
        try:
            if not decide(self._plan, node, self._store):
                assert node.choice is not None
                self.remake(node_id, [m for m in node.choice.maps if not self._is_there(m)])
                return
            key = self._plan.key(node_id)
            assert key is not None
            there = self._store.has(node.kind, key)
        except CorruptArtefact as damaged:
            self._store.discard(damaged.kind, damaged.key)
            self.remake(node_id, self.makers(damaged.kind, damaged.key))
            return
        except StoreUnreachable as error:
            self.wait_for_store(node_id, str(error))
            return
        self._unreachable_since.pop(node_id, None)
        if there:
            self._reuse(node_id)
            self._release(node_id)
        elif self._in_flight.get(key, node_id) != node_id:
            self._twins[key].append(node_id)  # the same work under another name
        else:
            self._in_flight[key] = node_id
            self.queue(node_id)

    def look_again(self, node_id: str) -> None:
        """A while is over: a stage is tried again, or the store looked at again."""
        if node_id in self._unreachable_since:
            self.look_at(node_id)
        else:
            self.queue(node_id)

    def queue(self, node_id: str) -> None:
        """It is ready."""
        self.state[node_id] = "ready"
        self._queue.enqueue(node_id)

    def queue_later(self, node_id: str, seconds: float) -> None:
        """It is ready for another try after a while."""
        self.state[node_id] = "ready"
        self._queue.enqueue_later(node_id, seconds)

    def finish(self, node_id: str) -> None:
        """It is done: what waits for it, or is the same work, comes next."""
        key = self._plan.key(node_id)
        twins: list[str] = []
        if key is not None:
            self._in_flight.pop(key, None)
            twins = self._twins.pop(key, [])
        for twin in twins:
            self.look_at(twin)
        self.state[node_id] = "done"
        self._release(node_id)

    def stop(self, node_id: str, message: str, **detail: Any) -> None:
        """It left before it was done, since the run ends."""
        self.state[node_id] = "stopped"
        self._run.note("stopped", id=node_id, message=message, **detail)
        self._event("stopped", node_id, {"message": message})

    def fail(self, node_id: str, failure: str, message: str, **detail: Any) -> None:
        """It has failed for good: what waits for it is blocked."""
        self.state[node_id] = "failed"
        told = {"class": failure, "message": message}
        self._run.note("failed", id=node_id, **told, **detail)
        self._event("failed", node_id, told)
        self._block_after(node_id, f"needs {node_id}, which failed")
        key = self._plan.key(node_id)
        if key is not None and self._in_flight.get(key) == node_id:
            del self._in_flight[key]
            for twin in self._twins.pop(key, []):
                self.fail(twin, failure, message)

    def _reuse(self, node_id: str, noted: bool = False) -> None:
        self.state[node_id] = "done"
        self.reused += 1
        if not noted:
            self._run.note("done", id=node_id, key=self._plan.key(node_id), reused=True)

    def _release(self, node_id: str) -> None:
        for other in self.dependents[node_id]:
            self._missing[other] -= 1
            if self._missing[other] == 0 and self.state[other] == "waiting":
                self.look_at(other)

    def _block_after(self, node_id: str, message: str) -> None:
        stack = list(self.dependents[node_id])
        while stack:
            other = stack.pop()
            if self.state[other] in ("waiting", "ready"):
                if self.state[other] == "ready":
                    self._take_back(other)
                self.state[other] = "blocked"
                self._run.note("blocked", id=other, message=message)
                self._event("blocked", other, {"message": message})
                stack.extend(self.dependents[other])

    # --- a store that lost something, or is away ---------------------------------------------

    def makers(self, kind: str, key: str) -> list[str]:
        """The stages that make an artefact."""
        return [n.id for n in self._plan.by_kind(kind) if self._plan.key(n.id) == key]

    def remake(self, node_id: str, makers: list[str]) -> None:
        """Make inputs of a stage anew; it, and all that is not yet at work, waits for them."""
        lost = [maker for maker in makers if self.state[maker] in ("failed", "blocked")]
        if lost or not makers:
            needs = f"needs {lost[0]}, which failed" if lost else "an input is gone from the store"
            self.fail(node_id, "invalid", needs)
            return
        self._forget(node_id)
        self.state[node_id] = "waiting"
        self._missing[node_id] = sum(node_id in self.dependents[maker] for maker in makers)
        again = [maker for maker in makers if self.state[maker] == "done"]
        for maker in again:
            self.state[maker] = "waiting"
            for other in self.dependents[maker]:
                if other == node_id:
                    continue
                if self.state[other] == "ready":
                    self._take_back(other)
                    self.state[other], self._missing[other] = "waiting", 0
                if self.state[other] == "waiting":
                    self._missing[other] += 1
        for maker in again:
            self.look_at(maker)

    def wait_for_store(self, node_id: str, message: str) -> None:
        """The store cannot be reached: that is no failure, until it has lasted too long."""
        now = time.monotonic()
        first = not self._unreachable_since
        since = self._unreachable_since.setdefault(node_id, now)
        if now - since > UNREACHABLE_SECONDS:
            self.fail(node_id, "transient", message)
            return
        if first:
            self._run.note("waiting", message=message)
            self._event("waiting", "", {"message": message})
        self._forget(node_id)
        self.queue_later(node_id, min(LONGEST_LOOK_SECONDS, 1.0 + (now - since) / 2))

    def _is_there(self, node_id: str) -> bool:
        key = self._plan.key(node_id)
        return key is not None and self._store.has(self._plan.nodes[node_id].kind, key)

    def _take_back(self, node_id: str) -> None:
        self._forget(node_id)
        self._queue.dequeue(node_id)

    def _forget(self, node_id: str) -> None:
        key = self._plan.key(node_id)
        if key is not None and self._in_flight.get(key) == node_id:
            del self._in_flight[key]
