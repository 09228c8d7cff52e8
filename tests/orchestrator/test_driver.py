"""The driver on a real Ray: order, leases, retries, the OOM ladder, limits and stops."""

import json
import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from cluster.connection import Capacity, Cluster, Room
from orchestrator.driver import Driver
from orchestrator.graph import Node, Plan
from orchestrator.reuse import Assessment, assess
from orchestrator.runs import Fence, RunFolder, RunTaken
from orchestrator.store import open_store
from orchestrator.sweep import parse_sweep

SWEEP = {
    "name": "r",
    "models": [{"decoder": "lab:llama-tiny"}],
    "encoders": [{"encoder": "lab:whisper-tiny"}],
    "tasks": [{"task": "asr", "language": "en", "data": "lab:speech-tiny"}],
    "depths": [1, 2],
}


@pytest.fixture(scope="module")
def cluster():
    folder = str(Path(__file__).parent)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{folder}:{before}" if before else folder
    with Cluster(cpus=2, gpus=2) as found:
        yield found
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


class Heard:
    """Everything the driver said."""

    def __init__(self):
        self.events = []
        self.on_event = lambda *_: None

    def event(self, name, node_id, detail):
        self.events.append((name, node_id, detail))
        self.on_event(name, node_id)

    def tick(self, driver):
        pass

    def of(self, name):
        return [(node_id, detail) for event, node_id, detail in self.events if event == name]


class World:
    """A run folder and a store, and a driver over hand-made stages."""

    def __init__(self, folder, cluster):
        self.store, self.cluster = open_store(folder / "store"), cluster
        self.folder = RunFolder(folder / "runs" / "r")
        self.heard = Heard()

    def node(self, name, kind="heal", base="a", inputs=(), cell=None, cost=1.0, **params):
        return Node(
            name, kind, {"name": name, **params}, {f"in{i}": other for i, other in enumerate(inputs)},
            base=base, cell=cell or {}, cost=cost,
        )  # fmt: skip

    def drive(self, nodes, before=None, look=None, **sweep):
        plan = Plan("r", {node.id: node for node in nodes})
        resources = {"gpus": 0, "idle_seconds": 60, **sweep.pop("resources", {})}
        settings = parse_sweep({**SWEEP, "resources": resources, **sweep})
        with self.folder.lock() as hold:
            self.folder.start(settings, Path(), self.store.location, plan)
            # A heal that nothing needs would not be made; here each stage is wanted for itself.
            held = assess(plan, self.store)
            wanted = {i: "run" if v == "unneeded" else v for i, v in held.verdicts.items()}
            driver = Driver(
                plan, self.store, self.folder, settings, look or self.cluster.capacity,
                Fence(self.store, "r", hold), self.heard, {},
                assessment=Assessment(wanted, held.reasons), target="driver_stages:run",
            )  # fmt: skip
            if before is not None:
                before(driver)
            outcome = driver.execute()
        self.driver = driver
        return outcome

    def told(self, name):
        node = self.driver.plan.nodes[name]
        path = self.store.path(node.kind, self.driver.plan.key(name)) / "told.json"
        return json.loads(path.read_text())


@pytest.fixture
def world(tmp_path, cluster):
    return World(tmp_path, cluster)


def gone(pid):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid):
            return True
        time.sleep(0.1)
    return False


def test_stages_of_a_base_share_a_process_and_another_base_gets_a_new_one(world):
    nodes = [world.node(f"{base}{i}", base=base) for i in range(3) for base in "ab"]
    outcome = world.drive(nodes, limits={"jobs": 1})
    assert outcome.complete
    pids = {name: world.told(name)["pid"] for name in world.driver.state}
    assert len({pids[f"a{i}"] for i in range(3)}) == 1
    assert len(set(pids.values())) == 2
    assert world.driver.model_loads == 2
    assert all(map(gone, pids.values()))


def test_what_others_wait_for_comes_first_then_the_cheapest_cells(world):
    nodes = [
        world.node("dear", cost=20, cell={"depth": 1}),
        world.node("cheap", cost=2, cell={"depth": 2}),
        world.node("short", kind="map", base=None, cost=1),
        world.node("long", kind="adapt", cost=1),
        world.node("after", kind="damage", base=None, inputs=["long"], cost=30),
    ]
    world.drive(nodes, limits={"jobs": 1})
    started = [node_id for node_id, _ in world.heard.of("start")]
    assert started == ["long", "after", "short", "cheap", "dear"]


def test_what_the_sweep_puts_first_comes_first_with_all_it_needs(world):
    nodes = [
        world.node("shared", kind="map", base=None, cost=50),
        world.node("one", cost=1),
        world.node("score one", kind="evaluate", inputs=["one"], cell={"depth": 1}),
        world.node("two", cost=9),
        world.node("score two", kind="evaluate", inputs=["two"], cell={"depth": 2}),
    ]
    world.drive(nodes, limits={"jobs": 1}, priority=[{"depth": 2}])
    started = [node_id for node_id, _ in world.heard.of("start")]
    assert started == ["two", "score two", "shared", "one", "score one"]


def test_a_failure_is_retried_as_its_class_says_and_blocks_only_what_needs_it(world):
    nodes = [
        world.node("flaky", tries=["transient", "killed"]),
        world.node("bad", base="b", tries=["invalid"]),
        world.node("needs bad", kind="evaluate", base="b", inputs=["bad"]),
        world.node("fine", base="b"),
    ]
    outcome = world.drive(nodes)
    assert (outcome.done, outcome.failed, outcome.blocked) == (2, ["bad"], ["needs bad"])
    assert not outcome.complete
    retries = [(node_id, d["class"], d["delay"]) for node_id, d in world.heard.of("retry")]
    assert retries == [("flaky", "transient", 2.0), ("flaky", "preempted", 0.0)]
    records = world.folder.records()
    assert (records["bad"].failure, records["bad"].message) == ("invalid", "invalid on try 1")
    assert records["flaky"].attempts == 3
    assert records["needs bad"].state == "blocked"


def test_a_stage_that_kills_its_worker_each_time_is_given_up(world, monkeypatch):
    monkeypatch.setattr("orchestrator.driver.retries.BACKOFF_SECONDS", 0.01)
    outcome = world.drive([world.node("poison", tries=["killed"] * 9)])
    assert outcome.failed == ["poison"]
    assert len(world.heard.of("start")) == 6


def test_the_oom_ladder_halves_then_recomputes_then_adds_ranks_and_siblings_learn(world):
    settings = {"micro_batch": 4}
    nodes = [
        world.node("first", settings=settings, tries=["device-oom"] * 4),
        world.node("second", settings=settings, cost=2),
        world.node("score", kind="evaluate", inputs=["second"], settings={"batch_size": 8}),
    ]
    outcome = world.drive(nodes, limits={"jobs": 1}, resources={"most_ranks": 2})
    assert outcome.complete
    assert [d["relief"] for _, d in world.heard.of("retry")] == [
        "micro-batch 2 in place of 4",
        "micro-batch 1 in place of 4",
        "micro-batch 1 in place of 4, activation checkpointing",
        "micro-batch 1 in place of 4, activation checkpointing, 2 ranks",
    ]
    first = world.told("first")
    assert first["relief"] == {"halvings": 2, "activation_checkpointing": True}
    assert first["ranks"] == 2
    assert world.told("second")["relief"] == first["relief"]
    assert world.told("score")["relief"] == {"halvings": 0, "activation_checkpointing": False}
    assert world.folder.records()["first"].relief.endswith("2 ranks")


def test_the_foot_of_the_ladder_is_a_failure_that_says_what_was_tried(world):
    node = world.node("big", kind="map", settings={"batch_size": 2}, tries=["device-oom"] * 9)
    assert world.drive([node]).failed == ["big"]
    (_, detail), = world.heard.of("failed")  # fmt: skip
    assert detail["class"] == "device-oom"
    assert "tried down to: batch 1 in place of 2" in detail["message"]


def test_a_stage_that_ran_out_of_the_hosts_memory_gets_a_node_to_itself(world):
    nodes = [
        world.node("fat", tries=["host-oom"]),
        *(world.node(f"thin{i}", base="b", seconds=0.5) for i in range(3)),
    ]
    assert world.drive(nodes).complete
    fat = world.told("fat")
    assert fat["threads"] == "1", "its results are those of one thread"
    alone = [d for _, d in world.heard.of("retry")]
    assert alone[0]["relief"] == "alone on a node"
    # While it ran nothing else did: it held all the CPUs.
    thin = [world.told(f"thin{i}")["began"] for i in range(3)]
    assert all(began < fat["began"] - 0.4 or began > fat["began"] for began in thin)


def test_ranks_meet_and_die_together(world):
    nodes = [
        world.node("sum", tries=["sum"]),
        world.node("again", tries=["sum"], cost=2),
        world.node("broken", tries=["rank 1 killed", "sum"], cost=3),
    ]
    outcome = world.drive(nodes, resources={"ranks": 2})
    assert outcome.complete
    assert [world.told(name)["sum"] for name in ("sum", "again", "broken")] == [3.0] * 3
    assert world.told("sum")["pid"] == world.told("again")["pid"], "ranks are kept warm"
    assert world.told("broken")["pid"] != world.told("sum")["pid"]
    assert [d["class"] for _, d in world.heard.of("retry")] == ["preempted"]


def test_a_wide_lease_finds_room_beside_a_queue_of_narrow_ones(world):
    nodes = [world.node(f"narrow{i:02}", kind="evaluate", seconds=0.2) for i in range(12)]
    nodes.insert(2, world.node("wide", kind="heal", base="b", cost=0.5))
    assert world.drive(nodes, resources={"ranks": 2}).complete
    started = [node_id for node_id, _ in world.heard.of("start")]
    assert started.index("wide") <= 4


def test_limits_bound_jobs_and_gpus_at_once(world):
    together, most = set(), []

    def count(name, node_id):
        if name == "start":
            together.add(node_id)
        elif name == "done":
            together.discard(node_id)
        most.append(len(together))

    world.heard.on_event = count
    nodes = [world.node(f"n{i}", kind="map", base=f"b{i}", seconds=0.2) for i in range(4)]
    assert world.drive(nodes, limits={"gpus": 1}, resources={"gpus": 1}).complete
    assert max(most) == 1


def test_several_small_jobs_share_a_card(world):
    nodes = [world.node(f"n{i}", kind="map", base="b", seconds=1.0) for i in range(2)]
    world.drive(nodes, resources={"gpus": 0.5}, limits={"gpus": 1})
    assert len({world.told(f"n{i}")["pid"] for i in range(2)}) == 2
    began = [world.told(f"n{i}")["began"] for i in range(2)]
    assert abs(began[0] - began[1]) < 30
    assert world.driver.gpus == 2


def test_a_spent_budget_of_gpu_hours_starts_nothing_new_and_counts_earlier_drivers(world):
    nodes = [world.node(f"n{i}", kind="map", seconds=0.5) for i in range(4)]
    budget = {"limits": {"gpu_hours": 0.4 / 3600, "jobs": 1}, "resources": {"gpus": 1}}
    outcome = world.drive(nodes, **budget)
    assert outcome.done == 1
    assert outcome.reason.endswith("GPU-hours is spent")
    assert not outcome.interrupted
    assert not outcome.complete
    assert world.drive(nodes, **budget).done == 1
    more = {**budget, "limits": {"gpu_hours": 1, "jobs": 1}}
    assert world.drive(nodes, **more).done == 4


def test_a_stop_lets_stages_keep_a_checkpoint_and_starts_nothing_new(world):
    nodes = [world.node("long", tries=["waits to stop"]), world.node("next", cost=2)]

    def later(driver):
        threading.Timer(4, driver.stop, ["told to end"]).start()

    outcome = world.drive(nodes, before=later, limits={"jobs": 1})
    assert outcome.interrupted
    assert outcome.reason == "told to end"
    assert world.heard.of("stopped") == [("long", {"message": "kept a checkpoint"})]
    assert [node_id for node_id, _ in world.heard.of("start")] == ["long"]
    assert world.folder.records()["long"].state == "stopped"


def test_what_cannot_stop_in_time_is_ended(world, monkeypatch):
    monkeypatch.setattr("orchestrator.driver.loop.GRACE_SECONDS", 1)

    def later(driver):
        threading.Timer(4, driver.stop, ["interrupted"]).start()

    began = time.monotonic()
    outcome = world.drive([world.node("stuck", tries=["hang"])], before=later)
    assert outcome.interrupted
    assert time.monotonic() - began < 30
    assert "did not finish within" in world.heard.of("stopped")[0][1]["message"]


def test_a_stage_past_its_deadline_is_ended_and_tried_again(world, monkeypatch):
    monkeypatch.setattr("orchestrator.driver.loop.LOOK_SECONDS", 0.5)
    monkeypatch.setattr("orchestrator.driver.retries.BACKOFF_SECONDS", 0.1)
    node = world.node("slow", tries=["hang"])
    assert world.drive([node], resources={"deadline_hours": 3 / 3600}).complete
    assert "resources.deadline_hours" in world.heard.of("retry")[0][1]["message"]


def test_a_job_no_node_has_room_for_fails_after_its_wait_and_the_rest_goes_on(world, monkeypatch):
    monkeypatch.setattr("orchestrator.driver.loop.LOOK_SECONDS", 0.2)
    small = Capacity((Room(1.0),))
    nodes = [world.node("wide"), world.node("fine", kind="map")]
    outcome = world.drive(nodes, look=lambda: small, resources={"ranks": 2, "wait_minutes": 0.02})
    assert outcome.failed == ["wide"]
    assert outcome.done == 1
    assert "resources.wait_minutes" in world.heard.of("failed")[0][1]["message"]
    assert "waiting for up to" in world.heard.of("waiting")[0][1]["message"]


def test_a_node_that_joins_late_is_used(world, monkeypatch):
    monkeypatch.setattr("orchestrator.driver.loop.LOOK_SECONDS", 0.2)
    began = time.monotonic()

    def look():
        return Capacity((Room(1.0),) * (1 if time.monotonic() - began < 3 else 2))

    nodes = [world.node(f"n{i}", seconds=1.0) for i in range(10)]
    assert world.drive(nodes, look=look).complete
    assert len({world.told(f"n{i}")["pid"] for i in range(10)}) == 2
    assert world.heard.of("capacity")[0][1] == {"nodes": 2, "before": 1, "after": 2}


def test_idle_processes_are_given_back(world, monkeypatch):
    monkeypatch.setattr("orchestrator.driver.loop.LOOK_SECONDS", 0.2)
    nodes = [world.node("quick", base="b"), world.node("slow", seconds=4.0)]
    left = []

    def look(name, node_id):
        if (name, node_id) == ("done", "slow"):
            left.append(len(world.driver_now.fleet.held))

    world.heard.on_event = look
    world.drive(
        nodes, before=lambda d: setattr(world, "driver_now", d), resources={"idle_seconds": 0.5}
    )
    assert left == [1]


def test_the_same_work_under_two_names_is_done_once(world):
    twins = [world.node("one"), world.node("two")]
    twins[1].params["name"] = "one"
    outcome = world.drive([*twins, world.node("score", kind="evaluate", inputs=["two"])])
    assert outcome.complete
    assert [node_id for node_id, _ in world.heard.of("start")] == ["one", "score"]


def test_a_lost_input_is_made_anew_and_those_that_wait_for_it_wait_on(world):
    nodes = [
        world.node("map", kind="map", base=None),
        world.node("use", inputs=["map"]),
        world.node("other", inputs=["map"], cost=9),
    ]
    plan = Plan("r", {node.id: node for node in nodes})
    key = plan.key("map")
    nodes[1].params["tries"] = []
    assert world.drive(nodes).complete
    world.store.discard("map", key)
    world.store.discard("heal", world.driver.plan.key("use"))
    world.store.discard("heal", world.driver.plan.key("other"))
    world.heard.events.clear()
    assert world.drive(nodes).complete
    assert world.heard.of("start")[0][0] == "map"


def test_a_driver_that_was_replaced_stops(world, monkeypatch):
    monkeypatch.setattr("orchestrator.driver.loop.LOOK_SECONDS", 0.2)
    monkeypatch.setattr("orchestrator.runs.HEARTBEAT_SECONDS", 0.2)

    def rob(_):
        def take():
            with RunFolder(world.folder.path).lock(takeover=True):
                time.sleep(3)

        threading.Timer(1, take).start()

    with pytest.raises(RunTaken, match="another driver"):
        world.drive([world.node("long", tries=["hang"])], before=rob)
