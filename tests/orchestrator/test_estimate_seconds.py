"""Times of stages from finished ones: what they predict, what they fall back on, what they read."""

import json
import os

import pytest

from orchestrator.estimate.seconds import READ_A_KIND, stage_seconds, stage_times
from orchestrator.plan import build_plan
from orchestrator.reuse import assess
from orchestrator.sources import DigestCache
from orchestrator.store import open_store
from orchestrator.sweep import parse_sweep

TINY = {
    "name": "tiny",
    "models": [{"decoder": "lab:llama-tiny"}],
    "encoders": [{"encoder": "lab:whisper-tiny"}],
    "tasks": [{"task": "asr", "language": ["en", "de"], "data": "lab:speech-tiny"}],
    "depths": [0, 1, 2],
    "selectors": ["last"],
    "heal": {"modes": ["none", "joint"]},
}


def plan_of(folder, **changes):
    plan = build_plan(parse_sweep({**TINY, **changes}), folder, DigestCache(folder / "d.json"))
    assess(plan, open_store(folder / "empty"))
    return plan


def finish(store, plan, node, seconds, device="cpu (x86_64)", age=0):
    """The stage.json a finished stage leaves, with seconds of our choice."""
    key = plan.key(node.id)
    stage = {
        "kind": node.kind,
        "key": key,
        "params": node.params,
        "inputs": {r: [plan.nodes[o].kind, plan.key(o)] for r, o in node.inputs.items()},
        "sources": {r: s.fingerprint for r, s in node.sources.items()},
        "provenance": {"seconds": seconds, "cpu_seconds": seconds, "device": device},
    }
    store.commit(store.begin(node.kind, key), node.kind, key, stage)
    if age:
        os.utime(store.path(node.kind, key), (age, age))


def finish_builds(store, plan, seconds=5.0):
    for node in plan.by_kind("build"):
        finish(store, plan, node, seconds)


def heals(plan, depth):
    return [n for n in plan.by_kind("heal") if f"/d{depth}/joint" in n.id]


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "store")


def test_time_that_grows_with_steps_is_predicted_for_steps_never_seen(tmp_path, store):
    for steps in (50, 100, 200):
        plan = plan_of(tmp_path, heal={"steps": steps, "modes": ["none", "joint"]})
        finish_builds(store, plan)
        for node in heals(plan, 0):
            finish(store, plan, node, 0.1 * steps)
    plan = plan_of(tmp_path, heal={"steps": 1000, "modes": ["none", "joint"]})
    found = stage_seconds(plan, store)
    assert [found[n.id] for n in heals(plan, 0)] == pytest.approx([100.0, 100.0], rel=0.03)


def test_a_pruned_decoder_takes_less_time(tmp_path, store):
    plan = plan_of(tmp_path)
    finish_builds(store, plan)
    for node in heals(plan, 0):
        finish(store, plan, node, 30.0)
    found = stage_seconds(plan, store)
    whole, cut = (found[heals(plan, depth)[0].id] for depth in (0, 2))
    assert 2 / 3 * whole <= cut < whole


def test_evaluations_grow_with_the_utterances_of_their_test_set(tmp_path, store):
    plan = plan_of(tmp_path)
    finish_builds(store, plan)
    evaluations = list(plan.by_kind("evaluate"))
    tests = [n for n in evaluations if "/test/" in n.id and "/d0/" in n.id]
    for node in [*heals(plan, 0), *plan.by_kind("heal")]:
        finish(store, plan, node, 1.0)
    for node in tests:
        finish(store, plan, node, 24.0)  # of 24 utterances
    found = stage_seconds(plan, store)
    held_out = next(n.id for n in evaluations if "/ood/" in n.id and "/d0/" in n.id)
    assert found[held_out] == pytest.approx(16.0)  # of 16


def test_one_slow_stage_does_not_move_the_estimate(tmp_path, store):
    plan = plan_of(tmp_path)
    finish_builds(store, plan)
    maps = [n for n in plan.by_kind("map") if n.params["modality"] == "speech"]
    for seed, seconds in enumerate((10.0, 10.0, 10.0, 500.0)):
        other = plan_of(tmp_path, adapt={"seed": seed})
        finish_builds(store, other)
        node = next(n for n in other.by_kind("map") if n.id == maps[0].id)
        finish(store, other, node, seconds)
    assert stage_seconds(plan, store)[maps[0].id] == pytest.approx(10.0)


def test_stages_on_the_device_most_of_them_ran_on_count(tmp_path, store):
    for seed in range(7):
        plan = plan_of(tmp_path, adapt={"seed": seed})
        finish_builds(store, plan)
        card = seed < 4
        for node in plan.by_kind("adapt"):
            finish(store, plan, node, 2.0 if card else 60.0, "H100" if card else "cpu (x86_64)")
        for node in plan.by_kind("encode"):
            finish(store, plan, node, 1.0, "H100")
    times = stage_times(plan, store)
    assert times.device == "H100"
    assert times.seconds["adapt/llama-tiny+whisper-tiny/all"] == pytest.approx(2.0)


def test_a_model_of_its_own_speed_is_not_judged_by_another(tmp_path, store):
    for seed in range(4):
        for model, seconds in (("llama", 10.0), ("qwen", 90.0)):
            models = [{"decoder": f"lab:{model}-tiny"}]
            plan = plan_of(tmp_path, models=models, adapt={"seed": seed})
            finish_builds(store, plan)
            for node in plan.by_kind("adapt"):
                finish(store, plan, node, seconds)
    plan = plan_of(tmp_path, models=[{"decoder": "lab:llama-tiny"}, {"decoder": "lab:qwen-tiny"}])
    found = stage_seconds(plan, store)
    assert found["adapt/llama-tiny+whisper-tiny/all"] == pytest.approx(10.0)
    assert found["adapt/qwen-tiny+whisper-tiny/all"] == pytest.approx(90.0)


def test_with_nothing_finished_the_plans_own_figures_stand_and_it_says_so(tmp_path, store):
    plan = plan_of(tmp_path)
    times = stage_times(plan, store)
    assert times.seconds == {node.id: node.cost for node in plan.nodes.values()}
    assert times.basis == "rough: nothing was finished in this store yet"


def test_kinds_without_a_finished_stage_are_named(tmp_path, store):
    plan = plan_of(tmp_path)
    finish_builds(store, plan, 3.0)
    times = stage_times(plan, store)
    built = len(list(plan.by_kind("build")))
    assert times.basis.startswith(f"from {built} finished stages on cpu (x86_64); rough for ")
    assert "adapt" in times.basis
    assert "build" not in times.basis


def test_of_many_finished_stages_the_newest_are_read(tmp_path, store):
    plan = plan_of(tmp_path)
    finish_builds(store, plan)
    for number in range(READ_A_KIND + 20):
        folder = store.path("adapt", f"{number:032x}")
        folder.mkdir(parents=True)
        node = next(plan.by_kind("adapt"))
        stage = {
            "kind": "adapt",
            "params": node.params,
            "inputs": {r: [plan.nodes[o].kind, plan.key(o)] for r, o in node.inputs.items()},
            "sources": {},
            "provenance": {"seconds": 7.0 if number >= 20 else 7000.0, "device": "cpu (x86_64)"},
        }
        (folder / "stage.json").write_text(json.dumps(stage))
        os.utime(folder, (1000 + number, 1000 + number))
    times = stage_times(plan, store)
    assert times.measured["adapt"] == READ_A_KIND
    assert times.seconds["adapt/llama-tiny+whisper-tiny/all"] == pytest.approx(7.0)


def test_stages_written_by_another_version_are_passed_over(tmp_path, store):
    plan = plan_of(tmp_path)
    folder = store.path("adapt", "0" * 32)
    folder.mkdir(parents=True)
    for content in ("", "[]", '{"params": {}}', '{"kind": "adapt", "params": {"settings": 3}}'):
        (folder / "stage.json").write_text(content)
        assert stage_times(plan, store).finished == 0
