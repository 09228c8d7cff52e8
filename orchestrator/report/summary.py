"""What a report tells about the run itself, beside its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

LAB_LIMITS = tuple(
    line.strip()
    for line in """
These figures come from the built-in lab: small models trained on the spot on synthesised speech \
with a vocabulary of a few hundred words. They show that the method works, not what a large \
SpeechLLM would do.
Part of the redundancy is built in: the lab's decoders are grown by copying layers.
Healing clearly beats no healing; joint against decoder-only healing is a tie within noise. Claim \
nothing from fewer than 300 test utterances a language and 3 seeds.
The block with the smallest distance is often not the one whose removal hurts least.
The base model was still improving when its training stopped: compare with the unpruned control \
that was healed just as long, never with the base.
Layer 0 does most of the work, so correlations that include it are high for a trivial reason: read \
those without it.
""".strip().splitlines()
)
"""Printed wherever figures of the lab are shown, a sentence or two each."""


class Failure(NamedTuple):
    """One stage that failed for good."""

    stage: str
    """The stage's label."""
    kind: str
    """Failure class: `preempted`, `device-oom`, `host-oom`, `transient` or `invalid`."""
    message: str
    log: str
    """Path of the attempt's log."""


@dataclass(frozen=True)
class RunSummary:
    """What the page says about how its figures were made."""

    name: str
    created: str
    """ISO 8601 time at which the report was made."""
    sweep: Mapping[str, object]
    """The resolved sweep (plain data)."""
    stages: Mapping[str, int]
    """Number of stages by state, such as `{"done": 40, "reused": 3, "failed": 1}`."""
    failures: Sequence[tuple[str, str, str, str]] = ()
    """`Failure`s, or tuples like them."""
    relief: Sequence[tuple[str, str]] = ()
    """Stages that were done with less memory than the sweep asks for, and how."""
    lab: bool = False
    """Figures come from the synthetic lab: its known limits are printed."""
    pool: str = "all"
    """Token pool that the selectors and the consensus read."""
    tolerance: float = 1.0
    """Points of WER or BLEU that a pruned model may lose against its control."""
    depths: Sequence[int] = ()
    """Depths shown first; empty: all that the results have."""
    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    rerun: str = "layersweep run SWEEP.yaml"
    """The command that runs what is missing."""
