"""Sweep files: what is right is accepted; what is wrong is refused with path and remedy."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.sweep import load_sweep, parse_sweep
from workers.errors import InvalidInput

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD = {
    "name": "good",
    "models": [{"decoder": "lab:llama"}],
    "encoders": [{"encoder": "lab:whisper"}],
    "tasks": [{"task": "asr", "language": ["en", "de"], "data": "lab:speech"}],
    "depths": [2],
}


def with_change(path, value):
    raw = copy.deepcopy(GOOD)
    place = raw
    for part in path[:-1]:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    place[path[-1]] = value
    return raw


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_sweep_is_valid(path):
    assert load_sweep(path).conditions()


def test_depth_zero_is_always_there_and_depths_are_in_order():
    assert parse_sweep({**GOOD, "depths": [4, 2]}).depths == [0, 2, 4]


def test_a_released_speechllm_needs_no_encoders():
    raw = {k: v for k, v in GOOD.items() if k != "encoders"}
    sweep = parse_sweep({**raw, "models": [{"speechllm": "models/qwen2-audio"}]})
    assert sweep.models[0].name == "qwen2-audio"
    assert parse_sweep(sweep.model_dump(mode="json")) == sweep, "a run folder keeps it whole"


def test_the_name_defaults_to_the_file(tmp_path):
    raw = {k: v for k, v in GOOD.items() if k != "name"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
    assert load_sweep(tmp_path / "mine.yaml").name == "mine"


def test_set_changes_one_setting(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(GOOD))
    sweep = load_sweep(
        tmp_path / "s.yaml", ["heal.steps=7", "tasks.0.language=fr", "depths=[0, 1]"]
    )
    assert sweep.heal.steps == 7
    assert sweep.conditions()[0].source_language == "fr"
    assert sweep.depths == [0, 1]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["tasks", 0, "langage"], "en", r"sweep\.tasks\[0\]\.langage: unknown key \(did you mean language\?\)"),
        (["heal", "stps"], 3, r"sweep\.heal\.stps: unknown key \(did you mean steps\?\)"),
        (["healing"], {}, r"sweep\.healing: unknown key \(did you mean heal\?\)"),
        (["heal", "steps"], 0, r"sweep\.heal\.steps: .*greater than or equal to 1"),
        (["heal", "modes"], ["jiont"], r"sweep\.heal\.modes\[0\]: .*'joint'"),
        (["tasks", 0, "language"], "german", r"sweep\.tasks\[0\]\.language: unknown language 'german'.*did you mean de\?"),
        (["tasks", 0, "language"], ["en", "xx"], r"sweep\.tasks\[0\]\.language: unknown language 'xx'"),
        (["tasks", 0, "target_language"], "fr", "task asr has no target_language"),
        (["tasks", 0, "task"], "ast", "task ast needs target_language"),
        (["tasks", 0, "train"], "t.jsonl", "either data, or train, dev and test"),
        (["depths"], [-1], r"sweep\.depths: .*0 or more"),
        (["depths"], [], r"sweep\.depths: "),
        (["models"], [], r"sweep\.models: "),
        (["models"], [{"name": "x"}], r"sweep\.models\[0\]: .*decoder.*speechllm.*neither is given"),
        (["models"], [{"decoder": "a", "speechllm": "b"}], r"sweep\.models\[0\]: .*both are given"),
        (["models"], [{"speechlm": "a"}], r"sweep\.models\[0\]\.speechlm: unknown key \(did you mean speechllm\?\)"),
        (["models"], [{"speechllm": "a"}], r"every model here is a speechllm, which has its own: remove encoders"),
        (["encoders"], [], r"encoders is required: each decoder is joined"),
        (["models"], [{"decoder": "lab:llama"}, {"decoder": "lab:llama"}], "two entries are called llama"),
        (["seeds"], [1, 1], "the same seed"),
        (["selectors"], ["bset"], r"sweep\.selectors\[0\]"),
        (["selectors"], [{"selector": "fixed"}], "fixed needs start"),
        (["name"], "../up", r"sweep\.name: "),
        (["maps", "pools"], ["last"], "maps.pool all is not among"),
        (["maps", "criteria"], [], r"sweep\.maps\.criteria: "),
        (["maps", "criteria"], ["damage"], r"sweep\.maps\.criteria\[0\]: .*'angular'"),
        (["maps", "damage"], {"sample": 3}, r"sweep\.maps\.damage\.sample: unknown key \(did you mean samples\?\)"),
        (["selectors"], [{"selector": "own", "criterion": "cka"}], "own-cka needs cka among maps.criteria"),
        (["selectors"], [{"selector": "own", "criterion": "damage"}], "needs damage maps: set maps.damage: true"),
        (["selectors"], [{"selector": "last", "criterion": "cka"}], "selector last reads no map"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_path_and_remedy(path, value, message):
    with pytest.raises(InvalidInput, match=message):
        parse_sweep(with_change(path, value))


def test_a_selector_of_damage_needs_its_depths():
    raw = {**GOOD, "selectors": [{"selector": "own", "criterion": "damage"}]}
    deep = max(parse_sweep(GOOD).depths)
    assert complaint({**raw, "maps": {"damage": True}}) == "sweep is fine"
    assert complaint({**raw, "maps": {"damage": {"depths": [deep + 1]}}}).endswith(
        "among maps.damage.depths"
    )
    last = {**raw, "selectors": [{"selector": "consensus", "criterion": "cka"}]}
    last["maps"] = {"criteria": ["cka"], "pool": "last"}
    assert "pool last has one" in complaint(last)


def test_a_switch_turns_damage_on_and_off():
    assert parse_sweep({**GOOD, "maps": {"damage": True}}).maps.damage.samples == 32
    assert parse_sweep({**GOOD, "maps": {"damage": False}}).maps.damage is None
    assert parse_sweep(GOOD).maps.damage is None


def test_shared_healing_refuses_blocks_of_each_conditions_own():
    with pytest.raises(InvalidInput, match=r"share\.heal"):
        parse_sweep({**GOOD, "selectors": ["own"], "share": {"heal": True}})


def test_every_problem_is_told_at_once():
    raw = with_change(["heal", "stps"], 3)
    raw["depths"] = [-2]
    with pytest.raises(InvalidInput) as caught:
        parse_sweep(raw)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "", "\x00", "a: !!python/object:os.system x"])
def test_a_file_that_is_no_sweep_is_refused_by_name(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InvalidInput, match=r"bad\.yaml"):
        load_sweep(tmp_path / "bad.yaml")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"none\.yaml: no such sweep file"):
        load_sweep(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["heal.steps", "=3", "tasks.9.language=en", "name.x=1", "a=["])
def test_a_bad_override_is_refused(tmp_path, override):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(GOOD))
    with pytest.raises(InvalidInput, match="--set"):
        load_sweep(tmp_path / "s.yaml", [override])


def complaint(raw):
    """The message a sweep is refused with; `sweep is fine` if it is not."""
    try:
        parse_sweep(raw)
    except InvalidInput as error:
        return str(error)
    return "sweep is fine"


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["name", "models", "encoders", "tasks", "depths", "selectors", "seeds", "heal", "adapt", "maps",
     "evaluate", "prompts", "share", "report", "resources", "nonsense"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(KEYS, ANY)
def test_no_value_anywhere_gives_a_traceback(key, value):
    assert complaint({**GOOD, key: value}).startswith("sweep")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["models", "encoders", "tasks"]), st.dictionaries(st.sampled_from(
    ["decoder", "speechllm", "encoder", "name", "task", "language", "target_language", "data", "train", "dev",
     "test", "projector", "dtype"]), ANY))  # fmt: skip
def test_no_entry_gives_a_traceback(key, entry):
    assert complaint({**GOOD, key: [entry]}).startswith("sweep")
