"""Connecting to Ray: an embedded cluster of this machine, or one that runs elsewhere."""

import logging
import os
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

PROBE_SECONDS = 10.0


class BadAddress(ValueError):
    """An address that must not be used; says why, and what to use."""


class ClusterUnreachable(Exception):
    """No Ray cluster answers at the address (which is not the same as a failed job)."""


@dataclass(frozen=True)
class Capacity:
    """What the cluster's living nodes have in all, and the most one node has."""

    cpus: float
    gpus: float
    nodes: int
    node_cpus: float
    node_gpus: float


class Cluster:
    """A connection to Ray, closed on leaving the `with` block.

    Args:
        address: None starts Ray embedded in this process, listening on loopback only; `auto` or
            `host:port` joins a running cluster.
        cpus: CPU slots of the embedded cluster; None: the machine's cores.

    Raises:
        ClusterUnreachable: nothing answers at `address`.
        BadAddress: an address of a kind that loses work.
    """

    def __init__(self, address: str | None = None, cpus: int | None = None) -> None:
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
        self.address, self.cpus = address, cpus

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
        """What the living nodes have, used or not."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = [float(node.get("CPU", 0)) for node in nodes]
        gpus = [float(node.get("GPU", 0)) for node in nodes]
        return Capacity(
            sum(cpus), sum(gpus), len(nodes), max(cpus, default=0), max(gpus, default=0)
        )


def _probe(address: str) -> None:
    """Ray itself tries a dead address for minutes before it gives up."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ClusterUnreachable(f"no Ray cluster at {address}: {error}") from None
