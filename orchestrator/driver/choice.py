"""Which stage starts next, and on which lease."""

from cluster.lease import Shape
from orchestrator.driver.fleet import Fleet, Held
from orchestrator.driver.order import Order
from orchestrator.driver.ready import Ready
from orchestrator.driver.shapes import fits


def next_start(ready: Ready, fleet: Fleet, order: Order) -> tuple[str, Held] | None:
    """The first stage in order that has a lease or can get one, taken out of its queue.

    A process serves its own base while there is work for it that is as urgent as any: to load another
    model costs more than the order is worth.
    """
    heads = ready.heads()
    urgent = min((order.urgency(node_id) for node_id, _ in heads), default=0)

    def has_own_work(held: Held) -> bool:
        own = None if held.base is None else ready.first(held.base, held.shape)
        return own is not None and order.urgency(own) == urgent

    for _, (base, shape) in heads:
        held = fleet.serving(base, shape)
        if held is None and _would_evict(fleet, shape) and all(map(has_own_work, fleet.idle())):
            continue
        held = held or fleet.open(shape)
        if held is not None:
            return ready.take((base, shape)), held
        if _reserves(fleet, shape):
            return None
    return None


def _would_evict(fleet: Fleet, shape: Shape) -> bool:
    """Whether a new lease takes the place of an idle one."""
    held = [other.shape for other in fleet.held]
    return any(True for _ in fleet.idle()) and not fits([*held, shape], fleet.capacity)


def _reserves(fleet: Fleet, shape: Shape) -> bool:
    """Whether room is kept free for a lease larger than the usual: it would never find any."""
    usual = shape.ranks == 1 and not shape.memory
    return not usual and fits([shape], fleet.capacity)
