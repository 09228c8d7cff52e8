"""The stages: their kinds, code versions and where their functions are. Costs no torch to import.

Every stage is a plain function `run(params, inputs, out, context) -> summary`: `params` plain data,
`inputs` what it reads by role, `out` an empty folder it fills, `context` the process it runs in.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from workers.checkpoints import Checkpoints
    from workers.ranks import Ranks
    from workers.relief import Relief


@dataclass(frozen=True)
class Input:
    """A folder or file a stage reads (or a hub repository at a commit)."""

    path: str
    revision: str | None = None


def _silent(fraction: float, message: str) -> None:
    del fraction, message


def _alone() -> "Ranks":
    from workers.ranks import ALONE

    return ALONE


def _unrelieved() -> "Relief":
    from workers.relief import NO_RELIEF

    return NO_RELIEF


@dataclass
class Context:
    """The process a stage runs in, and what that process keeps between stages."""

    progress: Callable[[float, str], None] = _silent
    """Called with a fraction done and a few words."""
    device: str = "cpu"
    resident: dict[str, Any] = field(default_factory=dict)
    """The one base model this process holds, by identity."""
    checkpoints: "Checkpoints | None" = None
    """Where long work keeps what it needs to go on after its process is lost."""
    ranks: "Ranks" = field(default_factory=_alone)
    """This process among those that run the stage together."""
    relief: "Relief" = field(default_factory=_unrelieved)
    """How to need less memory than the parameters ask for."""

    def step(self, done: int, steps: int, loss: float) -> None:
        """Progress of a training run."""
        self.progress(done / steps, f"step {done} of {steps}, loss {loss:.3f}")


class StageFunction(Protocol):
    """What every stage is."""

    def __call__(
        self, params: Mapping[str, Any], inputs: Mapping[str, Input], out: Path, context: Context
    ) -> dict[str, Any]:
        """Do the work, fill `out`, return a small summary of plain data."""


@dataclass(frozen=True)
class Stage:
    """One kind of stage."""

    kind: str
    version: int
    """Raised when the same parameters would give another result."""
    module: str

    def function(self) -> StageFunction:
        """Import and return the stage's function."""
        run: StageFunction = import_module(self.module).run
        return run


STAGES: dict[str, Stage] = {
    stage.kind: stage
    for stage in (
        Stage("build", 1, "workers.stages.build"),
        Stage("encode", 1, "workers.stages.encode"),
        Stage("adapt", 1, "workers.stages.adapt"),
        Stage("adopt", 1, "workers.stages.adopt"),
        Stage("map", 2, "workers.stages.map"),
        Stage("damage", 1, "workers.stages.damage"),
        Stage("heal", 1, "workers.stages.heal"),
        Stage("evaluate", 1, "workers.stages.evaluate"),
    )
}
