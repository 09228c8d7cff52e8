"""Lost workers, lost nodes and nodes that come late, on a cluster of several nodes."""

import signal

import psutil
import pytest
from drills import Drill, heal


def test_a_worker_killed_in_mid_heal(drill, nodes, undisturbed):
    nodes.have(1, 1)
    drill.plan_faults({heal(1): {"do": "stall", "step": 5}})
    driver = drill.start()
    drill.wait_for_stall(driver)
    psutil.Process(drill.tries(heal(1))[0]["pid"]).kill()
    drill.ends(driver, 0)
    drill.holds(undisturbed)
    assert [e["class"] for e in drill.events("retry", heal(1))] == ["preempted"]
    assert "step 5 of 8" in drill.log(heal(1), 2), "it went on from its checkpoint"


def test_a_node_killed_in_mid_heal(drill, nodes, undisturbed):
    nodes.have(1, 1)
    drill.plan_faults({heal(1): {"do": "stall", "step": 5}})
    driver = drill.start()
    drill.wait_for_stall(driver)
    lost = drill.tries(heal(1))[0]["node"]
    nodes.kill(lost)
    drill.ends(driver, 0)
    drill.holds(undisturbed)
    assert [e["class"] for e in drill.events("retry", heal(1))] == ["preempted"]
    assert drill.tries(heal(1))[-1]["node"] != lost
    assert "step 5 of 8" in drill.log(heal(1), 2), "it went on from its checkpoint"


def test_a_node_that_joins_late_gets_work(drill, nodes, undisturbed):
    nodes.have(1)
    drill.plan_faults({heal(depth): {"do": "stall", "step": 5} for depth in (0, 1, 2)})
    driver = drill.start()
    drill.wait_for_stall(driver)
    assert len(drill.events("start")) == 1, "there is room for one"
    nodes.add()
    drill.wait_for("a second stage at work", lambda: len(drill.events("start")) == 2, driver)
    drill.release()
    drill.ends(driver, 0)
    drill.holds(undisturbed)
    used = {t["node"] for depth in (0, 1, 2) for t in drill.tries(heal(depth))}
    assert len(used) == 2
    assert [(e["before"], e["after"]) for e in drill.events("capacity")] == [(1, 2)]


def test_a_stage_whose_node_is_gone_waits_for_another(drill, nodes, undisturbed):
    nodes.have(1)
    drill.plan_faults({heal(1): {"do": "stall", "step": 5}})
    driver = drill.start()
    drill.wait_for_stall(driver)
    nodes.kill(drill.tries(heal(1))[0]["node"])
    drill.wait_for("word of the lost node", lambda: drill.events("capacity"), driver)
    nodes.add()
    drill.ends(driver, 0)
    drill.holds(undisturbed)


TWO_RANKS = ("resources.ranks=2", "depths=[1]")


@pytest.fixture(scope="module")
def undisturbed_ranks(tmp_path_factory, nodes, undisturbed):
    """A finished drill whose heals were trained by two ranks."""
    nodes.have(2)
    drill = Drill(tmp_path_factory.mktemp("ranks") / "drill", nodes.temporary, nodes.address)
    drill.copy_from(undisturbed, "build", "encode", "adapt", "map")
    drill.finish(settings=TWO_RANKS)
    return drill


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_killed_in_mid_heal(drill, nodes, undisturbed_ranks, lost):
    nodes.have(1, 1)  # one rank on each
    drill.plan_faults({heal(1): {"do": "stall", "step": 5}})
    driver = drill.start(settings=TWO_RANKS)
    drill.wait_for_stall(driver)
    ranks = [psutil.Process(found["pid"]) for found in drill.tries(heal(1))]
    assert len(ranks) == 2
    ranks[lost].kill()
    drill.wait_for("the end of the other rank", lambda: not any(map(alive, ranks)), driver)
    drill.ends(driver, 0)
    drill.holds(undisturbed_ranks)
    assert [e["class"] for e in drill.events("retry", heal(1))] == ["preempted"]
    assert "step 5 of 8" in drill.log(heal(1), 2), "it went on from its checkpoint"


def test_no_rank_outlives_a_killed_driver(drill, nodes, undisturbed_ranks):
    nodes.have(2)
    drill.plan_faults({heal(1): {"do": "stall", "step": 5}})
    driver = drill.start(settings=TWO_RANKS)
    drill.wait_for_stall(driver)
    ranks = [psutil.Process(found["pid"]) for found in drill.tries(heal(1))]
    driver.kill()
    drill.ends(driver, -signal.SIGKILL)
    drill.wait_for("the end of both ranks", lambda: not any(map(alive, ranks)))
    drill.finish(settings=TWO_RANKS)
    drill.holds(undisturbed_ranks)


def alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
