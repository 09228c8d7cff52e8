"""Where colour scales of maps begin and end, the same in static pictures and on the report's page."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.consensus import Floats

DAMAGE_WIDTH = 0.05
"""Damage in nats up to which its colour scale is linear; beyond it is logarithmic (`arcsinh`), since
deep blocks cost a hundred times what shallow ones do, and the shallow ones are those of interest."""


@dataclass(frozen=True)
class Limits:
    """Ends of a colour scale."""

    low: float
    high: float
    clipped: bool
    """Some blocks lie beyond an end."""


def shade_limits(tables: Sequence[Floats]) -> Limits:
    """The colour scale that maps of one criterion share.

    It ends at the largest distance among blocks that leave layer 0 in place: those that do not
    would take most of it for themselves. It begins at 0, or below where damage is negative.

    Args:
        tables: distances `[depth, start]`, NaN where not measured.
    """
    every = np.concatenate([_finite(table) for table in tables] or [np.empty(0)])
    inner = np.concatenate([_finite(table[:, 1:]) for table in tables] or [np.empty(0)])
    if not len(every):
        return Limits(0.0, 1.0, False)
    high = float((inner if len(inner) else every).max())
    low = min(0.0, float(every.min()))
    return Limits(low, high if high > low else low + 1.0, bool(every.max() > high))


def difference_limits(difference: Floats) -> Limits:
    """The scale of a difference `[depth, start]` of two maps: alike on both sides of 0.

    As in `shade_limits`, blocks from layer 0 have no say.
    """
    inner, every = abs(_finite(difference[:, 1:])), abs(_finite(difference))
    top = float(inner.max()) if inner.any() else 1.0
    return Limits(-top, top, bool((every > top).any()))


def damage_ticks(limits: Limits) -> list[float]:
    """Round values for a colour bar of damage, in nats."""
    steps = [0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
    values = [*(-step for step in reversed(steps)), 0.0, *steps]
    return [value for value in values if limits.low <= value <= limits.high]


def _finite(table: Floats) -> Floats:
    return table[np.isfinite(table)]
