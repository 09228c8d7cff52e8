"""The driver's loop: ready stages to leases, verdicts to states, until nothing more can be done."""

import contextlib
import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from cluster.connection import Capacity
from cluster.lease import CallFailed, LeaseLost, Shape, answer, wait
from orchestrator.driver.fleet import Fleet, Held
from orchestrator.driver.order import Order
from orchestrator.driver.retries import (
    GROUND,
    RETRIES,
    UNREACHABLE_SECONDS,
    Rung,
    budget_class,
    delay,
    higher,
    joint_verdict,
    next_rung,
)
from orchestrator.driver.shapes import Shapes, fits, slots
from orchestrator.graph import Node, Plan
from orchestrator.reuse import Assessment, assess, decide
from orchestrator.runs import Fence, RunFolder, RunTaken
from orchestrator.store import CorruptArtefact, Store, StoreUnreachable
from orchestrator.sweep import Sweep

TARGET = "orchestrator.attempt:run_attempt"
POLL_SECONDS = 0.5
LOOK_SECONDS = 5.0
"""Between looks at the cluster, the leases and the lock."""
PEER_SECONDS = 3.0
"""How long the other ranks may take to say what happened after one has failed."""
GRACE_SECONDS = 30.0
"""How long running stages may take to keep a checkpoint once the run is to stop."""


class Listener(Protocol):
    """Whoever watches a run."""

    def event(self, name: str, node_id: str, detail: dict[str, Any]) -> None:
        """Something changed.

        Args:
            name: of a stage `start`, `done`, `retry`, `failed`, `blocked` or `stopped`; of the run
                `waiting`, `capacity` or `stopping`.
            node_id: the stage; empty for the run.
            detail: by name.
        """

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
    reason: str = ""
    """Why it ended before all was done; empty if it didn't."""

    @property
    def complete(self) -> bool:
        """Whether every stage is done."""
        return not (self.failed or self.blocked or self.interrupted or self.reason)


@dataclass(frozen=True)
class Running:
    """A stage at work."""

    node_id: str
    seconds: float
    log: str
    gpus: float
    ranks: int


@dataclass
class Driver:
    """Runs a plan.

    Args:
        plan: the stages.
        store: where artefacts go.
        run: the run folder (locked by the caller).
        sweep: for its resources, limits and priorities.
        look: what the cluster has now.
        fence: of this driver; stages commit only while it stands.
        listener: whoever watches.
        provenance: written into every stage (the commit, the user's version of this program).
        assessment: the plan held against the store, where that is known already.
        estimates: seconds each stage is expected to take; None: the plan's rough ones.
        needs: bytes of GPU memory by stage, where they are known.
        shares: by base model, the part of a GPU its stages fit in.
        target: what a worker calls, `module:name`.
    """

    plan: Plan
    store: Store
    run: RunFolder
    sweep: Sweep
    look: Callable[[], Capacity]
    fence: Fence
    listener: Listener
    provenance: dict[str, Any]
    assessment: Assessment | None = None
    estimates: dict[str, float] = field(default_factory=dict)
    needs: Mapping[str, int] = field(default_factory=dict)
    shares: Mapping[str | None, float] = field(default_factory=dict)
    target: str = TARGET
    state: dict[str, str] = field(default_factory=dict)
    """Per node: `waiting`, `ready`, `running`, `done`, `failed`, `blocked` or `stopped`."""
    lasted: dict[str, float] = field(default_factory=dict)
    """Seconds of the stages this driver has finished."""
    reason: str = ""
    """Why nothing new is started."""

    def __post_init__(self) -> None:
        resources = self.sweep.resources
        self.fleet = Fleet(self.look, self.sweep.limits, resources)
        self._shapes = Shapes(resources, bool(self.fleet.capacity.gpus), self.shares)
        self._dependents = self.plan.dependents()
        self.estimates = self.estimates or {i: n.cost for i, n in self.plan.nodes.items()}
        self._order = Order(self.plan, self._dependents, self.estimates, self.sweep.priority)
        self._missing: dict[str, int] = {}
        self._ready: dict[tuple[str | None, Shape], list[tuple[Any, str]]] = defaultdict(list)
        self._delayed: list[tuple[float, str]] = []
        self._attempts: Counter[str] = Counter()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._rungs: dict[str, Rung] = {}
        self._learnt: dict[tuple[str | None, str], Rung] = {}
        """What stages of a kind on a base needed: the next ones begin there."""
        self._alone: set[str] = set()
        self._unreachable_since: dict[str, float] = {}
        self._waiting_since: dict[str, float] = {}
        self._twins: dict[str, list[str]] = defaultdict(list)
        self._in_flight: dict[str, str] = {}
        self._reused = 0
        self._looked = time.monotonic()
        self._gpu_seconds = self.run.gpu_seconds()
        self._stopping_since: float | None = None
        self._interrupted = False

    # --- what those who watch may ask ----------------------------------------------------

    @property
    def stopping(self) -> bool:
        """Whether the run ends as soon as running stages have kept what they need."""
        return self._stopping_since is not None

    @property
    def model_loads(self) -> int:
        """How often a base model was loaded."""
        return self.fleet.model_loads

    @property
    def slots(self) -> int:
        """Jobs at once, as far as the cluster and the limits allow."""
        shape = self._shapes.of(
            next(iter(self.plan.nodes.values())), GROUND, False, self.fleet.capacity
        )
        widest = max((held.shape for held in self.fleet.held), key=lambda s: s.gpus, default=shape)
        found = slots(widest if widest.gpus > shape.gpus else shape, self.fleet.capacity)
        limits = self.sweep.limits
        if self.sweep.resources.autoscaling:
            found = limits.jobs or found
        if limits.gpus is not None and widest.gpus:
            found = min(found, int(limits.gpus / widest.gpus + 1e-9))
        return min(found, limits.jobs or found)

    @property
    def slots_in_use(self) -> int:
        """Stages at work."""
        return len(self.fleet.busy())

    @property
    def gpus(self) -> float:
        """GPUs of the cluster."""
        return self.fleet.capacity.gpus

    @property
    def gpus_in_use(self) -> float:
        """GPUs that stages at work hold."""
        return self.fleet.gpus_in_use

    @property
    def gpu_hours(self) -> float:
        """GPU-hours this run has used, earlier drivers' and running stages' included."""
        now = time.monotonic()
        running = sum(held.gpus * (now - held.started) for held in self.fleet.busy())
        return (self._gpu_seconds + running) / 3600

    def running(self) -> list[Running]:
        """What runs now."""
        now = time.monotonic()
        return [
            Running(
                held.node_id,
                now - held.started,
                self.run.log(held.node_id, self._attempts[held.node_id]),
                held.gpus,
                held.shape.ranks,
            )
            for held in self.fleet.busy()
            if held.node_id is not None
        ]

    def stop(self, reason: str) -> None:
        """Start nothing new, let running stages keep a checkpoint, and leave."""
        self._interrupted = True
        self._stop(reason)

    # --- the loop ------------------------------------------------------------------------

    def execute(self) -> Outcome:
        """Run until nothing more can be done.

        A `KeyboardInterrupt` ends every lease at once and returns what was done so far.

        Raises:
            RunTaken: another driver has taken the run over.
        """
        self.run.note("begin", nodes=len(self.plan.nodes))
        try:
            self._begin()
            while self._unfinished():
                self._wake_delayed()
                self._launch()
                self._collect()
                self._look_around()
                self.listener.tick(self)
        except KeyboardInterrupt:
            self._interrupted = True
            self.reason = self.reason or "interrupted"
        finally:
            self.fleet.close_all()
        left = any(
            state in ("waiting", "ready", "running", "stopped") for state in self.state.values()
        )
        outcome = Outcome(
            done=sum(state == "done" for state in self.state.values()),
            reused=self._reused,
            failed=[i for i, state in self.state.items() if state == "failed"],
            blocked=[i for i, state in self.state.items() if state == "blocked"],
            interrupted=self._interrupted,
            reason=self.reason if left else "",
        )
        self.run.note(
            "end",
            done=outcome.done,
            failed=len(outcome.failed),
            blocked=len(outcome.blocked),
            interrupted=outcome.interrupted,
            reason=outcome.reason,
        )
        return outcome

    def _begin(self) -> None:
        self.assessment = self.assessment or assess(self.plan, self.store)
        finished = [i for i, v in self.assessment.verdicts.items() if v in ("reuse", "unneeded")]
        for node_id, node in self.plan.nodes.items():
            self.state[node_id] = "waiting"
            self._missing[node_id] = len(node.dependencies())
        with self.run.noting_many():
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
        busy = bool(self.fleet.busy())
        if self.reason:
            return busy
        return busy or bool(self._delayed or any(self._ready.values()))

    # --- ready ---------------------------------------------------------------------------

    def _make_ready(self, node_id: str) -> None:
        """All it waits for is done: decide its block, find its key, reuse or queue it."""
        node = self.plan.nodes[node_id]
        try:
            if not decide(self.plan, node, self.store):
                self._remake(
                    node_id,
                    [m for m in node.choice.maps if not self._there(m)] if node.choice else [],
                )
                return
            key = self.plan.key(node_id)
            assert key is not None
            there = self.store.has(node.kind, key)
        except CorruptArtefact as damaged:
            self.store.discard(damaged.kind, damaged.key)
            self._remake(node_id, self._makers(damaged.kind, damaged.key))
            return
        except StoreUnreachable as error:
            self._wait_for_store(node_id, str(error))
            return
        self._unreachable_since.pop(node_id, None)
        if there:
            self._reused += 1
            self.run.note("done", id=node_id, key=key, reused=True)
            self._finish(node_id)
        elif self._in_flight.get(key, node_id) != node_id:
            self._twins[key].append(node_id)  # the same work under another name
        else:
            self._in_flight[key] = node_id
            self._queue(node_id)

    def _there(self, node_id: str) -> bool:
        key = self.plan.key(node_id)
        return key is not None and self.store.has(self.plan.nodes[node_id].kind, key)

    def _queue(self, node_id: str) -> None:
        node = self.plan.nodes[node_id]
        self.state[node_id] = "ready"
        learnt = self._learnt.get((node.base, node.kind), GROUND)
        self._rungs[node_id] = higher(self._rungs.get(node_id, GROUND), learnt)
        shape = self._shapes.of(
            node, self._rungs[node_id], node_id in self._alone, self.fleet.capacity
        )
        heapq.heappush(self._ready[node.base, shape], (self._order(node_id), node_id))

    def _wake_delayed(self) -> None:
        now = time.monotonic()
        due = [node_id for when, node_id in self._delayed if when <= now]
        self._delayed = [(when, node_id) for when, node_id in self._delayed if when > now]
        for node_id in due:
            if node_id in self._unreachable_since:
                self._make_ready(node_id)
            else:
                self._queue(node_id)

    # --- launching -----------------------------------------------------------------------

    def _launch(self) -> None:
        if self.reason:
            return
        budget = self.sweep.limits.gpu_hours
        if budget is not None and any(self._ready.values()) and self.gpu_hours >= budget:
            self._stop(f"the budget of {budget:g} GPU-hours is spent", checkpoint=False)
            return
        while self._launch_one():
            pass

    def _launch_one(self) -> bool:
        """Start the first stage that has a lease or can get one."""
        heads = sorted((queue[0], where) for where, queue in self._ready.items() if queue)
        urgent = self._order.urgency(heads[0][0][1]) if heads else 0
        for (_, node_id), (base, shape) in heads:
            held = self.fleet.serving(base, shape)
            if held is not None and held.base not in (None, base) and base is not None:
                held = None
            if held is not None and held.base is not None and base is None:
                # Work without a base may use any process, but not before the base's own.
                own = self._ready.get((held.base, shape))
                if own and self._order.urgency(own[0][1]) == urgent:
                    continue
            if held is None and self._kept_for_own(base, shape, urgent):
                continue
            held = held or self.fleet.open(shape)
            if held is not None:
                heapq.heappop(self._ready[base, shape])
                self._waiting_since.pop(node_id, None)
                self._start(held, node_id)
                return True
            if self._reserves(shape):
                return False
        return False

    def _kept_for_own(self, base: str | None, shape: Shape, urgent: int) -> bool:
        """Whether every idle process has work of its own base that is as urgent.

        Loading another base in its place would cost more than waiting.
        """
        idle = list(self.fleet.idle())
        if not idle or fits([*(h.shape for h in self.fleet.held), shape], self.fleet.capacity):
            return False
        return all(
            held.base not in (None, base)
            and (own := self._ready.get((held.base, held.shape)))
            and self._order.urgency(own[0][1]) == urgent
            for held in idle
        )

    def _reserves(self, shape: Shape) -> bool:
        """Whether room is kept free for a lease larger than the usual: it would never find any."""
        usual = shape.ranks == 1 and not shape.memory
        return not usual and fits([shape], self.fleet.capacity)

    def _start(self, held: Held, node_id: str) -> None:
        node = self.plan.nodes[node_id]
        self.fleet.hold_base(held, node.base)
        self._attempts[node_id] += 1
        attempt, rung = self._attempts[node_id], self._rung_now(node)
        key, log = self.plan.key(node_id), self.run.log(node_id, attempt)
        payload = self._payload(node, rung, log) | {"gpus": held.shape.gpus}
        held.node_id, held.started = node_id, time.monotonic()
        held.verdicts, held.failing_since = {}, None
        held.references = held.lease.submit(self.target, payload)
        self.state[node_id] = "running"
        detail: dict[str, Any] = {"kind": node.kind, "key": key, "attempt": attempt, "log": log}
        if rung != GROUND:
            detail["relief"] = rung.describe(node.kind, node.params)
        self.run.note("start", id=node_id, **detail)
        self.listener.event("start", node_id, detail)

    def _rung_now(self, node: Node) -> Rung:
        """Where a stage begins: siblings may have learnt better since it was queued.

        Its lease has the ranks it was queued for.
        """
        queued = self._rungs[node.id]
        learnt = self._learnt.get((node.base, node.kind), GROUND)
        self._rungs[node.id] = replace(higher(queued, learnt), ranks=queued.ranks)
        return self._rungs[node.id]

    def _payload(self, node: Node, rung: Rung, log: str) -> dict[str, Any]:
        minutes = self.sweep.resources.checkpoint_minutes
        return {
            "id": node.id,
            "kind": node.kind,
            "key": self.plan.key(node.id),
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
            "checkpoint_seconds": None if minutes is None else 60 * minutes,
            "relief": rung.relief(),
            "relief_text": rung.describe(node.kind, node.params),
            "need_bytes": self.needs.get(node.id),
            "fence": self.fence.ticket(),
        }

    # --- collecting ----------------------------------------------------------------------

    def _collect(self) -> None:
        busy = self.fleet.busy()
        if not busy:
            if self._unfinished():
                time.sleep(POLL_SECONDS)
            return
        pending = [r for held in busy for r in held.references]
        ended = set(wait(pending, POLL_SECONDS))
        now = time.monotonic()
        for held in busy:
            for rank, reference in enumerate(held.references):
                if reference in ended and rank not in held.verdicts:
                    held.verdicts[rank] = _verdict(reference)
            failed = any(v["status"] == "failed" for v in held.verdicts.values())
            if failed and held.failing_since is None:
                held.failing_since = now
            late = held.failing_since is not None and now - held.failing_since > PEER_SECONDS
            if len(held.verdicts) == len(held.references) or late:
                verdicts = [held.verdicts[rank] for rank in sorted(held.verdicts)]
                self._ended(held, joint_verdict(verdicts))

    def _ended(self, held: Held, verdict: dict[str, Any]) -> None:
        """A stage's try came to an end."""
        node_id = self._free(held)
        if verdict["status"] == "done":
            seconds = verdict["seconds"]
            self.lasted[node_id] = seconds
            detail = {"key": self.plan.key(node_id), "seconds": seconds}
            self.run.note("done", id=node_id, **detail, **self._spent(held))
            self.listener.event("done", node_id, {**detail, "summary": verdict["summary"]})
            self._release_key(node_id)
            self._finish(node_id)
        elif verdict["status"] == "stopped":
            self.state[node_id] = "stopped"
            self.run.note("stopped", id=node_id, message=verdict["message"], **self._spent(held))
            self.listener.event("stopped", node_id, {"message": verdict["message"]})
            self.fleet.close(held)
        else:
            self.fleet.close(held)  # after any fault its processes are replaced
            self._failed(node_id, verdict, held)

    def _free(self, held: Held) -> str:
        node_id = held.node_id
        assert node_id is not None
        held.node_id, held.references, held.idle_since = None, [], time.monotonic()
        held.running = True
        self._gpu_seconds += held.gpus * (held.idle_since - held.started)
        return node_id

    def _spent(self, held: Held) -> dict[str, float]:
        used = held.gpus * (held.idle_since - held.started)
        return {"gpu_seconds": round(used, 1)} if used else {}

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

    # --- failures ------------------------------------------------------------------------

    def _failed(self, node_id: str, verdict: dict[str, Any], held: Held) -> None:
        node = self.plan.nodes[node_id]
        if "damaged" in verdict:
            self._note_retry(node_id, verdict, held, "an input is damaged and is made anew")
            self._remake(node_id, self._makers(*verdict["damaged"]))
            return
        if verdict.get("unreachable"):
            self._note_retry(node_id, verdict, held, "")
            self._wait_for_store(node_id, verdict["message"])
            return
        if verdict["class"] == "fenced":
            raise RunTaken(verdict["message"])
        failure = budget_class(verdict)
        self._failures[node_id, failure] += 1
        tries, wait_for, relief = self._failures[node_id, failure], 0.0, ""
        if failure == "device-oom":
            rung = self._climb(node, held.shape)
            if rung is None:
                text = self._rungs[node_id].describe(node.kind, node.params)
                tried = f"; tried down to {text}" if text else ""
                self._fail(node_id, {**verdict, "message": f"{verdict['message']}{tried}"}, held)
                return
            relief = rung.describe(node.kind, node.params)
        elif tries > RETRIES.get(failure, 0):
            self._fail(node_id, verdict, held)
            return
        else:
            wait_for = delay(failure, tries)
            if failure == "host-oom":
                self._alone.add(node_id)
                relief = "alone on a node"
        self._note_retry(node_id, verdict, held, relief, wait_for)
        self.state[node_id] = "ready"
        self._delayed.append((time.monotonic() + wait_for, node_id))

    def _climb(self, node: Node, shape: Shape) -> Rung | None:
        """The rung for the next try, which siblings learn too."""
        most = self.sweep.resources.most_ranks or int(self.fleet.capacity.node_gpus) or 1
        if self.sweep.limits.gpus is not None and shape.gpus:
            most = min(most, int(self.sweep.limits.gpus))
        rung = next_rung(node.kind, node.params, self._rungs[node.id], shape.ranks, most)
        if (
            rung is not None
            and rung.ranks
            and not fits(
                [self._shapes.of(node, rung, False, self.fleet.capacity)], self.fleet.capacity
            )
        ):
            return None
        if rung is not None:
            self._rungs[node.id] = rung
            where = (node.base, node.kind)
            self._learnt[where] = higher(self._learnt.get(where, GROUND), rung)
        return rung

    def _note_retry(
        self, node_id: str, verdict: dict[str, Any], held: Held, relief: str, wait_for: float = 0.0
    ) -> None:
        detail = {"class": verdict["class"], "message": verdict["message"], "delay": wait_for}
        if relief:
            detail["relief"] = relief
        self.run.note("retry", id=node_id, **detail, **self._spent(held))
        self.listener.event("retry", node_id, detail)

    def _fail(self, node_id: str, verdict: dict[str, Any], held: Held | None = None) -> None:
        self.state[node_id] = "failed"
        detail = {"class": verdict["class"], "message": verdict["message"]}
        self.run.note("failed", id=node_id, **detail, **(self._spent(held) if held else {}))
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

    # --- a store that lost something, or is away -------------------------------------------

    def _makers(self, kind: str, key: str) -> list[str]:
        return [n.id for n in self.plan.by_kind(kind) if self.plan.key(n.id) == key]

    def _remake(self, node_id: str, makers: list[str]) -> None:
        """Make inputs of a stage anew; it, and all that is not yet at work, waits for them."""
        if not makers:
            self._fail(
                node_id, {"class": "invalid", "message": "an input of it is gone from the store"}
            )
            return
        self.state[node_id] = "waiting"
        self._missing[node_id] = 0
        again = []
        for maker in dict.fromkeys(makers):
            for other in self._dependents[maker]:
                if other == node_id or self.state[other] == "waiting":
                    self._missing[other] += 1
                elif self.state[other] == "ready":
                    self._unqueue(other)
                    self.state[other], self._missing[other] = "waiting", 1
            if self.state[maker] == "done":
                self.state[maker] = "waiting"
                again.append(maker)
        self._forget_key(node_id)
        for maker in again:
            self._make_ready(maker)

    def _forget_key(self, node_id: str) -> None:
        key = self.plan.key(node_id)
        if key is not None and self._in_flight.get(key) == node_id:
            del self._in_flight[key]

    def _unqueue(self, node_id: str) -> None:
        self._forget_key(node_id)
        self._delayed = [(when, other) for when, other in self._delayed if other != node_id]
        for queue in self._ready.values():
            kept = [entry for entry in queue if entry[1] != node_id]
            if len(kept) != len(queue):
                queue[:] = kept
                heapq.heapify(queue)

    def _wait_for_store(self, node_id: str, message: str) -> None:
        """The store cannot be reached: that is no failure, until it has lasted too long."""
        now = time.monotonic()
        since = self._unreachable_since.setdefault(node_id, now)
        if now - since > UNREACHABLE_SECONDS:
            self._fail(node_id, {"class": "transient", "message": message})
            return
        if len(self._unreachable_since) == 1 and since == now:
            self.listener.event("waiting", "", {"message": message})
            self.run.note("waiting", message=message)
        self._forget_key(node_id)
        self.state[node_id] = "ready"
        self._delayed.append((now + min(30.0, 1.0 + (now - since) / 2), node_id))

    # --- looking around --------------------------------------------------------------------

    def _look_around(self) -> None:
        if self._stopping_since is not None:
            self._drain(self._stopping_since)
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self.fence.check()
        self.fleet.note_placed()
        before = self.slots
        if self.fleet.look():
            detail = {"nodes": self.fleet.capacity.nodes, "before": before, "slots": self.slots}
            self.run.note("capacity", **detail)
            self.listener.event("capacity", "", detail)
        if not self.sweep.resources.autoscaling and not self.fleet.fits_together():
            self._call_back(self.fleet.unplaced())
        self._end_overdue(now)
        self._end_hopeless(now)
        self.fleet.close_idle()

    def _call_back(self, unplaced: list[Held]) -> None:
        """Take stages out of leases for which the cluster no longer has room."""
        for held in unplaced:
            node_id = held.node_id
            self.fleet.close(held)
            if node_id is not None:
                self._attempts[node_id] -= 1
                self._queue(node_id)

    def _end_overdue(self, now: float) -> None:
        hours = self.sweep.resources.deadline_hours
        if hours is None:
            return
        for held in self.fleet.busy():
            if held.running and now - held.started > 3600 * hours:
                node_id = self._free(held)
                self.fleet.close(held)
                message = f"did not end within {hours:g} hours (resources.deadline_hours)"
                self._failed(node_id, {"class": "transient", "message": message}, held)

    def _end_hopeless(self, now: float) -> None:
        """Stages for which no node has room: wait a while for one to come, then say so."""
        if self.sweep.resources.autoscaling:
            stuck = [h.node_id for h in self.fleet.unplaced() if h.node_id is not None]
            what = "the cluster has found no room"
        else:
            stuck = [
                node_id
                for (_, shape), queue in self._ready.items()
                if queue and not fits([shape], self.fleet.capacity)
                for _, node_id in queue
            ]
            what = "no node of the cluster has room"
        minutes = self.sweep.resources.wait_minutes
        for node_id in stuck:
            since = self._waiting_since.setdefault(node_id, now)
            if since == now and len(self._waiting_since) == 1:
                message = f"{what} for {node_id}; waiting for up to {minutes:g} minutes"
                self.run.note("waiting", message=message)
                self.listener.event("waiting", "", {"message": message})
            if now - since > 60 * minutes:
                for held in list(self.fleet.unplaced()):
                    if held.node_id == node_id:
                        self.fleet.close(held)
                self._unqueue(node_id)
                message = f"{what} for it in {minutes:g} minutes (resources.wait_minutes)"
                self._fail(node_id, {"class": "preempted", "message": message})
        for node_id in set(self._waiting_since) - set(stuck):
            del self._waiting_since[node_id]

    # --- stopping ----------------------------------------------------------------------------

    def _stop(self, reason: str, checkpoint: bool = True) -> None:
        if self.stopping:
            return
        self.reason = reason
        self._stopping_since = time.monotonic() if checkpoint else None
        if checkpoint:
            with contextlib.suppress(OSError):
                self.fence.ask_to_stop()
        self.run.note("stopping", message=reason)
        self.listener.event("stopping", "", {"message": reason})

    def _drain(self, since: float) -> None:
        """Once the grace is over, what still runs is ended: it goes on from its last checkpoint."""
        if time.monotonic() - since < GRACE_SECONDS:
            return
        for held in self.fleet.busy():
            node_id = self._free(held)
            self.fleet.close(held)
            self.state[node_id] = "stopped"
            message = f"ended: it kept no checkpoint within {GRACE_SECONDS:.0f} s"
            self.run.note("stopped", id=node_id, message=message, **self._spent(held))
            self.listener.event("stopped", node_id, {"message": message})


def _verdict(reference: Any) -> dict[str, Any]:
    """What one rank answered, or what became of it."""
    try:
        verdict: dict[str, Any] = answer(reference)
    except LeaseLost as lost:
        verdict = {"status": "failed", "class": lost.reason, "message": str(lost)}
        if lost.reason == "preempted" and not lost.node_died:
            verdict["crashed"] = True
    except CallFailed as error:
        verdict = {"status": "failed", "class": "invalid", "message": str(error)}
    return verdict
