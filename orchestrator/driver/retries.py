"""What a failure means: its class, how often it is tried again and when, and the OOM ladder.

Pure decisions on plain data; the loop carries them out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from workers.config import DAMAGE_BATCH

RETRIES = {"preempted": 20, "crashed": 5, "host-oom": 2, "transient": 3}
"""Further tries after a failure of each class; every other class gets none. `crashed` is a worker
lost (class `preempted`) while its node lives on: it may be the stage that kills it."""
BACKOFF_SECONDS = 2.0
LONGEST_BACKOFF_SECONDS = 60.0
UNREACHABLE_SECONDS = 3600.0
"""How long a store that cannot be reached is waited for: that is no failure of a stage."""
PRECEDENCE = ("fenced", "preempted", "device-oom", "host-oom", "transient", "invalid", "peer")
"""When ranks fail together, the first of these tells why: the others failed with it."""


@dataclass(frozen=True)
class Rung:
    """A step of the OOM ladder: what a try at a stage does to need less memory."""

    halvings: int = 0
    activation_checkpointing: bool = False
    ranks: int = 0
    """Ranks of the lease; 0: as many as the sweep asks for."""

    def relief(self) -> dict[str, Any]:
        """What the worker is told."""
        return {
            "halvings": self.halvings,
            "activation_checkpointing": self.activation_checkpointing,
        }

    def describe(self, kind: str, params: Mapping[str, Any]) -> str:
        """What it does differently, for people; empty on the ground."""
        words = []
        if self.halvings:
            whole = batch_in_memory(kind, params)
            now = -(-whole // 2**self.halvings)
            what = "micro-batch" if kind in TRAINING else "batch"
            words.append(f"{what} {now} in place of {whole}")
        if self.activation_checkpointing:
            words.append("activation checkpointing")
        if self.ranks:
            words.append(f"{self.ranks} ranks")
        return ", ".join(words)


GROUND = Rung()
TRAINING = ("adapt", "heal")


def batch_in_memory(kind: str, params: Mapping[str, Any]) -> int:
    """Utterances that a stage puts through the decoder at once, by its parameters; 1 if none."""
    settings = params.get("settings") or {}
    if kind == "damage":
        return DAMAGE_BATCH
    return int(settings.get("micro_batch") or settings.get("batch_size") or 1)


def next_rung(
    kind: str, params: Mapping[str, Any], rung: Rung, ranks: int, most_ranks: int
) -> Rung | None:
    """The next step after a stage ran out of the device's memory; None: there is no other.

    The micro-batch is halved down to one utterance, then activations are computed again in the
    backward pass, then the ranks are doubled, over which the decoder's layers are spread. The
    effective batch stays the same on each rung.

    Args:
        kind: of the stage.
        params: of the stage.
        rung: on which it failed.
        ranks: of the lease it failed on.
        most_ranks: that the cluster and the sweep's limits allow.
    """
    if -(-batch_in_memory(kind, params) // 2**rung.halvings) > 1:
        return replace(rung, halvings=rung.halvings + 1)
    if kind in TRAINING and not rung.activation_checkpointing:
        return replace(rung, activation_checkpointing=True)
    if kind in TRAINING and ranks * 2 <= most_ranks:
        return replace(rung, ranks=ranks * 2)
    return None


def higher(one: Rung, other: Rung) -> Rung:
    """The rung that needs less memory on every count."""
    return Rung(
        max(one.halvings, other.halvings),
        one.activation_checkpointing or other.activation_checkpointing,
        max(one.ranks, other.ranks),
    )


def budget_class(verdict: Mapping[str, Any]) -> str:
    """Which budget of `RETRIES` a failure is counted against."""
    return "crashed" if verdict.get("crashed") else str(verdict["class"])


def delay(failure: str, tries: int) -> float:
    """Seconds before the next try, after `tries` failures of a class."""
    if failure == "transient":
        return min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** (tries - 1))
    if failure in ("preempted", "crashed") and tries > 1:
        return min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** (tries - 2))
    return 0.0


def joint_verdict(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One verdict of the ranks of a lease, in the order of the ranks.

    All done is done. Otherwise the class that explains the others counts; ranks that only lost
    their peers, with no rank that says why, were pre-empted.
    """
    failed = [v for v in verdicts if v["status"] == "failed"]
    if failed:
        told = min(failed, key=lambda v: PRECEDENCE.index(v["class"]))
        if told["class"] == "peer":
            return {**told, "class": "preempted", "crashed": True}
        return dict(told)
    stopped = [v for v in verdicts if v["status"] == "stopped"]
    return dict(stopped[0] if stopped else verdicts[0])
