"""One undisturbed run for the session, clusters of several nodes, and a look at what is left behind."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from drills import ENVIRONMENT, Drill, all_gone
from ray.cluster_utils import Cluster

LOOPBACK = "127.0.0.2"
"""Ray takes the usual address of this machine for the one that others see, and finds nobody there."""
QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture(scope="session")
def short():
    """A folder with a short name: the path of a Unix socket has at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ls-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, request, short):
    """A finished drill in which nothing went wrong; made once, for all of pytest's processes."""
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent
    made = shared / "undisturbed.made"
    with (shared / "undisturbed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        drill = Drill(shared / "undisturbed", short)
        if not made.exists():
            drill.finish()
            made.touch()
    return drill


class Nodes:
    """A cluster of several nodes on this machine; the head gives no work a place."""

    def __init__(self, temporary):
        self.temporary = temporary
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args=self._node(num_cpus=0)
            | {"include_dashboard": False, "_system_config": QUICK_TO_NOTICE},
        )
        self.address = self.cluster.address

    def _node(self, **more):
        return {
            "node_ip_address": LOOPBACK,
            "object_store_memory": 80 * 2**20,
            "memory": 8 * 2**30,
            **more,
        }

    def add(self, cpus=1):
        return self.cluster.add_node(**self._node(num_cpus=cpus))

    def have(self, *cpus):
        """Have exactly these nodes."""
        for node in list(self.cluster.worker_nodes):
            self.cluster.remove_node(node, allow_graceful=False)
        for number in cpus:
            self.add(number)

    def kill(self, node_id):
        """SIGKILL a node's raylet."""
        node = next(n for n in self.cluster.worker_nodes if n.node_id == node_id)
        raylet = node.all_processes["raylet"][0].process
        raylet.kill()
        raylet.wait()  # its workers take a zombie for a living parent

    def close(self):
        self.cluster.shutdown()
        all_gone(self.temporary)


@pytest.fixture(scope="module")
def nodes(short):
    """A running cluster; a test says which nodes it wants."""
    temporary = Path(tempfile.mkdtemp(prefix="n", dir=short))
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT, RAY_TMPDIR=str(temporary))
    try:
        found = Nodes(temporary)
        yield found
        found.close()
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def drill(tmp_path, nodes, undisturbed):
    """A drill on the cluster, with models, features, base and maps made; heals are to be done."""
    made = Drill(tmp_path / "drill", nodes.temporary, nodes.address)
    made.copy_from(undisturbed, "build", "encode", "adapt", "map")
    yield made
    end(made)
    all_gone(nodes.temporary, "ray::Rank")


@pytest.fixture
def own_cluster(tmp_path, short, undisturbed):
    """A drill whose drivers start Ray themselves."""
    temporary = Path(tempfile.mkdtemp(prefix="d", dir=short))
    made = Drill(tmp_path / "drill", temporary)
    made.copy_from(undisturbed, "build", "encode", "adapt", "map")
    yield made
    end(made)
    all_gone(temporary)


def end(drill):
    """A test that failed must not leave a driver behind."""
    for driver in drill.drivers:
        if driver.poll() is None:
            driver.kill()
            driver.wait()
