"""The leases a driver holds: which of them serves a stage, and when one is opened or given back."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.connection import Capacity
from cluster.lease import Lease, Shape
from orchestrator.driver.shapes import fits
from orchestrator.resources import Limits, Resources


@dataclass(eq=False)
class Held:
    """A lease, the base model its processes hold, and the stage they run."""

    lease: Lease
    shape: Shape
    base: str | None = None
    node_id: str | None = None
    references: list[Any] = field(default_factory=list)
    verdicts: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Answers of ranks while others still work."""
    started: float = 0.0
    """When its stage was sent, or found room if that came later."""
    failing_since: float | None = None
    idle_since: float = 0.0
    running: bool = False
    """Its processes have their place on the cluster."""

    @property
    def gpus(self) -> float:
        """GPUs it holds."""
        return self.shape.gpus * self.shape.ranks


class Fleet:
    """All leases of a driver.

    Args:
        look: what the cluster has now.
        limits: of the sweep.
        resources: of the sweep.
    """

    def __init__(self, look: Callable[[], Capacity], limits: Limits, resources: Resources) -> None:
        self._look, self._limits = look, limits
        self._idle_seconds, self._autoscaling = resources.idle_seconds, resources.autoscaling
        self.held: list[Held] = []
        self.capacity = look()
        self.model_loads = 0

    def busy(self) -> list[Held]:
        """Those with a stage."""
        return [held for held in self.held if held.node_id is not None]

    def idle(self) -> Iterator[Held]:
        """Those without."""
        return (held for held in self.held if held.node_id is None)

    @property
    def gpus_in_use(self) -> float:
        """GPUs held by leases with a stage."""
        return sum(held.gpus for held in self.busy())

    def look(self) -> bool:
        """Learn what the cluster has now; whether that changed."""
        before, self.capacity = self.capacity, self._look()
        return before != self.capacity

    # --- a lease for a stage -----------------------------------------------------------------

    def serving(self, base: str | None, shape: Shape) -> Held | None:
        """An idle lease of that shape that holds the base, or could: none yet, or any will do."""
        fitting = [
            held
            for held in self.idle()
            if held.shape == shape and (base is None or held.base in (None, base))
        ]
        return max(fitting, key=lambda held: held.base == base, default=None)

    def open(self, shape: Shape) -> Held | None:
        """A new lease, in place of idle ones where it needs their room; None: there is no room."""
        if not self._allowed(shape):
            return None
        idle = sorted(self.idle(), key=lambda held: held.idle_since)
        if not self._autoscaling:
            if not fits([*(held.shape for held in self.busy()), shape], self.capacity):
                return None
            while not fits([*(held.shape for held in self.held), shape], self.capacity):
                self.close(idle.pop(0))
        elif idle:
            self.close(idle[0])
        held = Held(Lease(shape), shape)
        self.held.append(held)
        return held

    def hold_base(self, held: Held, base: str | None) -> None:
        """Note which base the lease's processes will have loaded."""
        if base is not None and held.base is None:
            held.base = base
            self.model_loads += 1

    def _allowed(self, shape: Shape) -> bool:
        busy, limits = self.busy(), self._limits
        if limits.jobs is not None and len(busy) >= limits.jobs:
            return False
        gpus = shape.gpus * shape.ranks + sum(held.gpus for held in busy)
        return limits.gpus is None or gpus <= limits.gpus + 1e-9

    # --- looking after them ------------------------------------------------------------------

    def note_placed(self) -> None:
        """See which leases have found their room; the clock of a stage starts then."""
        now = time.monotonic()
        for held in self.held:
            if not held.running and held.lease.placed():
                held.running = True
                held.started = now

    def unplaced(self) -> list[Held]:
        """Those still waiting for room."""
        return [held for held in self.held if not held.running]

    def fits_together(self) -> bool:
        """Whether the cluster, as it is now, has room for all of them."""
        return fits([held.shape for held in self.held], self.capacity)

    def close_idle(self) -> None:
        """Give back what had no work for a while."""
        now = time.monotonic()
        for held in list(self.idle()):
            if now - held.idle_since >= self._idle_seconds:
                self.close(held)

    def close(self, held: Held) -> None:
        """End a lease's processes and give their place back."""
        held.lease.close()
        if held in self.held:
            self.held.remove(held)

    def close_all(self) -> None:
        """End them all."""
        for held in list(self.held):
            self.close(held)
