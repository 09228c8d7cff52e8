"""Plans: what stages a sweep means, what they share, and what is refused before anything runs."""

import json
from collections import Counter

import numpy as np
import pytest
import soundfile

from orchestrator.plan import build_plan
from orchestrator.reuse import assess
from orchestrator.sources import DigestCache
from orchestrator.store import open_store
from orchestrator.sweep import parse_sweep
from workers.errors import InvalidInput

TINY = {
    "name": "tiny",
    "models": [{"decoder": "lab:llama-tiny"}],
    "encoders": [{"encoder": "lab:whisper-tiny"}, {"encoder": "lab:conformer-tiny"}],
    "tasks": [
        {"task": "asr", "language": ["en", "de"], "data": "lab:speech-tiny"},
        {"task": "ast", "language": "de", "target_language": "en", "data": "lab:speech-tiny"},
    ],
    "depths": [1, 2],
}


def plan_of(tmp_path, **changes):
    plan = build_plan(parse_sweep({**TINY, **changes}), tmp_path, DigestCache(tmp_path / "d.json"))
    assess(plan, open_store(tmp_path / "empty"))  # determines the blocks that need no map
    return plan


def keys_of(plan):
    return {node_id: plan.key(node_id) for node_id in plan.nodes}


def fake_map(store, plan, node_id, best, **more):
    """A map artefact whose best block starts at `best`, at every depth; others by criterion."""
    import pandas as pd

    kind, key = plan.nodes[node_id].kind, plan.key(node_id)
    temporary = store.begin(kind, key)
    criteria = {"damage": best} if kind == "damage" else {"angular": best, **more}
    rows = [
        {"criterion": name, "pool": "target" if kind == "damage" else "all", "start": s, "depth": d,
         "distance": 0.1 + 0.01 * abs(s - there), "std_error": 0.01, "samples": 4}
        for name, there in criteria.items() for d in (1, 2) for s in range(7 - d)
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(temporary / "map.parquet")
    store.commit(temporary, kind, key, {})


def test_every_stage_follows_what_it_needs(tmp_path):
    plan, seen = plan_of(tmp_path), set()
    for node in plan.nodes.values():
        assert node.dependencies() <= seen, node.id
        seen.add(node.id)


def test_work_is_shared_between_encoders_tasks_and_depths(tmp_path):
    kinds = Counter(node.kind for node in plan_of(tmp_path).nodes.values())
    assert kinds["build"] == 3 + 1 + 2  # speech by language (the encoders hear fr too)
    assert kinds["adapt"] == 2


def test_unshared_bases_are_trained_per_condition(tmp_path):
    plan = plan_of(tmp_path, share={"base": False})
    assert len(list(plan.by_kind("adapt"))) == 2 * 3


def test_shared_healing_heals_once_for_all_conditions(tmp_path):
    one = plan_of(tmp_path, share={"heal": True})
    each = plan_of(tmp_path)
    assert len(list(each.by_kind("heal"))) == 3 * len(list(one.by_kind("heal")))
    assert len(list(each.by_kind("evaluate"))) == len(list(one.by_kind("evaluate")))


def test_heals_are_undetermined_until_their_maps_exist(tmp_path):
    plan, store = plan_of(tmp_path), open_store(tmp_path / "store")
    found = assess(plan, store)
    assert found.count("reuse") == 0
    pruned = [n.id for n in plan.by_kind("heal") if "/consensus/" in n.id]
    assert {found.verdicts[i] for i in pruned} == {"undetermined"}
    control = [n.id for n in plan.by_kind("heal") if "/d0/" in n.id]
    assert {found.verdicts[i] for i in control} == {"run"}
    for node in plan.by_kind("map"):
        fake_map(store, plan, node.id, best=3)
    found = assess(plan, store)
    assert found.count("undetermined") == 0
    assert plan.nodes[pruned[0]].params["block"] == {"start": 3, "depth": 1}


def test_selectors_that_choose_the_same_block_end_in_one_heal(tmp_path):
    selectors = ["consensus", {"selector": "fixed", "start": 3}, "last"]
    plan, store = plan_of(tmp_path, selectors=selectors), open_store(tmp_path / "store")
    for node in plan.by_kind("map"):
        fake_map(store, plan, node.id, best=3)
    assess(plan, store)
    by_selector = {
        name: [plan.key(n.id) for n in plan.by_kind("heal") if f"/{name}/" in n.id]
        for name in ("consensus", "fixed-3", "last")
    }
    assert by_selector["consensus"] == by_selector["fixed-3"]
    assert not set(by_selector["consensus"]) & set(by_selector["last"])


def test_a_depth_added_later_leaves_every_other_key_alone(tmp_path):
    before = keys_of(plan_of(tmp_path, selectors=["last"]))
    after = keys_of(plan_of(tmp_path, selectors=["last"], depths=[1, 2, 3]))
    assert {i: k for i, k in after.items() if i in before} == before
    assert len(after) > len(before)


def test_the_name_of_a_sweep_and_of_its_parts_change_no_key(tmp_path):
    renamed = plan_of(
        tmp_path,
        name="other",
        models=[{"decoder": "lab:llama-tiny", "name": "mine"}],
        report={"tolerance": 3.0},
        resources={"cpus": 2},
    )
    assert sorted(map(str, keys_of(renamed).values())) == sorted(
        map(str, keys_of(plan_of(tmp_path)).values())
    )


@pytest.mark.parametrize(
    ("change", "changed", "same"),
    [
        ({"heal": {"steps": 7}}, "heal", "adapt"),
        ({"evaluate": {"extra_tokens": 3}}, "evaluate", "heal"),
        ({"maps": {"samples": 7}}, "map", "adapt"),
        ({"adapt": {"steps": 7}}, "adapt", "encode"),
        ({"prompts": {"asr": "Write: {audio}"}}, "adapt", "encode"),
        ({"seeds": [1]}, "heal", "adapt"),
    ],
)
def test_a_setting_changes_the_stages_it_can_change_and_no_others(tmp_path, change, changed, same):
    def keys(kind, plan):
        return [plan.key(n.id) for n in plan.by_kind(kind) if "/none" not in n.id]

    plain = plan_of(tmp_path, selectors=["last"])
    other = plan_of(tmp_path, selectors=["last"], **change)
    assert not set(keys(changed, plain)) & set(keys(changed, other))
    assert keys(same, plain) == keys(same, other)


def test_healing_with_no_training_does_not_depend_on_the_seed(tmp_path):
    plan = plan_of(tmp_path, seeds=[0, 1], selectors=["last"])
    none = [n for n in plan.by_kind("heal") if "/none" in n.id]
    joint = [n for n in plan.by_kind("heal") if "/joint" in n.id]
    assert len(joint) == 2 * len(none)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": [6]}, r"sweep\.depths\[1\]: cannot remove 6 layers: llama-tiny has 6.*5"),
        ({"models": [{"decoder": "lab:lama"}]}, r"sweep\.models\[0\]\.decoder: .*did you mean lab:llama"),
        ({"models": [{"decoder": "lab:whisper"}]}, r"sweep\.models\[0\]\.decoder: lab:whisper is a encoder"),
        ({"models": [{"decoder": "./nowhere"}]}, r"sweep\.models\[0\]\.decoder: no folder .*nowhere"),
        ({"encoders": [{"encoder": "./nowhere"}]}, r"sweep\.encoders\[0\]\.encoder: no folder"),
        ({"selectors": [{"selector": "fixed", "start": 5}]}, r"sweep\.selectors\[0\]\.start: .*largest start at depth 2 is 4"),
        ({"tasks": [{"task": "asr", "language": "es", "data": "lab:speech"}]}, r"sweep\.tasks\[0\]\.language: .*does not have language es"),
        ({"tasks": [{"task": "asr", "language": "en", "data": "lab:speach"}]}, r"sweep\.tasks\[0\]\.data: .*did you mean lab:speech"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_plan_time(tmp_path, changes, message):
    with pytest.raises(InvalidInput, match=message):
        plan_of(tmp_path, **changes)


# --- manifests and folders of the user's own ----------------------------------------------------


def manifest(folder, name, lines=2, **extra):
    for i in range(lines):
        soundfile.write(folder / f"{name}{i}.wav", np.zeros(1600 + len(name)), 16000)
    rows = [
        {"audio_filepath": f"{name}{i}.wav", "text": f"word {i}", **extra} for i in range(lines)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return f"{name}.jsonl"


def own_task(folder, **extra):
    return {
        "task": "asr",
        "language": "en",
        "train": manifest(folder, "train"),
        "dev": manifest(folder, "dev"),
        "test": [{"name": "test", "data": manifest(folder, "test")}],
        **extra,
    }


def test_manifests_are_fingerprinted_by_content_not_by_place(tmp_path):
    keys = []
    for name in ("here", "there"):
        folder = tmp_path / name
        folder.mkdir()
        keys.append(keys_of(plan_of(folder, tasks=[own_task(folder)])))
    assert keys[0] == keys[1]
    task = own_task(tmp_path / "there")
    soundfile.write(tmp_path / "there" / "dev0.wav", np.ones(900), 16000)
    assert keys_of(plan_of(tmp_path / "there", tasks=[task])) != keys[1]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "dev.jsonl").unlink(), r"sweep\.tasks\[0\]\.dev: no manifest"),
        (lambda f: (f / "dev.jsonl").write_text(""), r"sweep\.tasks\[0\]\.dev: .*the data set is empty"),
        (lambda f: (f / "train0.wav").unlink(), r"sweep\.tasks\[0\]\.train: .*train\.jsonl:1: no audio file"),
        (lambda f: (f / "test.jsonl").write_text("{"), r"sweep\.tasks\[0\]\.test\[0\]\.data: .*test\.jsonl:1: not valid JSON"),
        (lambda f: (f / "train.jsonl").write_text('{"text": "a"}\n'), r"train\.jsonl:1: no audio_filepath"),
    ],
)  # fmt: skip
def test_bad_data_is_refused_with_key_file_and_line(tmp_path, break_it, message):
    task = own_task(tmp_path)
    break_it(tmp_path)
    with pytest.raises(InvalidInput, match=message):
        plan_of(tmp_path, tasks=[task])


def test_translation_needs_translations(tmp_path):
    task = own_task(tmp_path, task="ast", language="de", target_language="en")
    with pytest.raises(InvalidInput, match="has no translation"):
        plan_of(tmp_path, tasks=[task])
    for name in ("train", "dev", "test"):
        manifest(tmp_path, name, translation="hello")
    assert plan_of(tmp_path, tasks=[task]).nodes


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(
        InvalidInput, match=r"sweep\.models\[0\]\.decoder: model has no config\.json"
    ):
        plan_of(tmp_path, models=[{"decoder": "model"}])


def test_a_local_decoder_has_its_depth_checked_too(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"text_config": {"num_hidden_layers": 2}}')
    with pytest.raises(InvalidInput, match="model has 2"):
        plan_of(tmp_path, models=[{"decoder": "model"}])


def test_a_selector_reads_the_criterion_it_names(tmp_path):
    plan = plan_of(
        tmp_path,
        encoders=[{"encoder": "lab:whisper-tiny"}],
        tasks=[{"task": "asr", "language": "en", "data": "lab:speech-tiny"}],
        depths=[1],
        selectors=["own"]
        + [{"selector": "own", "criterion": name} for name in ("influence", "damage")],
        maps={"criteria": ["angular", "influence"], "damage": True},
    )
    store = open_store(tmp_path / "store")
    for node in [*plan.by_kind("map"), *plan.by_kind("damage")]:
        fake_map(store, plan, node.id, 5 if node.kind == "damage" else 1, influence=3)
    assess(plan, store)
    starts = {
        node.id.split("/")[3]: node.params["block"]["start"]
        for node in plan.by_kind("heal")
        if node.params["block"]
    }
    assert starts == {"own": 1, "own-influence": 3, "own-damage": 5}


def test_damage_is_a_stage_of_its_own_and_changes_no_other_key(tmp_path):
    without = keys_of(plan_of(tmp_path))
    with_damage = plan_of(tmp_path, maps={"damage": {"depths": [1, 2]}})
    keys = keys_of(with_damage)
    assert {node_id: keys[node_id] for node_id in without} == without
    added = keys.keys() - without.keys()
    assert {with_damage.nodes[node_id].kind for node_id in added} == {"damage"}
    assert len(added) == 2 * 3  # encoders x conditions: on speech alone
    assert keys_of(plan_of(tmp_path, maps={"damage": {"depths": [1]}})).keys() == keys.keys()


# --- released SpeechLLMs ------------------------------------------------------------------------


def released_folder(folder, name="audio-llm", **changes):
    """Enough of a released SpeechLLM to plan with."""
    (folder / name).mkdir()
    config = {
        "model_type": "qwen2_audio",
        "text_config": {"model_type": "qwen2", "num_hidden_layers": 6},
        "audio_config": {"model_type": "qwen2_audio_encoder"},
        **changes,
    }
    (folder / name / "config.json").write_text(json.dumps(config))
    return name


def released_plan(folder, name="audio-llm", **changes):
    if not (folder / name).exists():
        released_folder(folder, name)
    changes = {"models": [{"speechllm": name}], "encoders": [], **changes}
    return plan_of(folder, **{"tasks": [own_task(folder)], **changes})


def test_a_released_speechllm_is_adopted_and_not_adapted(tmp_path):
    plan = released_plan(tmp_path)
    kinds = Counter(node.kind for node in plan.nodes.values())
    assert "adapt" not in kinds
    assert "build" not in kinds
    assert kinds["adopt"] == 1
    adopt = next(plan.by_kind("adopt"))
    assert adopt.id == "adopt/audio-llm+own/all"
    assert not adopt.inputs, "no data count where nothing is trained"
    assert {n.cell["encoder"] for n in plan.by_kind("evaluate")} == {"own"}
    assert {n.base for n in plan.nodes.values()} == {adopt.base}, "one base in memory does it all"
    maps = {(n.cell["modality"], n.cell["adapted"], n.cell["encoder"]) for n in plan.by_kind("map")}
    assert maps == {("text", False, None), ("text", True, "own"), ("speech", True, "own")}
    seen = set()
    for node in plan.nodes.values():
        assert node.dependencies() <= seen
        seen.add(node.id)


def test_released_models_and_decoders_share_a_sweep(tmp_path):
    released_folder(tmp_path)
    models = [{"decoder": "lab:llama-tiny"}, {"speechllm": "audio-llm"}]
    mixed = plan_of(tmp_path, models=models, tasks=[own_task(tmp_path)])
    pairs = {(n.cell["model"], n.cell["encoder"]) for n in mixed.by_kind("evaluate")}
    assert pairs == {
        ("llama-tiny", "whisper-tiny"), ("llama-tiny", "conformer-tiny"), ("audio-llm", "own"),
    }  # fmt: skip
    alone = plan_of(tmp_path, models=models[:1], tasks=[own_task(tmp_path)])
    assert keys_of(alone).items() <= keys_of(mixed).items()


def test_the_text_map_before_adapting_leaves_out_the_adapter_a_model_brings(tmp_path):
    released_folder(tmp_path)
    plain = released_plan(tmp_path)
    assert not any("own_adapter" in n.params["decoder"] for n in plain.by_kind("map"))
    (tmp_path / "audio-llm" / "adapter_config.json").write_text("{}")
    plan = released_plan(tmp_path)
    without = [n for n in plan.by_kind("map") if n.params["decoder"].get("own_adapter") is False]
    assert [(n.cell["modality"], n.cell["adapted"]) for n in without] == [("text", False)]
    assert without[0].base != next(plan.by_kind("adopt")).base


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"adapt": {"lora": {"rank": 3}}}, {"adopt", "map", "heal", "evaluate"}),
        ({"prompts": {"asr": "Write: {audio}"}}, {"adopt", "map", "heal", "evaluate"}),
        ({"heal": {"steps": 7}}, {"heal", "evaluate"}),
        ({"adapt": {"steps": 7, "lr_projector": 0.1}}, set()),
        ({"prompts": {"chat": True}}, set()),
    ],
)
def test_keys_of_a_released_model_change_when_results_can(tmp_path, change, changed):
    plain = released_plan(tmp_path, selectors=["last"])
    other = released_plan(tmp_path, selectors=["last"], **change)
    found = {n.kind for n in plain.nodes.values() if plain.key(n.id) != other.key(n.id)}
    assert found == changed


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"decoder": "audio-llm"}, r"sweep\.models\[0\]\.decoder: audio-llm is a whole SpeechLLM.*write speechllm: audio-llm"),
        ({"speechllm": "llm"}, r"sweep\.models\[0\]\.speechllm: llm is no SpeechLLM.*write decoder: llm"),
        ({"speechllm": "lab:llama-tiny"}, r"sweep\.models\[0\]\.speechllm: lab:llama-tiny is a decoder on its own"),
        ({"speechllm": "nowhere"}, r"sweep\.models\[0\]\.speechllm: no folder"),
    ],
)  # fmt: skip
def test_what_is_named_in_the_wrong_place_is_refused_with_the_right_one(tmp_path, model, message):
    released_folder(tmp_path)
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text('{"num_hidden_layers": 6}')
    encoders = TINY["encoders"] if "decoder" in model else []
    with pytest.raises(InvalidInput, match=message):
        released_plan(tmp_path, models=[model], encoders=encoders)


def test_a_depth_is_held_against_the_released_decoder(tmp_path):
    with pytest.raises(InvalidInput, match="cannot remove 6 layers: audio-llm has 6"):
        released_plan(tmp_path, depths=[6])


def test_layers_that_a_configuration_leaves_to_its_family_are_counted(tmp_path):
    released_folder(tmp_path, text_config={"model_type": "qwen2"})
    evaluations = released_plan(tmp_path).by_kind("evaluate")
    assert {n.cell["layers"] for n in evaluations} == {32}
