"""The part of a sweep file that changes no result: what jobs take, in which order, and how much in all."""

from typing import Any

from pydantic import Field

from workers.config import HealMode, Settings, Task


class Resources(Settings):
    """What one job takes."""

    cpus: float = Field(1.0, gt=0)
    """CPU cores (and threads) a job."""
    gpus: float | None = Field(None, ge=0)
    """GPUs a rank of a job; None: where the cluster has GPUs, one, or the part of one that the
    estimate of its memory asks for; else none."""
    gpu_memory_gib: float | None = Field(None, gt=0)
    """Memory of one GPU in GiB, which the memory of jobs is held against; None: that of the cluster's
    smallest GPU, asked when a run starts."""
    ranks: int = Field(1, ge=1)
    """Processes that share each training job (`adapt`, `heal`), with the decoder's layers spread over
    them."""
    most_ranks: int | None = Field(None, ge=1)
    """Up to how many a training job that runs out of GPU memory may be given; None: as many as one
    node has GPUs."""
    checkpoint_minutes: float | None = Field(5.0, ge=0)
    """A job that is killed while it trains or decodes goes on from what it kept this often; 0: after
    each step, null: never. Changes no result."""
    deadline_hours: float | None = Field(24.0, gt=0)
    """A job that takes longer is ended and tried again; null: it may take for ever."""
    wait_minutes: float = Field(60.0, ge=0)
    """How long a job waits for room that the cluster does not have (a lost node, an autoscaler that
    is still at work) before it fails."""
    idle_seconds: float = Field(60.0, ge=0)
    """Processes without work are ended after this time, so that an autoscaler can give the node
    back."""

    autoscaling: bool = False
    """The cluster grows on demand: ask for `limits.jobs` jobs at once, whatever it has now."""


class Limits(Settings):
    """How much of the cluster a sweep may take."""

    gpus: float | None = Field(None, ge=0)
    """The most GPUs at once."""
    jobs: int | None = Field(None, ge=1)
    """The most jobs at once."""
    gpu_hours: float | None = Field(None, ge=0)
    """GPU-hours the run may use, those of earlier drivers counted; then nothing new is started."""


class PriorityEntry(Settings):
    """Cells of the results that come first; what they need comes as early."""

    model: str | list[str] | None = None
    encoder: str | list[str] | None = None
    task: Task | list[Task] | None = None
    language: str | list[str] | None = None
    """Of the speech."""
    depth: int | list[int] | None = None
    heal: HealMode | list[HealMode] | None = None

    def covers(self, cell: dict[str, Any]) -> bool:
        """Whether a cell is among them."""
        given = (
            (self.model, "model"),
            (self.encoder, "encoder"),
            (self.task, "task"),
            (self.language, "source_language"),
            (self.depth, "depth"),
            (self.heal, "heal"),
        )
        return all(
            cell.get(name) in (wanted if isinstance(wanted, list) else [wanted])
            for wanted, name in given
            if wanted is not None
        )
