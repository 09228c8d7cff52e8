"""A lease: `ranks` worker processes held together on the cluster, serving calls one after another.

One placement group with one actor per rank. Its processes live until the lease is closed; a fault
in one ends them all. Ray's own retries are off: the driver alone can tell what is worth a retry.
"""

import json
import socket
from dataclasses import dataclass
from importlib import import_module
from typing import Any

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824"}
"""Keep freed memory in the process: tensors of a training step come and go every time."""
SEGMENTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""On GPUs: batches of many lengths otherwise leave memory in pieces that fit nothing."""


@dataclass(frozen=True)
class Shape:
    """What a lease holds."""

    ranks: int = 1
    cpus: float = 1.0
    """Per rank."""
    gpus: float = 0.0
    """Per rank; a fraction shares a card."""
    threads: int | None = None
    """Per rank; None: as many as CPUs. Another number can change a result's last bits."""
    memory: int = 0
    """Bytes of the node's memory per rank that nobody else may be given; 0: not accounted for."""

    def bundle(self) -> dict[str, float]:
        """What one rank asks of Ray."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory)}
        return {name: amount for name, amount in asked.items() if amount}


class Rank:
    """The process of one rank. Calls a function named `module:name` with plain data."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self._socket: socket.socket | None = None
        self._meeting: tuple[str, int, int] | None = None

    def open_meeting(self) -> tuple[str, int]:
        """Listen where the other ranks will look for this one; the open socket stays here."""
        import ray

        host = ray.util.get_node_ip_address()
        self._socket = socket.create_server((host, 0))
        port = self._socket.getsockname()[1]
        self._meeting = (host, port, self._socket.fileno())
        return host, port

    def go_to_meeting(self, meeting: tuple[str, int]) -> None:
        """Learn where rank 0 listens."""
        if self._meeting is None:
            self._meeting = (*meeting, -1)

    def call(self, target: str, payload: str) -> str:
        """Import and call `target(payload, rank, ranks, meeting)`; its answer is plain data."""
        module, _, name = target.partition(":")
        function = getattr(import_module(module), name)
        return json.dumps(function(json.loads(payload), self.rank, self.ranks, self._meeting))


class LeaseLost(Exception):
    """A process of the lease died, or its node did.

    Attributes:
        reason: `preempted` or `host-oom`.
        node_died: whether its node went with it.
    """

    def __init__(self, message: str, reason: str = "preempted", *, node_died: bool = False) -> None:
        super().__init__(message)
        self.reason, self.node_died = reason, node_died


class CallFailed(Exception):
    """The function could not be called or raised: its process lives, and would do so again."""


class Lease:
    """Worker processes held together.

    They are packed on one node where they fit, and spread over several where they must be. Nothing
    waits here: until there is room on the cluster the calls wait in a queue of Ray's.

    Args:
        shape: how many ranks, and what each takes.
    """

    def __init__(self, shape: Shape) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.shape = shape
        self._group = placement_group([shape.bundle()] * shape.ranks, strategy="PACK")
        self._room: Any = self._group.ready()
        threads = str(shape.threads or max(1, int(shape.cpus)))
        environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **MALLOC}
        if shape.gpus:
            environment |= SEGMENTS
        else:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        actor = ray.remote(max_restarts=0, max_task_retries=0)(Rank)
        self._actors = [
            actor.options(
                num_cpus=shape.cpus,
                num_gpus=shape.gpus,
                memory=shape.memory or None,
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=index
                ),
            ).remote(index, shape.ranks)
            for index in range(shape.ranks)
        ]
        if shape.ranks > 1:
            meeting = self._actors[0].open_meeting.remote()
            for other in self._actors[1:]:
                other.go_to_meeting.remote(meeting)

    def placed(self) -> bool:
        """Whether the cluster has found room for it."""
        import ray

        if self._room is not None and ray.wait([self._room], timeout=0)[0]:
            self._room = None
        return self._room is None

    def submit(self, target: str, payload: dict[str, Any]) -> list[Any]:
        """Start a call on every rank.

        Returns:
            One Ray reference per rank, for `wait` and `answer`.
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
        raise LeaseLost(_first_line(error), node_died="node has died" in str(error)) from None
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
