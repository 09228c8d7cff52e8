"""Leases on a real Ray: processes live between calls, die together, and give their place back."""

import os
import sys
import time
from pathlib import Path

import pytest

from cluster.connection import Cluster, ClusterUnreachable
from cluster.lease import CallFailed, Lease, LeaseLost, Shape, answer, wait


@pytest.fixture(scope="module")
def cluster():
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{folder}:{before}" if before else folder
    with Cluster(cpus=2) as found:
        yield found
    sys.path.remove(folder)
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_capacity_is_what_was_asked_for(cluster):
    capacity = cluster.capacity()
    assert (capacity.cpus, capacity.gpus, capacity.nodes) == (2, 0, 1)


@pytest.mark.usefixtures("cluster")
def test_one_process_serves_call_after_call_and_ends_with_the_lease():
    lease = Lease(Shape())
    first = answer(lease.submit("lease_calls:describe", {"a": [1]})[0])
    second = answer(lease.submit("lease_calls:describe", {})[0])
    lease.close()
    lease.close()
    assert first["payload"] == {"a": [1]}
    assert (first["threads"], first["gpus"]) == ("1", "")
    assert first["pid"] == second["pid"]
    assert gone(first["pid"])


@pytest.mark.usefixtures("cluster")
def test_every_rank_answers():
    lease = Lease(Shape(ranks=2))
    answers = [answer(reference) for reference in lease.submit("lease_calls:describe", {})]
    lease.close()
    assert [(a["rank"], a["ranks"]) for a in answers] == [(0, 2), (1, 2)]
    assert answers[0]["pid"] != answers[1]["pid"]


@pytest.mark.usefixtures("cluster")
def test_a_killed_process_is_a_lost_lease_and_its_place_is_free_again():
    lease = Lease(Shape(cpus=2))
    reference = lease.submit("lease_calls:die", {})[0]
    assert wait([reference], 60) == [reference]
    with pytest.raises(LeaseLost) as lost:
        answer(reference)
    assert lost.value.reason == "preempted"
    lease.close()
    again = Lease(Shape(cpus=2))
    assert answer(again.submit("lease_calls:describe", {})[0])["rank"] == 0
    again.close()


@pytest.mark.usefixtures("cluster")
def test_a_function_that_cannot_be_called_is_told_apart_from_a_lost_process():
    lease = Lease(Shape())
    with pytest.raises(CallFailed, match="nosuchmodule"):
        answer(lease.submit("nosuchmodule:run", {})[0])
    assert answer(lease.submit("lease_calls:describe", {})[0])["rank"] == 0
    lease.close()


def test_wait_returns_in_time_when_nothing_ends():
    assert wait([], 0.1) == []


def test_ray_client_addresses_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="drops work"):
        Cluster("ray://head:10001")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:nonsense", "127.0.0.1:99999999"])
def test_an_address_where_nothing_listens_is_unreachable_at_once(address):
    with pytest.raises(ClusterUnreachable, match="no Ray cluster at"), Cluster(address):
        pass
