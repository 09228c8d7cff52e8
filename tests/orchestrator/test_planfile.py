"""The plan a run folder keeps, and what a new plan says it does differently and why."""

import dataclasses
import json

import pytest

from orchestrator.plan import build_plan
from orchestrator.planfile import difference, planned_stages, read_plan, write_plan
from orchestrator.reuse import assess
from orchestrator.runs import RunFolder
from orchestrator.sources import DigestCache
from orchestrator.store import open_store
from orchestrator.sweep import parse_sweep
from workers import stages

TINY = {
    "name": "tiny",
    "models": [{"decoder": "lab:llama-tiny"}],
    "encoders": [{"encoder": "lab:whisper-tiny"}],
    "tasks": [{"task": "asr", "language": ["en", "de"], "data": "lab:speech-tiny"}],
    "depths": [0, 1, 2],
    "selectors": ["consensus", "last"],
    "heal": {"modes": ["none", "joint"]},
}


def plan_of(folder, **changes):
    plan = build_plan(parse_sweep({**TINY, **changes}), folder, DigestCache(folder / "d.json"))
    assess(plan, open_store(folder / "empty"))
    return plan


def written(plan):
    return json.loads(write_plan(plan))


def changes(folder, before, after):
    found = difference(written(plan_of(folder, **before)), plan_of(folder, **after))
    assert found is not None
    return found


def own_reasons(found):
    """Reasons by kind, without those that only follow another stage."""
    kinds = {}
    for node_id, reasons in found.changed.items():
        own = [reason for reason in reasons if not reason.startswith("follows ")]
        if own:
            kinds.setdefault(node_id.split("/")[0], set()).update(own)
    return kinds


def test_a_run_folder_gives_back_every_stage_with_what_it_waits_for(tmp_path):
    sweep, plan = parse_sweep(TINY), plan_of(tmp_path)
    folder = RunFolder(tmp_path / "run")
    folder.start(sweep, tmp_path, str(tmp_path / "store"), plan)
    records = folder.records()
    assert list(records) == list(plan.nodes)
    assert {i: set(r.dependencies) for i, r in records.items()} == {
        node.id: node.dependencies() for node in plan.nodes.values()
    }
    data = read_plan(folder.path / "plan.json")
    assert [node["key"] for node in data["nodes"]] == [plan.key(i) for i in plan.nodes]


def test_parameters_that_stages_share_are_written_once(tmp_path):
    data = written(plan_of(tmp_path))
    evaluations = [node for node in data["nodes"] if node["kind"] == "evaluate"]
    assert len({node["params"] for node in evaluations}) == 2 * 2  # languages, test sets
    assert len(data["choices"]) == 2  # consensus at two depths; last is determined


def test_the_same_sweep_is_no_difference(tmp_path):
    assert not changes(tmp_path, {}, {})
    assert not changes(tmp_path, {}, {"report": {"tolerance": 3.0}, "resources": {"cpus": 2}})


def test_a_depth_more_adds_and_one_less_removes(tmp_path):
    found = changes(tmp_path, {}, {"depths": [0, 1, 3]})
    assert found.added
    assert all("/d3/" in node_id for node_id in found.added)
    assert all("/d2/" in node_id for node_id in found.removed)
    assert not found.changed


def test_a_changed_setting_is_named_with_both_values_where_it_counts(tmp_path):
    found = changes(tmp_path, {"heal": {"steps": 50}}, {"heal": {"steps": 80}})
    assert own_reasons(found) == {"heal": {"settings.steps 50 → 80"}}
    evaluation = "evaluate/llama-tiny+whisper-tiny/asr-en/test/last/d1/joint/s0"
    followed = "heal/llama-tiny+whisper-tiny/asr-en/last/d1/joint/s0"
    assert found.changed[evaluation] == (f"follows {followed}",)
    assert not [i for i in found.changed if "/none" in i]


def test_stages_that_wait_for_a_changed_one_follow_it_even_while_undetermined(tmp_path):
    found = changes(tmp_path, {}, {"adapt": {"lora": {"rank": 8}}})
    assert own_reasons(found) == {"adapt": {"settings.lora.rank 16 → 8"}}
    heal = "heal/llama-tiny+whisper-tiny/asr-en/consensus/d1/joint/s0"
    assert found.changed[heal] == ("follows adapt/llama-tiny+whisper-tiny/all",)


def test_another_way_to_choose_is_named(tmp_path):
    found = changes(tmp_path, {}, {"maps": {"pool": "audio"}})
    assert own_reasons(found) == {"heal": {"choice.pool all → audio"}}
    tasks = [{**TINY["tasks"][0], "language": ["en", "de", "fr"]}]
    more = changes(tmp_path, {"share": {"base": False}}, {"share": {"base": False}, "tasks": tasks})
    assert own_reasons(more)["heal"] == {"chosen from 3 maps, 1 of them new"}


def test_a_block_chosen_since_is_no_change(tmp_path):
    last, plan = written(plan_of(tmp_path)), plan_of(tmp_path)
    for node in plan.nodes.values():
        if node.choice is not None:
            plan.determine(node.id, 1)
    assert not difference(last, plan)
    assert not difference(written(plan), plan_of(tmp_path))


def test_another_block_is_named(tmp_path):
    both = []
    for start in (1, 2):
        plan = plan_of(tmp_path)
        for node in plan.nodes.values():
            if node.choice is not None:
                plan.determine(node.id, start)
        both.append(plan)
    found = difference(written(both[0]), both[1])
    assert own_reasons(found) == {"heal": {"block.start 1 → 2"}}


def test_data_that_changed_are_named_by_fingerprint(tmp_path):
    def plan_with(text):
        manifest = tmp_path / "dev.jsonl"
        (tmp_path / "a.wav").write_bytes(b"RIFF")
        row = {"audio_filepath": "a.wav", "text": text, "duration": 1.0}
        manifest.write_text(json.dumps(row) + "\n")
        task = {"task": "asr", "language": "en", "train": "dev.jsonl", "dev": "dev.jsonl"}
        test = [{"name": "t", "data": "dev.jsonl"}]
        return plan_of(tmp_path, tasks=[{**task, "test": test}])

    before = written(plan_with("a"))
    after = plan_with("b")
    found = difference(before, after)
    # The label of a manifest's features has its digest: those are other stages.
    assert {i.split("/")[0] for i in found.added} == {"encode"}
    reasons = own_reasons(found)["map"]
    assert any(
        reason.startswith("data: manifest:") and " → manifest:" in reason for reason in reasons
    )


def test_a_new_version_of_the_code_is_named(tmp_path, monkeypatch):
    last = written(plan_of(tmp_path))
    newer = dataclasses.replace(stages.STAGES["evaluate"], version=7)
    monkeypatch.setitem(stages.STAGES, "evaluate", newer)
    found = difference(last, plan_of(tmp_path))
    assert own_reasons(found) == {"evaluate": {"code version 1 → 7"}}


def test_long_values_and_line_breaks_stay_on_one_line(tmp_path):
    prompt = "Please\nwrite " + 100 * "very " + "{audio}"
    found = changes(tmp_path, {}, {"prompts": {"asr": prompt}})
    (reason,) = own_reasons(found)["adapt"]
    assert reason.startswith("prompts.asr Transcribe {source}: {audio}\\nText: → Please\\nwrite ")
    assert len(reason) < 160


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sweep": "a"}'])
def test_a_damaged_plan_is_as_good_as_none(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    assert read_plan(tmp_path / "plan.json") is None
    assert read_plan(tmp_path / "nothing.json") is None


def test_plans_of_the_version_before_are_still_read(tmp_path):
    old = {"sweep": "a", "nodes": [{"id": "a", "kind": "map", "dependencies": ["b"]}]}
    assert list(planned_stages(old)) == [("a", "map", ["b"], {})]
    assert difference(old, plan_of(tmp_path)) is None
