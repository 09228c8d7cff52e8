"""The driver's loop: ready stages to leases, verdicts to states, until nothing more can be done."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.connection import Capacity
from cluster.lease import CallFailed, LeaseLost, Shape, answer, wait
from orchestrator.driver.choice import next_start
from orchestrator.driver.fleet import Fleet, Held
from orchestrator.driver.order import Order
from orchestrator.driver.progress import Progress
from orchestrator.driver.ready import Ready
from orchestrator.driver.retries import GROUND, joint_verdict
from orchestrator.driver.shapes import Shapes, fits, slots
from orchestrator.driver.tries import Tries
from orchestrator.graph import Node, Plan
from orchestrator.reuse import Assessment, assess
from orchestrator.runs import Fence, RunFolder, RunTaken
from orchestrator.store import Store
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
        most, gpus = resources.most_ranks, self.sweep.limits.gpus
        if gpus is not None and self.fleet.capacity.gpus:
            most = max(1, min(most or int(gpus), int(gpus)))
        self._tries = Tries(self._shapes, most)
        self._progress = Progress(
            self.plan, self.store, self.run, self.listener.event, self, self.state
        )
        self.estimates = self.estimates or {i: n.cost for i, n in self.plan.nodes.items()}
        self._order = Order(
            self.plan, self._progress.dependents, self.estimates, self.sweep.priority
        )
        self._ready = Ready(self._order)
        self._waiting_since: dict[str, float] = {}
        self._looked = time.monotonic()
        self._ticked = 0.0
        self._history = self.run.history()
        self._gpu_seconds = self._history.gpu_seconds
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
                self._log(held.node_id),
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
            self.assessment = self.assessment or assess(self.plan, self.store)
            self._progress.begin(self.assessment, self._history.done)
            while self._unfinished():
                for node_id in self._ready.due():
                    self._progress.look_again(node_id)
                self._launch()
                self._collect()
                self._look_around()
                self._tick()
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
            reused=self._progress.reused,
            failed=[i for i, state in self.state.items() if state == "failed"],
            blocked=[i for i, state in self.state.items() if state == "blocked"],
            interrupted=self._interrupted and left,
            reason=(self.reason or "stages were left waiting") if left else "",
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

    def _tick(self) -> None:
        """Let those who watch look at every stage: twice a second, however fast stages end."""
        now = time.monotonic()
        if now - self._ticked >= POLL_SECONDS:
            self._ticked = now
            self.listener.tick(self)

    def _unfinished(self) -> bool:
        busy = bool(self.fleet.busy())
        return busy if self.reason else busy or bool(self._ready)

    # --- ready ---------------------------------------------------------------------------

    def enqueue(self, node_id: str) -> None:
        """A stage can start."""
        node = self.plan.nodes[node_id]
        self._ready.add(node_id, node.base, self._tries.shape(node, self.fleet.capacity))

    def enqueue_later(self, node_id: str, seconds: float) -> None:
        """A stage may be able to start after a while."""
        self._ready.add_later(node_id, seconds)

    def dequeue(self, node_id: str) -> None:
        """A stage cannot start any more."""
        self._ready.remove(node_id)

    # --- launching -----------------------------------------------------------------------

    def _launch(self) -> None:
        if self.reason:
            return
        budget = self.sweep.limits.gpu_hours
        if budget is not None and self._ready.any() and self.gpu_hours >= budget:
            self._stop(f"the budget of {budget:g} GPU-hours is spent", checkpoint=False)
            return
        while (found := next_start(self._ready, self.fleet, self._order)) is not None:
            node_id, held = found
            self._waiting_since.pop(node_id, None)
            self._start(held, node_id)

    def _start(self, held: Held, node_id: str) -> None:
        node = self.plan.nodes[node_id]
        self.fleet.hold_base(held, node.base)
        self._tries.attempts[node_id] += 1
        attempt, relief = self._tries.attempts[node_id], self._tries.relief(node, held.shape)
        key, log = self.plan.key(node_id), self._log(node_id)
        payload = self._payload(node, held.shape, log)
        held.node_id, held.started = node_id, time.monotonic()
        held.verdicts, held.failing_since = {}, None
        held.references = held.lease.submit(self.target, payload)
        self.state[node_id] = "running"
        detail: dict[str, Any] = {"kind": node.kind, "key": key, "attempt": attempt, "log": log}
        if relief:
            detail["relief"] = relief
        self.run.note("start", id=node_id, **detail)
        self.listener.event("start", node_id, detail)

    def _log(self, node_id: str) -> str:
        file = self.run.log(node_id, self._tries.attempts[node_id])
        return self.store.log(self.run.name, file.name) or str(file)

    def _payload(self, node: Node, shape: Shape, log: str) -> dict[str, Any]:
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
            "relief": self._tries.rung(node).relief(),
            "relief_text": self._tries.relief(node, shape),
            "gpus": shape.gpus,
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
            self._progress.finish(node_id)
        elif verdict["status"] == "stopped":
            self._progress.stop(node_id, verdict["message"], **self._spent(held))
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

    # --- failures ------------------------------------------------------------------------

    def _failed(self, node_id: str, verdict: dict[str, Any], held: Held) -> None:
        node = self.plan.nodes[node_id]
        if "damaged" in verdict:
            self._note_retry(node_id, verdict, held, "an input is damaged and is made anew")
            self._progress.remake(node_id, self._progress.makers(*verdict["damaged"]))
            return
        if verdict.get("unreachable"):
            self._note_retry(node_id, verdict, held, "")
            self._progress.wait_for_store(node_id, verdict["message"])
            return
        if verdict["class"] == "fenced":
            raise RunTaken(verdict["message"])
        again = self._tries.after(node, verdict, held.shape, self.fleet.capacity)
        if again is None:
            relief = self._tries.relief(node, held.shape)
            tried = f" (tried down to: {relief})" if relief else ""
            message = f"{verdict['message']}{tried}"
            self._progress.fail(node_id, verdict["class"], message, **self._spent(held))
            return
        self._note_retry(node_id, verdict, held, again.relief, again.delay)
        self._progress.queue_later(node_id, again.delay)

    def _note_retry(
        self, node_id: str, verdict: dict[str, Any], held: Held, relief: str, wait_for: float = 0.0
    ) -> None:
        detail = {"class": verdict["class"], "message": verdict["message"], "delay": wait_for}
        if relief:
            detail["relief"] = relief
        self.run.note("retry", id=node_id, **detail, **self._spent(held))
        self.listener.event("retry", node_id, detail)

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
            detail = {"nodes": self.fleet.capacity.nodes, "before": before, "after": self.slots}
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
                self._tries.attempts[node_id] -= 1
                self._progress.queue(node_id)

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
                for shape, waiting in self._ready.of_shapes()
                if not fits([shape], self.fleet.capacity)
                for node_id in waiting
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
                self._ready.remove(node_id)
                message = f"{what} for it in {minutes:g} minutes (resources.wait_minutes)"
                self._progress.fail(node_id, "preempted", message)
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
            message = f"ended: it did not finish within {GRACE_SECONDS:.0f} s"
            self._progress.stop(node_id, message, **self._spent(held))


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
