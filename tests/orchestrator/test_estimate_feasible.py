"""What cannot be placed, what sharing saves, and how `plan` says both."""

import json

import pytest
from typer.testing import CliRunner

from cluster.connection import Capacity, ClusterUnreachable, Room
from orchestrator.cli import app
from orchestrator.estimate.feasible import GIB, obstacles
from orchestrator.estimate.memory import Memory, fits
from orchestrator.estimate.outlook import look_ahead
from orchestrator.estimate.saving import saving
from orchestrator.plan import build_plan
from orchestrator.reuse import assess
from orchestrator.runs import RunFolder
from orchestrator.sources import DigestCache
from orchestrator.store import open_store
from orchestrator.sweep import Resources, load_sweep, parse_sweep

TINY = {
    "name": "tiny",
    "models": [{"decoder": "lab:llama-tiny"}],
    "encoders": [{"encoder": "lab:whisper-tiny"}],
    "tasks": [{"task": "asr", "language": "en", "data": "lab:speech-tiny"}],
    "depths": [0, 2],
    "selectors": ["last"],
    "heal": {"modes": ["none", "joint"], "batch_size": 16},
    "maps": {"text": False},
}
GPUS = Capacity((Room(32, 4), Room(32, 4)))
HEAD = {"num_cpus": 2, "num_gpus": 1, "include_dashboard": False}
CPUS = Capacity((Room(4), Room(4)))


def plan_of(folder, **changes):
    plan = build_plan(parse_sweep({**TINY, **changes}), folder, DigestCache(folder / "d.json"))
    assess(plan, open_store(folder / "empty"))
    return plan


def needs(plan, **by_kind):
    return {node.id: by_kind.get(node.kind, Memory()) for node in plan.nodes.values()}


def outlook_of(folder, plan, capacity=None, **resources):
    store = open_store(folder / "empty")
    return look_ahead(plan, store, assess(plan, store), Resources(**resources), capacity=capacity)


# --- feasibility ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resources", "capacity", "where"),
    [
        ({"cpus": 33}, GPUS, "sweep.resources.cpus"),
        ({"gpus": 5}, GPUS, "sweep.resources.gpus"),
        ({"gpus": 1}, CPUS, "sweep.resources.gpus"),
        ({"cpus": 32, "gpus": 4}, GPUS, None),
        ({"gpus": 0.5}, GPUS, None),
        ({}, CPUS, None),
    ],
)
def test_a_job_that_no_node_can_hold_is_named_with_the_setting(
    tmp_path, resources, capacity, where
):
    plan = plan_of(tmp_path)
    found = obstacles(plan, needs(plan), Resources(**resources), capacity)
    assert [one.where for one in found] == ([where] if where else [])
    if where:
        assert set(found[0].stages) == set(plan.nodes)


def test_without_a_cluster_only_the_card_is_looked_at(tmp_path):
    plan = plan_of(tmp_path)
    assert obstacles(plan, needs(plan), Resources(cpus=1000, gpus=64)) == []


def test_a_batch_too_large_for_the_card_says_which_fits(tmp_path):
    plan = plan_of(tmp_path)
    heal = Memory(weights=8 * GIB, activations=16 * GIB)  # 1 GiB an utterance
    trained = {node.id for node in plan.by_kind("heal") if "/joint" in node.id}
    memory = {node_id: heal if node_id in trained else Memory() for node_id in plan.nodes}
    (found,) = obstacles(plan, memory, Resources(), GPUS, 20 * GIB)
    assert set(found.stages) == trained
    assert "24.6 GiB" in found.problem
    assert found.where == "sweep.heal.micro_batch"
    assert found.remedy.startswith("lower it to 9")
    assert fits(17 * GIB, 20 * GIB)
    assert not fits(18 * GIB, 20 * GIB)


def test_weights_too_large_for_the_card_say_what_would_hold_them(tmp_path):
    plan = plan_of(tmp_path)
    large = needs(plan, evaluate=Memory(weights=24 * GIB, cache=GIB))
    (found,) = obstacles(plan, large, Resources(), GPUS, 24 * GIB)
    assert (found.where, found.remedy[:18]) == ("sweep.models[].dtype", "set it to bfloat16")
    (found,) = obstacles(plan, large, Resources(), GPUS, 8 * GIB)
    assert "cards of at least 29 GiB" in found.remedy


def test_part_of_a_card_has_part_of_its_memory(tmp_path):
    plan = plan_of(tmp_path)
    some = needs(plan, evaluate=Memory(weights=12 * GIB))
    assert obstacles(plan, some, Resources(gpus=1), GPUS, 24 * GIB) == []
    assert obstacles(plan, some, Resources(gpus=0.5), GPUS, 24 * GIB)
    assert obstacles(plan, some, Resources(gpus=0), GPUS, 24 * GIB) == []


def test_stages_of_unknown_memory_or_already_done_are_not_held_against_the_card(tmp_path):
    plan = plan_of(tmp_path)
    large = needs(plan, evaluate=None, heal=Memory(weights=99 * GIB))
    done = {node.id for node in plan.nodes.values() if node.kind != "heal"}
    assert obstacles(plan, large, Resources(), GPUS, 24 * GIB, only=done) == []


# --- what sharing saves -----------------------------------------------------------------------


def test_sharing_is_held_against_a_process_a_result(tmp_path):
    plan = plan_of(tmp_path)
    seconds = {
        node.id: {"adapt": 100.0, "heal": 10.0}.get(node.kind, 0.0) for node in plan.nodes.values()
    }
    found = saving(plan, seconds)
    assert found.cells == 2 * 2 * 2  # test sets, depths, modes
    assert found.alone == found.cells * 110
    assert found.shared == 100 + 10 * len(list(plan.by_kind("heal")))


def test_maps_count_for_the_results_whose_blocks_they_choose(tmp_path):
    plan = plan_of(tmp_path, selectors=["consensus"])
    seconds = {node.id: float(node.kind == "map") for node in plan.nodes.values()}
    chosen = [n for n in plan.by_kind("evaluate") if "/consensus/" in n.id]
    found = saving(plan, seconds)
    assert found.alone == len(chosen)
    assert found.shared == 1


def test_stages_with_the_same_key_count_once(tmp_path):
    plan = plan_of(tmp_path, selectors=["last", {"selector": "fixed", "start": 4}])
    seconds = {node.id: float(node.kind == "heal") for node in plan.nodes.values()}
    assert len(list(plan.by_kind("heal"))) == 6
    assert saving(plan, seconds).shared == 4


# --- the outlook ------------------------------------------------------------------------------


def test_small_jobs_share_a_card_and_cost_that_part_of_a_gpu_hour(tmp_path):
    plan = plan_of(tmp_path)
    alone = outlook_of(tmp_path, plan, GPUS)
    assert alone.gpu_seconds == pytest.approx(alone.seconds)
    shared = outlook_of(tmp_path, plan, GPUS, gpu_memory_gib=80)
    assert shared.gpu_seconds == pytest.approx(alone.seconds / 8)
    assert outlook_of(tmp_path, plan, CPUS).gpu_seconds == 0
    assert outlook_of(tmp_path, plan).gpu_seconds is None


def test_more_slots_shorten_the_run_down_to_its_longest_chain(tmp_path):
    plan = plan_of(tmp_path)
    one = outlook_of(tmp_path, plan, Capacity((Room(1),)))
    many = outlook_of(tmp_path, plan, Capacity((Room(10_000),)))
    assert one.wall_seconds == pytest.approx(one.seconds)
    assert many.wall_seconds == many.longest_chain < one.seconds


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def sweep_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps(TINY))
    return file


def planned(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200"})


def test_plan_says_what_a_job_takes_and_how_long(sweep_file):
    result = planned(sweep_file)
    assert result.exit_code == 0, result.output
    assert "Largest job: " in result.output
    assert "activations" in result.output
    assert "one job at a time" in result.output
    assert "rough: nothing was finished in this store yet" in result.output
    assert "Sharing: " in result.output
    assert "Last plan" not in result.output


def test_plan_names_what_a_card_cannot_hold_and_ends_with_2(sweep_file):
    result = planned(sweep_file, "--set", "resources.gpu_memory_gib=0.7")
    assert result.exit_code == 2
    assert "Cannot be placed: " in result.output
    assert "of the 717 MiB a job has can be used" in result.output
    data = json.loads(planned(sweep_file, "--set", "resources.gpu_memory_gib=0.7", "--json").stdout)
    assert data["infeasible"][0]["stages"]


def test_plan_tells_the_difference_from_the_last_run(sweep_file, tmp_path):
    sweep = load_sweep(sweep_file)
    RunFolder(tmp_path / "runs" / "tiny").start(
        sweep, tmp_path, str(tmp_path / "s"), plan_of(tmp_path)
    )
    assert "Last plan (runs/tiny): the same stages" in planned(sweep_file).output
    changed = planned(sweep_file, "--set", "heal.steps=7", "--set", "depths=[0, 1, 2]").output
    assert "Last plan (runs/tiny): 6 added, 0 removed, 6 changed" in changed
    assert "  heal (2): settings.steps 200 → 7" in changed
    assert "  evaluate (4): follow what they read" in changed


def test_plan_holds_a_sweep_against_a_running_cluster(sweep_file):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    try:
        result = planned(sweep_file, "--address", cluster.address, "--set", "resources.gpus=2")
    finally:
        cluster.shutdown()
    assert result.exit_code == 2, result.output
    assert "Cluster: 1 node(s), 2 CPUs, 1 GPUs" in result.output
    assert "on 1 slot(s) of the cluster" in result.output
    assert "A job takes 1 CPU(s) and 2 GPU(s)" in result.output
    assert "a job wants 2 GPUs, but no node has more than 1" in result.output
    assert "sweep.resources.gpus: lower it" in result.output


def test_plan_says_so_when_no_cluster_answers(sweep_file):
    result = planned(sweep_file, "--address", "127.0.0.1:9")
    assert isinstance(result.exception, ClusterUnreachable)


def test_plan_says_unknown_where_a_shape_cannot_be_read(sweep_file, tmp_path):
    (tmp_path / "llm").mkdir()
    config = {"model_type": "nobody-knows", "num_hidden_layers": 6}
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config))
    result = planned(sweep_file, "--set", "models=[{decoder: llm}]")
    assert result.exit_code == 0
    assert "Memory unknown: " in result.output
    row = next(line for line in result.output.splitlines() if line.startswith("heal"))
    assert row.endswith("unknown")
    data = json.loads(planned(sweep_file, "--set", "models=[{decoder: llm}]", "--json").stdout)
    assert {s["memory"] for s in data["stages"] if s["kind"] == "heal"} == {None}


def test_json_holds_all_of_it(sweep_file):
    data = json.loads(planned(sweep_file, "--json").stdout)
    heal = next(s for s in data["stages"] if s["id"].endswith("/d2/joint/s0"))
    parts = heal["memory"]
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total") > 0
    assert heal["seconds"] > 0
    assert data["time"]["job_seconds"] == pytest.approx(
        sum(stage["seconds"] for stage in data["stages"]), rel=0.01
    )
    assert data["sharing"]["alone_seconds"] > data["sharing"]["shared_seconds"]
    assert data["difference"] is None
    assert data["infeasible"] == []


def test_all_lists_time_and_memory_of_every_stage(sweep_file):
    lines = planned(sweep_file, "--all").output.splitlines()
    line = next(line for line in lines if "  adapt/llama-tiny+whisper-tiny/all" in line)
    assert line.startswith("run ")
    assert "MiB" in line
