"""Drivers that are killed, told to end, doubled and replaced."""

import signal
import time

import psutil
from drills import heal, living

STALL = {"do": "stall", "step": 5}


def test_a_killed_driver_leaves_nothing_behind_and_is_followed_by_another(own_cluster, undisturbed):
    drill = own_cluster
    drill.plan_faults({heal(1): STALL})
    driver = drill.start()
    drill.wait_for_stall(driver)
    drill.wait_for("a finished heal", lambda: drill.events("done", heal(0)), driver)
    assert living(drill.temporary, "ray::Rank")
    driver.kill()
    drill.ends(driver, -signal.SIGKILL)
    drill.wait_for("the end of all its processes", lambda: not living(drill.temporary))
    drill.finish()
    drill.holds(undisturbed)
    assert "step 5 of 8" in drill.log(heal(1)), "it went on from its checkpoint"


def test_told_to_end_it_keeps_a_checkpoint_and_goes_on_from_there(drill, nodes, undisturbed):
    nodes.have(1)
    drill.plan_faults({heal(1): STALL})
    driver = drill.start()
    drill.wait_for_stall(driver)
    driver.send_signal(signal.SIGTERM)
    drill.wait_for("the driver's word", lambda: drill.events("stopping"))
    time.sleep(2.0)  # from one look of a worker at whether to stop to the next
    drill.release()
    drill.ends(driver, 130)
    assert "told to end" in drill.printed(driver)
    (stopped,) = drill.events("stopped")
    assert stopped["id"] == heal(1)
    assert list(drill.store.glob("heal/.*.checkpoint/step-00000006.*"))
    drill.finish()
    drill.holds(undisturbed)
    assert "step 6 of 8" in drill.log(heal(1))


def test_told_twice_it_leaves_at_once(drill, nodes, undisturbed):
    nodes.have(1)
    drill.plan_faults({heal(1): {"do": "hang"}})
    driver = drill.start()
    drill.wait_for("a stage that hangs", (drill.folder / "hanging").exists, driver)
    driver.send_signal(signal.SIGTERM)
    drill.wait_for("the driver's word", lambda: drill.events("stopping"))
    driver.send_signal(signal.SIGTERM)
    drill.ends(driver, 130)
    assert not drill.events("stopped"), "it did not wait for what hangs"
    drill.finish()
    drill.holds(undisturbed)


def test_a_second_driver_is_refused(drill, nodes, undisturbed):
    nodes.have(1)
    drill.plan_faults({heal(1): STALL})
    first = drill.start()
    drill.wait_for_stall(first)
    second = drill.start()
    drill.ends(second, 3)
    assert f"another driver holds run drill (process {first.pid}" in drill.printed(second)
    drill.release()
    drill.ends(first, 0)
    drill.holds(undisturbed)


def test_a_driver_whose_run_is_taken_over_stops(drill, nodes, undisturbed):
    nodes.have(1, 1)
    drill.plan_faults({heal(1): {"do": "wait after"}})
    first = drill.start(settings=("limits.jobs=1",))
    drill.wait_for_stall(first)
    second = drill.start("--takeover", settings=("limits.jobs=1",))
    drill.ends(first, 3)
    assert "another driver has taken this run over" in drill.printed(first)
    drill.ends(second, 0)
    drill.holds(undisturbed)


def test_nothing_is_committed_for_a_driver_that_was_taken_for_dead(drill, nodes, undisturbed):
    nodes.have(1, 1)
    drill.plan_faults({heal(1): {"do": "wait after"}})
    first = drill.start(settings=("limits.jobs=1",))
    drill.wait_for_stall(first)
    first.send_signal(signal.SIGSTOP)  # it cannot notice, and its worker works on
    worker = psutil.Process(drill.tries(heal(1))[0]["pid"])
    second = drill.start("--takeover", settings=("limits.jobs=1",))
    drill.ends(second, 0)
    before = fingerprint(drill)
    assert worker.is_running()
    drill.release()
    drill.wait_for("the verdict of the first's worker", lambda: "(fenced)" in drill.log(heal(1)))
    first.send_signal(signal.SIGCONT)
    drill.ends(first, 3)
    drill.holds(undisturbed)
    assert fingerprint(drill) == before


def fingerprint(drill):
    """Every file of the store and when it was written."""
    return {
        str(path): path.stat().st_mtime_ns
        for path in drill.store.glob("*/*/*")
        if not path.parent.name.startswith(".")
    }
