"""A lease: `ranks` worker processes held together on the cluster, serving calls one after another.

One placement group with one actor per rank. Its processes live until the lease is closed; a fault
in one ends them all. Ray's own retries are off: the driver alone can tell what is worth a retry.
"""

import json
from dataclasses import dataclass
from importlib import import_module
from typing import Any

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824"}
"""Keep freed memory in the process: tensors of a training step come and go every time."""


@dataclass(frozen=True)
class Shape:
    """What a lease holds."""

    ranks: int = 1
    cpus: float = 1.0
    """Per rank."""
    gpus: float = 0.0
    """Per rank."""


class Rank:
    """The process of one rank. Calls a function named `module:name` with plain data."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def call(self, target: str, payload: str) -> str:
        """Import and call `target(payload, rank, ranks)`; its answer is plain data."""
        module, _, name = target.partition(":")
        function = getattr(import_module(module), name)
        return json.dumps(function(json.loads(payload), self.rank, self.ranks))


class LeaseLost(Exception):
    """A process of the lease died, or its node did.

    Attributes:
        reason: `preempted` or `host-oom`.
    """

    def __init__(self, message: str, reason: str = "preempted") -> None:
        super().__init__(message)
        self.reason = reason


class CallFailed(Exception):
    """The function could not be called or raised: its process lives, and would do so again."""


class Lease:
    """Worker processes held together.

    Args:
        shape: how many ranks, and what each takes.
    """

    def __init__(self, shape: Shape) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.shape = shape
        bundle = {"CPU": shape.cpus} | ({"GPU": shape.gpus} if shape.gpus else {})
        self._group = placement_group([bundle] * shape.ranks, strategy="PACK")
        threads = str(max(1, int(shape.cpus)))
        environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **MALLOC}
        if not shape.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        actor = ray.remote(max_restarts=0, max_task_retries=0)(Rank)
        self._actors = [
            actor.options(
                num_cpus=shape.cpus,
                num_gpus=shape.gpus,
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=index
                ),
            ).remote(index, shape.ranks)
            for index in range(shape.ranks)
        ]

    def submit(self, target: str, payload: dict[str, Any]) -> list[Any]:
        """Start a call on every rank.

        Returns:
            One Ray reference per rank, for `ray.wait` and `answer`.
        """
        text = json.dumps(payload)
        return [actor.call.remote(target, text) for actor in self._actors]

    def close(self) -> None:
        """End the processes and give their place back. Safe to call twice."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def answer(reference: Any) -> Any:
    """The plain data a finished call returned.

    Raises:
        LeaseLost: the process died before it answered.
        CallFailed: the function could not be imported, or raised.
    """
    import ray

    try:
        return json.loads(ray.get(reference))
    except ray.exceptions.OutOfMemoryError as error:
        raise LeaseLost(_first_line(error), "host-oom") from None
    except ray.exceptions.RayActorError as error:
        raise LeaseLost(_first_line(error)) from None
    except ray.exceptions.RayTaskError as error:
        raise CallFailed(str(error.cause or error).strip()) from None
    except ray.exceptions.RayError as error:
        raise LeaseLost(f"{type(error).__name__}: {_first_line(error)}") from None


def wait(references: list[Any], seconds: float) -> list[Any]:
    """Those of the references whose calls ended, after at most `seconds`."""
    import ray

    if not references:
        return []
    done, _ = ray.wait(references, num_returns=1, timeout=seconds)
    if done:
        more, _ = ray.wait(references, num_returns=len(references), timeout=0)
        done = more or done
    return list(done)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
