"""Connecting to Ray: an embedded cluster of this machine, or one that runs elsewhere."""

import logging
import os
import socket
import subprocess
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

PROBE_SECONDS = 10.0


class BadAddress(ValueError):
    """An address that must not be used; says why, and what to use."""


class ClusterUnreachable(Exception):
    """No Ray cluster answers at the address (which is not the same as a failed job)."""


@dataclass(frozen=True)
class Room:
    """What one living node has, used or not."""

    cpus: float
    gpus: float = 0.0
    memory: float = 0.0
    """Bytes that Ray may give to jobs."""


@dataclass(frozen=True)
class Capacity:
    """What the cluster's living nodes have, used or not."""

    rooms: tuple[Room, ...]

    @property
    def nodes(self) -> int:
        """Living nodes."""
        return len(self.rooms)

    @property
    def cpus(self) -> float:
        """CPUs in all."""
        return sum(room.cpus for room in self.rooms)

    @property
    def gpus(self) -> float:
        """GPUs in all."""
        return sum(room.gpus for room in self.rooms)

    @property
    def node_cpus(self) -> float:
        """The most CPUs one node has."""
        return max((room.cpus for room in self.rooms), default=0)

    @property
    def node_gpus(self) -> float:
        """The most GPUs one node has."""
        return max((room.gpus for room in self.rooms), default=0)


class Cluster:
    """A connection to Ray, closed on leaving the `with` block.

    Args:
        address: None starts Ray embedded in this process, listening on loopback only; `auto` or
            `host:port` joins a running cluster.
        cpus: CPU slots of the embedded cluster; None: the machine's cores.
        gpus: GPUs the embedded cluster declares; None: those it finds.

    Raises:
        ClusterUnreachable: nothing answers at `address`.
        BadAddress: an address of a kind that loses work.
    """

    def __init__(
        self, address: str | None = None, cpus: int | None = None, gpus: int | None = None
    ) -> None:
        if address is not None and address.startswith("ray://"):
            raise BadAddress(
                f"--address {address}: Ray Client drops work when the connection pauses; "
                "use auto or host:port on a machine of the cluster, or submit a Ray Job"
            )
        if address is not None and address.startswith(("http://", "https://")):
            raise BadAddress(
                f"--address {address} is a dashboard, which takes jobs (`layersweep submit`); "
                "to join the cluster from one of its machines, use auto or host:port"
            )
        self.address, self.cpus, self.gpus = address, cpus, gpus

    def __enter__(self) -> Self:
        # Ray's coming default for jobs without GPUs; set, it keeps Ray from warning about it.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if self.address is not None and ":" in self.address:
            _probe(self.address)
        import ray

        options: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "configure_logging": True,
        }
        if self.address is None:
            options |= {
                "address": "local",
                "num_cpus": self.cpus or os.cpu_count(),
                "num_gpus": self.gpus,
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
            }
        else:
            options["address"] = self.address
        try:
            ray.init(**options)
        except (ConnectionError, TimeoutError, RuntimeError) as error:
            where = self.address or "this machine"
            raise ClusterUnreachable(f"no Ray cluster at {where}: {error}") from None
        except Exception as error:
            # Ray has no class for this: its processes were not up within its own 30 s.
            if "timed out during startup" not in str(error):
                raise
            raise ClusterUnreachable(
                "Ray did not start within 30 s on this machine, which may be busy: try again"
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import ray

        ray.shutdown()

    def capacity(self) -> Capacity:
        """What the living nodes have now, used or not."""
        import ray

        return Capacity(
            tuple(
                Room(
                    float(node["Resources"].get("CPU", 0)),
                    float(node["Resources"].get("GPU", 0)),
                    float(node["Resources"].get("memory", 0)),
                )
                for node in ray.nodes()
                if node["Alive"]
            )
        )

    def card_bytes(self) -> int | None:
        """Memory of the smallest GPU of the cluster; None if it has none that torch can see."""
        import ray

        nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU", 0)]
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        look = ray.remote(max_retries=0, num_cpus=0, num_gpus=0)(_card_bytes)
        asked = [
            look.options(scheduling_strategy=strategy(node["NodeID"], soft=False)).remote()
            for node in nodes
        ]
        done, late = (
            ray.wait(asked, num_returns=len(asked), timeout=PROBE_SECONDS * 6)
            if asked
            else ([], [])
        )
        for reference in late:
            ray.cancel(reference, force=True)
        found = [size for size in map(_answered, done) if size]
        return min(found, default=None)


def _card_bytes() -> int | None:
    """Total memory of this node's smallest GPU, by the driver's own tool: needs no CUDA context."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return min(int(line) for line in printed.stdout.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _answered(reference: Any) -> int | None:
    import ray

    try:
        size: int | None = ray.get(reference)
    except ray.exceptions.RayError:
        return None
    return size


def _probe(address: str) -> None:
    """Ray itself tries a dead address for minutes before it gives up."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ClusterUnreachable(f"no Ray cluster at {address}: {error}") from None
