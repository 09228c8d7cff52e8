"""Stages that raise, hang, end in NaN or run out of memory."""

import json

import pandas as pd
import pytest
from drills import Drill, evaluate, heal

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _room(nodes):
    nodes.have(1)


@pytest.mark.parametrize(
    ("error", "failure"), [("OSError", "transient"), ("MemoryError", "host-oom")]
)
def test_what_may_pass_is_tried_again(drill, undisturbed, error, failure):
    drill.plan_faults({heal(1): {"do": "raise", "error": error, "times": 2}})
    drill.finish()
    drill.holds(undisturbed)
    assert [e["class"] for e in drill.events("retry")] == [failure] * 2
    assert error in drill.log(heal(1), 1)


def test_what_would_fail_again_leaves_a_hole_until_the_next_run(drill, undisturbed):
    drill.plan_faults({heal(1): {"do": "raise", "error": "ValueError"}})
    drill.finish(status=1)
    assert not drill.events("retry")
    (failed,) = drill.events("failed")
    assert (failed["id"], failed["class"]) == (heal(1), "invalid")
    assert "this stage has a bug" in failed["message"]
    results = pd.read_parquet(drill.run.report / "results.parquet")
    assert results.groupby("depth")["status"].unique().map(list).to_dict() == {
        0: ["done"], 1: ["blocked"], 2: ["done"],
    }  # fmt: skip
    drill.finish()
    drill.holds(undisturbed)


def test_what_hangs_is_ended_at_its_deadline(drill, undisturbed):
    drill.plan_faults({evaluate(1): {"do": "hang"}})
    drill.finish(settings=["resources.deadline_hours=0.006"])
    drill.holds(undisturbed)
    (retried,) = drill.events("retry", evaluate(1))
    assert retried["class"] == "transient"
    assert "0.006 hours (resources.deadline_hours)" in retried["message"]


def test_a_loss_that_is_no_number_is_told_with_its_step_and_utterances(drill, undisturbed):
    wrong = ["heal.lr_decoder=1e30", "resources.checkpoint_minutes=null"]
    drill.finish(settings=wrong, status=1)
    assert not drill.events("retry")
    failed = drill.events("failed")
    assert {(e["id"], e["class"]) for e in failed} == {(heal(d), "invalid") for d in (0, 1, 2)}
    for event in failed:
        assert "at step 2 (utterances" in event["message"]
    drill.finish()
    drill.holds(undisturbed)


def test_out_of_device_memory_with_nothing_left_to_halve(drill, tmp_path, nodes, undisturbed):
    """Then activations are computed again: the same numbers."""
    one = ["heal.micro_batch=1"]
    plain = another(tmp_path, nodes, undisturbed)
    plain.finish(settings=one)
    drill.plan_faults({heal(1): {"do": "raise", "error": "OutOfMemoryError"}})
    drill.finish(settings=one)
    drill.holds(plain)
    relieved(drill, heal(1), "activation checkpointing")


def test_out_of_device_memory_halves_the_micro_batch(drill, tmp_path, nodes, undisturbed):
    plain = another(tmp_path, nodes, undisturbed)
    plain.finish(settings=["heal.micro_batch=4"])
    drill.plan_faults({heal(0): {"do": "raise", "error": "OutOfMemoryError", "times": 2}})
    drill.finish()
    assert len(drill.events("retry")) == 2, "the others began where the first succeeded"
    tables = []
    for one in (plain, drill):
        results = pd.read_parquet(one.run.report / "results.parquet")
        tables.append(results.drop(columns="stage_key").to_csv())
    assert tables[0] == tables[1]
    for depth in (0, 1, 2):
        weights = [(one.artefact(heal(depth)) / ADAPTER).read_bytes() for one in (plain, drill)]
        assert weights[0] == weights[1]
        relieved(drill, heal(depth), "micro-batch 4 in place of 16")


def another(tmp_path, nodes, undisturbed):
    drill = Drill(tmp_path / "plain", nodes.temporary, nodes.address)
    drill.copy_from(undisturbed, "build", "encode", "adapt", "map")
    return drill


def relieved(drill, stage, text):
    """What was done differently is told wherever one might look for it."""
    made = json.loads((drill.artefact(stage) / "stage.json").read_text())
    assert made["provenance"]["relief"] == text
    told = {entry["id"]: entry["relief"] for entry in drill.status()["relief"]}
    assert told[stage] == text
    page = (drill.run.report / "index.html").read_text()
    assert text in page
