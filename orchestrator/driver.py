"""The driver: one process, one loop, that brings a plan's stages to leases and owns every retry.

It holds no tensors. What is done is in the store; the journal only tells the story.
"""

import heapq
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.lease import CallFailed, Lease, LeaseLost, Shape, answer, wait
from orchestrator.graph import Plan
from orchestrator.reuse import Assessment, assess, decide
from orchestrator.runs import RunFolder
from orchestrator.store import Store

TARGET = "orchestrator.attempt:run_attempt"
RETRIES = {"preempted": 5, "host-oom": 2, "transient": 3}
"""Further tries after a failure of each class; every other class gets none."""
BACKOFF_SECONDS = 2.0
POLL_SECONDS = 0.5


class Listener(Protocol):
    """Whoever watches a run."""

    def event(self, name: str, node_id: str, detail: dict[str, Any]) -> None:
        """A stage changed state: `start`, `done`, `retry`, `failed` or `blocked`."""

    def tick(self, driver: "Driver") -> None:
        """Called about twice a second."""


@dataclass
class Outcome:
    """How a run ended."""

    done: int
    reused: int
    failed: list[str]
    blocked: list[str]
    interrupted: bool = False

    @property
    def complete(self) -> bool:
        """Whether every stage is done."""
        return not (self.failed or self.blocked or self.interrupted)


@dataclass
class Slot:
    """Room for one lease, the lease in it, and what that does."""

    lease: Lease | None = None
    base: str | None = None
    node_id: str | None = None
    reference: Any = None
    started: float = 0.0


@dataclass
class Driver:
    """Runs a plan.

    Args:
        plan: the stages.
        store: where artefacts go.
        run: the run folder (locked by the caller).
        shape: what one job takes.
        slots: jobs at once.
        provenance: written into every stage (the commit, the user's version of this program).
        listener: whoever watches.
        assessment: the plan held against the store, where that is known already.
        checkpoint_seconds: how often a training job keeps what it needs to go on; None: never.
    """

    plan: Plan
    store: Store
    run: RunFolder
    shape: Shape
    slots: int
    provenance: dict[str, Any]
    listener: Listener
    assessment: Assessment | None = None
    checkpoint_seconds: float | None = None
    state: dict[str, str] = field(default_factory=dict)
    """Per node: `waiting`, `ready`, `running`, `done`, `failed` or `blocked`."""
    model_loads: int = 0

    def __post_init__(self) -> None:
        self._dependents = self.plan.dependents()
        self._missing: dict[str, int] = {}
        self._ready: dict[str | None, list[tuple[float, int, str]]] = defaultdict(list)
        self._order = {node_id: index for index, node_id in enumerate(self.plan.nodes)}
        self._delayed: list[tuple[float, str]] = []
        self._attempts: Counter[str] = Counter()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._twins: dict[str, list[str]] = defaultdict(list)
        self._in_flight: dict[str, str] = {}
        self._slots = [Slot() for _ in range(self.slots)]
        self._reused = 0
        self._path = self._critical_path()

    # --- the loop ------------------------------------------------------------------------

    def execute(self) -> Outcome:
        """Run until nothing more can be done.

        A `KeyboardInterrupt` ends every lease and returns what was done so far.
        """
        interrupted = False
        self.run.note("begin", nodes=len(self.plan.nodes))
        try:
            self._begin()
            while self._unfinished():
                self._wake_delayed()
                self._launch()
                self._collect()
                self.listener.tick(self)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            for slot in self._slots:
                self._close(slot)
        outcome = Outcome(
            done=sum(state == "done" for state in self.state.values()),
            reused=self._reused,
            failed=[i for i, state in self.state.items() if state == "failed"],
            blocked=[i for i, state in self.state.items() if state == "blocked"],
            interrupted=interrupted,
        )
        self.run.note(
            "end",
            done=outcome.done,
            failed=len(outcome.failed),
            blocked=len(outcome.blocked),
            interrupted=interrupted,
        )
        return outcome

    def running(self) -> list[tuple[str, float, str]]:
        """What runs now: node, seconds so far, log (file or URL)."""
        return [
            (s.node_id, time.monotonic() - s.started, self._log(s.node_id, self._attempts[s.node_id]))
            for s in self._slots
            if s.node_id is not None
        ]  # fmt: skip

    def _begin(self) -> None:
        self.assessment = self.assessment or assess(self.plan, self.store)
        finished = [i for i, v in self.assessment.verdicts.items() if v in ("reuse", "unneeded")]
        for node_id, node in self.plan.nodes.items():
            self.state[node_id] = "waiting"
            self._missing[node_id] = len(node.dependencies())
        for node_id in finished:
            self.state[node_id] = "done"
            self._reused += 1
            self.run.note("done", id=node_id, key=self.plan.key(node_id), reused=True)
        for node_id in finished:
            for other in self._dependents[node_id]:
                self._missing[other] -= 1
        for node_id in self.plan.nodes:
            if self.state[node_id] == "waiting" and self._missing[node_id] == 0:
                self._make_ready(node_id)

    def _unfinished(self) -> bool:
        return bool(self._delayed or any(self._ready.values()) or self._busy())

    def _busy(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.node_id is not None]

    # --- ready ---------------------------------------------------------------------------

    def _make_ready(self, node_id: str) -> None:
        """All it waits for is done: decide its block, find its key, reuse or queue it."""
        node = self.plan.nodes[node_id]
        if not decide(self.plan, node, self.store):
            message = "a map it chooses its block from is gone from the store; run again"
            self._fail(node_id, {"class": "invalid", "message": message})
            return
        key = self.plan.key(node_id)
        assert key is not None
        if self.store.has(node.kind, key):
            self._reused += 1
            self.run.note("done", id=node_id, key=key, reused=True)
            self._finish(node_id)
        elif key in self._in_flight:
            self._twins[key].append(node_id)  # the same work under another name
        else:
            self._in_flight[key] = node_id
            self._queue(node_id)

    def _queue(self, node_id: str) -> None:
        self.state[node_id] = "ready"
        entry = (-self._path[node_id], self._order[node_id], node_id)
        heapq.heappush(self._ready[self.plan.nodes[node_id].base], entry)

    def _wake_delayed(self) -> None:
        now = time.monotonic()
        due = [node_id for when, node_id in self._delayed if when <= now]
        self._delayed = [(when, node_id) for when, node_id in self._delayed if when > now]
        for node_id in due:
            self._queue(node_id)

    def _critical_path(self) -> dict[str, float]:
        """Longest chain of rough seconds from each node to the end of the plan."""
        length: dict[str, float] = {}
        for node_id in reversed(self.plan.nodes):
            after = max((length[other] for other in self._dependents[node_id]), default=0.0)
            length[node_id] = self.plan.nodes[node_id].cost + after
        return length

    # --- launching -----------------------------------------------------------------------

    def _launch(self) -> None:
        for slot in self._slots:
            if slot.node_id is not None:
                continue
            base = self._next_base(slot)
            queue = self._ready.get(base)
            if not queue:
                continue
            _, _, node_id = heapq.heappop(queue)
            self._start(slot, node_id)

    def _next_base(self, slot: Slot) -> str | None:
        """Whose queue the slot serves next: its own base's or work without one, else the longest."""
        queues = {base: queue for base, queue in self._ready.items() if queue}
        fitting = {b: q for b, q in queues.items() if b is None or b == slot.base}
        pool = fitting if fitting and slot.base is not None else queues
        return min(pool, key=lambda base: pool[base][0], default=None)

    def _start(self, slot: Slot, node_id: str) -> None:
        node = self.plan.nodes[node_id]
        if slot.lease is not None and node.base is not None and slot.base not in (None, node.base):
            self._close(slot)
        if slot.lease is None:
            slot.lease = Lease(self.shape)
        if node.base is not None and slot.base is None:
            slot.base = node.base
            self.model_loads += 1
        self._attempts[node_id] += 1
        attempt = self._attempts[node_id]
        key, log = self.plan.key(node_id), self._log(node_id, attempt)
        payload = {
            "id": node_id,
            "kind": node.kind,
            "key": key,
            "params": node.params,
            "inputs": {
                role: [self.plan.nodes[other].kind, self.plan.key(other)]
                for role, other in node.inputs.items()
            },
            "sources": {
                role: {"path": s.path, "revision": s.revision, "fingerprint": s.fingerprint}
                for role, s in node.sources.items()
            },
            "store": self.store.location,
            "log": log,
            "provenance": self.provenance,
            "checkpoint_seconds": self.checkpoint_seconds,
        }
        slot.node_id, slot.started = node_id, time.monotonic()
        slot.reference = slot.lease.submit(TARGET, payload)[0]
        self.state[node_id] = "running"
        detail = {"kind": node.kind, "key": key, "attempt": attempt, "log": log}
        self.run.note("start", id=node_id, **detail)
        self.listener.event("start", node_id, detail)

    def _log(self, node_id: str, attempt: int) -> str:
        file = self.run.log(node_id, attempt)
        return self.store.log(self.run.name, file.name) or str(file)

    # --- collecting ----------------------------------------------------------------------

    def _collect(self) -> None:
        busy = self._busy()
        if not busy:
            if self._delayed:
                time.sleep(POLL_SECONDS)
            return
        ended = wait([slot.reference for slot in busy], POLL_SECONDS)
        for slot in busy:
            if slot.reference not in ended:
                continue
            node_id, reference = slot.node_id, slot.reference
            assert node_id is not None
            slot.node_id = slot.reference = None
            try:
                verdict = answer(reference)
            except LeaseLost as lost:
                verdict = {"status": "failed", "class": lost.reason, "message": str(lost)}
            except CallFailed as error:
                verdict = {"status": "failed", "class": "invalid", "message": str(error)}
            if verdict["status"] == "done":
                detail = {"key": self.plan.key(node_id), "seconds": verdict["seconds"]}
                self.run.note("done", id=node_id, **detail)
                self.listener.event("done", node_id, {**detail, "summary": verdict["summary"]})
                self._release_key(node_id)
                self._finish(node_id)
            else:
                self._close(slot)  # after any fault its processes are replaced
                self._failed(node_id, verdict)

    def _close(self, slot: Slot) -> None:
        if slot.lease is not None:
            slot.lease.close()
        slot.lease = slot.base = None

    def _finish(self, node_id: str) -> None:
        self.state[node_id] = "done"
        for other in self._dependents[node_id]:
            self._missing[other] -= 1
            if self._missing[other] == 0 and self.state[other] == "waiting":
                self._make_ready(other)

    def _release_key(self, node_id: str) -> None:
        key = self.plan.key(node_id)
        if key is None:
            return
        self._in_flight.pop(key, None)
        for twin in self._twins.pop(key, []):
            self._make_ready(twin)

    def _failed(self, node_id: str, verdict: dict[str, Any]) -> None:
        failure = verdict["class"]
        self._failures[node_id, failure] += 1
        tries = self._failures[node_id, failure]
        if tries <= RETRIES.get(failure, 0):
            delay = BACKOFF_SECONDS * 2 ** (tries - 1) if failure == "transient" else 0.0
            detail = {"class": failure, "message": verdict["message"], "delay": delay}
            self.run.note("retry", id=node_id, **detail)
            self.listener.event("retry", node_id, detail)
            self._delayed.append((time.monotonic() + delay, node_id))
            self.state[node_id] = "ready"
            return
        self._fail(node_id, verdict)

    def _fail(self, node_id: str, verdict: dict[str, Any]) -> None:
        self.state[node_id] = "failed"
        detail = {"class": verdict["class"], "message": verdict["message"]}
        self.run.note("failed", id=node_id, **detail)
        self.listener.event("failed", node_id, detail)
        self._block_after(node_id, f"needs {node_id}, which failed")
        key = self.plan.key(node_id)
        twins = self._twins.pop(key, []) if key else []
        if key:
            self._in_flight.pop(key, None)
        for twin in twins:
            self._fail(twin, verdict)

    def _block_after(self, node_id: str, message: str) -> None:
        stack = list(self._dependents[node_id])
        while stack:
            other = stack.pop()
            if self.state[other] in ("waiting", "ready"):
                self.state[other] = "blocked"
                self.run.note("blocked", id=other, message=message)
                self.listener.event("blocked", other, {"message": message})
                stack.extend(self._dependents[other])
