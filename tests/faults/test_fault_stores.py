"""Artefacts that are damaged or lost, and a store that is away for a while."""

import os
import shutil
import time

import pytest
from drills import ADAPT, MAP, Drill, evaluate, heal

ADAPTER = "adapter/adapter_model.safetensors"


def flip(artefact, file):
    content = bytearray((artefact / file).read_bytes())
    content[len(content) // 2] ^= 1
    (artefact / file).write_bytes(content)


def truncate(artefact, file):
    os.truncate(artefact / file, (artefact / file).stat().st_size // 2)


def lose(artefact, file):
    del file
    shutil.rmtree(artefact)


DAMAGE = pytest.mark.parametrize("damage", [flip, truncate, lose])


@DAMAGE
def test_a_result_damaged_between_runs(tmp_path, nodes, undisturbed, damage):
    drill = finished(tmp_path, nodes, undisturbed)
    damage(drill.artefact(evaluate(1)), "scores.json")
    drill.finish()
    drill.holds(undisturbed, anew=[evaluate(1)])


@DAMAGE
def test_an_input_damaged_between_runs(tmp_path, nodes, undisturbed, damage):
    drill = finished(tmp_path, nodes, undisturbed)
    shutil.rmtree(drill.artefact(evaluate(1)))
    damage(drill.artefact(heal(1)), ADAPTER)
    drill.finish()
    drill.holds(undisturbed, anew=[heal(1), evaluate(1)])


def finished(tmp_path, nodes, undisturbed):
    """A drill that ran to its end before."""
    nodes.have(1)
    drill = Drill(tmp_path / "drill", nodes.temporary, nodes.address)
    shutil.copytree(undisturbed.store, drill.store)
    shutil.copytree(undisturbed.folder / "runs", drill.folder / "runs")
    return drill


@DAMAGE
def test_an_input_damaged_while_a_run_is_under_way(drill, nodes, undisturbed, damage):
    nodes.have(1)  # so that the process which made it is to read it
    drill.plan_faults({evaluate(1): {"do": "wait before"}})
    driver = drill.start()
    drill.wait_for_stall(driver)
    damage(drill.artefact(heal(1)), ADAPTER)
    drill.release()
    drill.ends(driver, 0)
    drill.holds(undisturbed, anew=[heal(1)])


@DAMAGE
def test_a_result_damaged_while_a_run_is_under_way(drill, nodes, undisturbed, damage):
    nodes.have(1)
    drill.plan_faults({evaluate(2): {"do": "wait before"}})
    driver = drill.start()
    drill.wait_for_stall(driver)
    damage(drill.artefact(evaluate(0)), "scores.json")
    drill.release()
    drill.ends(driver, 0)
    drill.holds(undisturbed, anew=[evaluate(0)])


def test_what_everything_else_needs_is_lost_while_a_run_is_under_way(drill, nodes, undisturbed):
    nodes.have(1)
    drill.plan_faults({heal(1): {"do": "wait before"}})
    driver = drill.start()
    drill.wait_for_stall(driver)
    for stage in (ADAPT, MAP):
        shutil.rmtree(drill.artefact(stage))
    drill.release()
    drill.ends(driver, 0)
    assert drill.tables() == undisturbed.tables(), drill.story()
    made = {e["id"] for e in drill.events("done") if not e.get("reused")}
    assert {ADAPT, MAP} <= made


def test_a_store_that_is_away_for_a_while(drill, nodes, undisturbed):
    nodes.have(1)
    drill.plan_faults({heal(1): {"do": "stall", "step": 5}})
    driver = drill.start()
    drill.wait_for_stall(driver)
    away = drill.folder / "away"
    drill.store.rename(away)
    drill.release()
    drill.wait_for("word of the store", lambda: drill.events("waiting"), driver)
    time.sleep(3.0)
    assert not drill.store.exists(), "nothing was made in its place"
    away.rename(drill.store)
    drill.ends(driver, 0)
    drill.holds(undisturbed)
    assert not drill.events("failed")
