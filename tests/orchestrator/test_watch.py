"""What a person sees of a run: the live table, plain lines, whatever happens in whatever order."""

import os
import random
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.driver import Running
from orchestrator.plan import build_plan
from orchestrator.sources import DigestCache
from orchestrator.sweep import load_sweep
from orchestrator.watch import LiveWatch, PlainWatch, QuietWatch, watching
from orchestrator.watch.words import about, shortened, span

CONFIGS = Path(__file__).parents[2] / "configs"
JOINT = "llama-tiny+conformer-tiny/all/consensus/d2/joint/s0"
HEAL = f"heal/{JOINT}"
MANY = ("selectors=[own, consensus, last]", "share.heal=false", "depths=[0, 1, 2, 3, 4]")


def lay_out(folder, *overrides, config="smoke"):
    sweep = load_sweep(CONFIGS / f"{config}.yaml", overrides)
    return build_plan(sweep, CONFIGS, DigestCache(folder / "digests.json"))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("large"), *MANY)


@dataclass
class Run:
    """A driver's public face, moved by hand."""

    plan: object
    slots: int = 2
    gpus: float = 0.0
    stopping: bool = False
    reason: str = ""
    now: list[Running] = field(default_factory=list)

    def __post_init__(self):
        self.state = dict.fromkeys(self.plan.nodes, "waiting")
        self.estimates = {node.id: node.cost for node in self.plan.nodes.values()}

    @property
    def slots_in_use(self):
        return len(self.now)

    @property
    def gpus_in_use(self):
        return sum(now.gpus for now in self.now)

    def running(self):
        return self.now

    def begin(self, *ids, seconds=5.0, log="", gpus=0.0, ranks=1):
        for node_id in ids:
            self.state[node_id] = "running"
            self.now.append(Running(node_id, seconds, str(log), gpus, ranks))

    def end(self, *ids, state="done"):
        for node_id in ids:
            self.state[node_id] = state
        self.now = [now for now in self.now if now.node_id not in ids]


class Clock:
    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


def live(plan, width=80, height=40):
    console = Console(file=StringIO(), width=width, height=height, force_terminal=True)
    clock = Clock()
    return LiveWatch(console, plan, clock), clock


def seen(watch, run, width=80, height=40, ended=False):
    """The drawing as text, after the watch took over the driver's states."""
    watch._take_over(run)
    return "\n".join(line.plain for line in watch.frame(run, width, height, ended))


def of_cell(plan, heal):
    return [node.id for node in plan.by_kind("evaluate") if node.inputs["model"] == heal]


def row(text, *names):
    """The cells of the row whose labels end with the last name, under the block of the others."""
    lines = text.splitlines()
    start = 0
    for name in names:
        start = next(i for i in range(start, len(lines)) if name in lines[i].split())
    return lines[start]


# --- the table ---------------------------------------------------------------------------------


def test_at_the_start_every_row_and_depth_waits_and_no_time_is_promised(plan):
    watch, _ = live(plan)
    text = seen(watch, Run(plan))
    assert "smoke" in text
    assert f"0/{len(plan.nodes)}" in text
    assert "time left: ?" in text
    assert "model llama-tiny, task all, selector consensus" in text
    assert re.search(r"encoder +healing +0 +1 +2", text)
    for encoder in ("whisper-tiny", "conformer-tiny"):
        for healing in ("none", "decoder", "joint"):
            assert row(text, encoder, healing).count("· 0/7") == 3
    assert re.search(r"^encode +· +0/16", text, re.M)
    assert "GPU" not in text


def test_a_cell_counts_its_heal_and_its_evaluations(plan):
    watch, _ = live(plan)
    run = Run(plan)
    run.begin(HEAL)
    assert "▸ 0/7" in row(seen(watch, run), "conformer-tiny", "joint")
    run.end(HEAL)
    tests = of_cell(plan, HEAL)
    assert len(tests) == 6
    run.end(*tests[:3])
    assert row(seen(watch, run), "conformer-tiny", "joint").split()[-2:] == ["·", "4/7"]
    run.end(*tests[3:])
    text = seen(watch, run)
    assert row(text, "conformer-tiny", "joint").split()[-2:] == ["✓", "7/7"]
    assert row(text, "whisper-tiny", "joint").split()[-2:] == ["·", "0/7"]


def test_events_alone_move_the_table_before_the_driver_is_asked(plan):
    watch, _ = live(plan)
    run = Run(plan)
    watch.tick(run)
    watch.event("start", HEAL, {"log": "/x/heal.log"})
    watch.event("failed", HEAL, {"class": "invalid", "message": "the loss is nan"})
    text = "\n".join(line.plain for line in watch.frame(run, 80, 40))
    assert "✗ 0/7" in row(text, "conformer-tiny", "joint")
    assert "1 failed" in text


def test_the_unpruned_control_is_part_of_every_selectors_row(large):
    watch, _ = live(large)
    run = Run(large)
    control = "heal/llama-tiny+whisper-tiny/asr-en/d0/none"
    run.end(control, *of_cell(large, control))
    lines = [
        line
        for line in seen(watch, run, 120, 200).splitlines()
        if re.search(r" none .*✓ 3/3", line)
    ]
    assert len(lines) == 3
    assert f"3/{len(large.nodes)}" in seen(watch, run, 120, 200)


def test_heals_of_their_own_have_a_row_a_task(large):
    watch, _ = live(large)
    text = seen(watch, Run(large), 120, 200)
    assert re.search(r"encoder +task +selector +healing +0 +1 +2 +3 +4", text)
    for task in ("asr-en", "asr-de", "ast-de-en"):
        assert task in text


def test_where_not_all_rows_fit_those_at_work_are_shown_and_the_others_counted(large):
    watch, _ = live(large, height=24)
    run = Run(large)
    at_work = "heal/llama-tiny+conformer-tiny/ast-de-en/last/d3/joint/s0"
    failed = "heal/llama-tiny+conformer-tiny/asr-de/own/d2/decoder/s0"
    run.begin(at_work)
    run.end(failed, state="failed")
    text = seen(watch, run, 80, 24)
    assert len(text.splitlines()) <= 23
    assert "▸" in row(text, "conformer-tiny", "ast-de-en", "last", "joint")
    assert "✗" in row(text, "conformer-tiny", "asr-de", "own", "decoder")
    rest = int(re.search(r"and (\d+) more rows", text)[1])
    shown = sum(bool(re.search(r"\b(none|decoder|joint) ", line)) for line in text.splitlines())
    assert rest + shown == 2 * 3 * 3 * 3


@pytest.mark.parametrize("width", [20, 40, 60, 80, 140, 250])
@pytest.mark.parametrize("height", [3, 10, 24, 60])
def test_the_drawing_fits_every_terminal(plan, large, width, height):
    for one in (plan, large):
        watch, _ = live(one, width, height)
        run = Run(one, slots=40, gpus=8.0, reason="the budget of 100 GPU-hours is spent")
        run.begin(*list(one.nodes)[:40], gpus=0.5, log="/nowhere")
        lines = seen(watch, run, width, height).splitlines()
        assert len(lines) <= max(1, height - 1)
        assert max(map(len, lines)) <= width


def test_many_depths_on_a_narrow_terminal_are_marks(tmp_path):
    deep = lay_out(tmp_path, "models=[{decoder: lab:llama}]", f"depths={list(range(12))}")
    watch, _ = live(deep)
    run = Run(deep)
    run.end("heal/llama+whisper-tiny/all/consensus/d3/none", state="failed")
    text = seen(watch, run, 50, 40)
    assert row(text, "whisper-tiny", "none").endswith("none     ···✗········")
    assert "healing  0…11" in text
    assert "n/m" not in text


def test_what_runs_is_shown_with_its_time_gpus_and_last_words(plan, tmp_path):
    log = tmp_path / "a.log"
    log.write_text("loading\n2026-01-01T00:00:00Z step 3 of 30, \x1b[31mloss 2.5\x1b[0m\n\n")
    watch, _ = live(plan)
    run = Run(plan, gpus=8.0)
    run.begin(HEAL, seconds=75, log=log, gpus=2.0, ranks=2)
    text = seen(watch, run)
    assert "1 of 2 jobs\n2 of 8 GPUs" in text
    assert "1 min 15 s, 2 GPUs, 2 ranks" in text
    assert "step 3 of 30, loss 2.5" in text
    assert "2026-01-01" not in text
    wide = seen(watch, run, 140)
    assert f"{HEAL}  1 min 15 s, 2 GPUs, 2 ranks  step 3 of 30, loss 2.5" in wide


def test_more_jobs_than_lines_are_counted(plan):
    watch, _ = live(plan, height=24)
    run = Run(plan, slots=64)
    run.begin(*list(plan.nodes)[:64])
    text = seen(watch, run, 80, 24)
    shown = len(re.findall(r"^[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] ", text, re.M))
    assert shown >= 1
    assert f"and {64 - shown} more run" in text


def test_no_colour_is_needed_and_no_letter_beyond_ascii_where_there_is_none(plan):
    console = Console(
        file=TextIOWrapper(BytesIO(), encoding="ascii"),
        width=80,
        height=40,
        force_terminal=True,
    )
    watch = LiveWatch(console, plan)
    run = Run(plan)
    run.begin(HEAL)
    run.end(*of_cell(plan, HEAL)[:2], state="blocked")
    watch._take_over(run)
    text = "\n".join(line.plain for line in watch.frame(run, 80, 40))
    assert text.isascii()
    assert "> 0/7" in text
    assert "> running" in text


# --- time left ---------------------------------------------------------------------------------


def half_done(plan, factor):
    """A watch that saw the first half of a plan last `factor` times what was estimated."""
    watch, clock = live(plan)
    run = Run(plan, slots=1)
    watch.tick(run)
    ids = list(plan.nodes)
    for node_id in ids[: len(ids) // 2]:
        watch.event("start", node_id, {})
        clock.time += factor * plan.nodes[node_id].cost
        watch.event("done", node_id, {"seconds": 0.0})
        run.end(node_id)
    return watch, run


def test_the_time_left_follows_what_stages_really_last(plan):
    watch, run = half_done(plan, 1.0)
    left = sum(node.cost for i, node in plan.nodes.items() if run.state[i] != "done")
    assert f"{about(left)} left" in seen(watch, run)
    watch, run = half_done(plan, 60.0)
    assert f"{about(60 * left)} left" in seen(watch, run)


def test_more_slots_shorten_the_time_left_but_not_below_the_longest_chain(plan):
    watch, run = half_done(plan, 60.0)
    run.slots = 2
    left = sum(node.cost for i, node in plan.nodes.items() if run.state[i] != "done")
    assert f"{about(30 * left)} left" in seen(watch, run)
    run.slots = 10_000
    heal = max(node.cost for node in plan.by_kind("heal"))
    chain = 60 * (heal + max(node.cost for node in plan.by_kind("evaluate")))
    text = seen(watch, run)
    shown = re.search(r"about (\d+) (s|min) left", text)
    assert int(shown[1]) * {"s": 1, "min": 60}[shown[2]] >= 0.9 * chain


def test_without_room_on_the_cluster_no_time_is_promised(plan):
    watch, run = half_done(plan, 1.0)
    run.slots = 0
    assert "time left: ?" in seen(watch, run)


def test_a_spent_budget_is_said_in_place_of_a_time(plan):
    watch, run = half_done(plan, 1.0)
    run.reason = "the budget of 100 GPU-hours is spent"
    text = seen(watch, run)
    assert "nothing new is started: the budget of 100 GPU-hours is spent" in text
    assert "left" not in text.splitlines()[0]


# --- on a terminal -----------------------------------------------------------------------------


@pytest.fixture
def terminal():
    """A pseudo-terminal of 80 by 40: a console on it, and all it was sent."""
    leader, follower = os.openpty()
    sent = bytearray()

    def read():
        try:
            while data := os.read(leader, 65536):
                sent.extend(data)
        except OSError:
            pass

    thread = threading.Thread(target=read)
    thread.start()
    with os.fdopen(follower, "w") as file:
        yield Console(file=file, width=80, height=40, force_interactive=True), sent, thread
    thread.join(5)
    os.close(leader)


def test_on_a_terminal_trouble_stays_above_a_table_that_redraws_itself(plan, terminal):
    console, sent, thread = terminal
    run = Run(plan)
    assert console.is_terminal
    with watching(console, plan) as watch:
        assert isinstance(watch, LiveWatch)
        watch.clock = clock = Clock()
        watch._next_look = 0.0
        for node_id in list(plan.nodes)[:4]:
            clock.time += 1
            watch.event("start", node_id, {"log": "/x/1.log"})
            watch.tick(run)
            watch.event("done", node_id, {"seconds": 1.0})
            run.end(node_id)
        detail = {"class": "device-oom", "message": "CUDA out of memory", "delay": 4.0}
        watch.event("retry", HEAL, {**detail, "relief": "micro-batch 4 in place of 8"})
        run.end(*list(plan.nodes)[4:])
        clock.time += 1
        watch.tick(run)
    console.file.close()
    thread.join(5)
    text = sent.decode()
    assert "again in 4 s, next with micro-batch 4 in place of 8" in re.sub(r"\s+", " ", text)
    assert "build/speech-tiny/en  1 s" not in text  # what went well only moves the table
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back
    last = text[text.rindex("smoke") :]
    assert f"{len(plan.nodes)}/{len(plan.nodes)}" in last
    assert "jobs" not in last


def test_the_terminal_may_close_and_the_run_goes_on(plan, terminal):
    console, _, _ = terminal
    with watching(console, plan) as watch:
        console.file.close()
        console.file = Path("/dev/full").open("w")  # noqa: SIM115
        watch._next_look = 0.0
        watch.event("failed", HEAL, {"class": "invalid", "message": "no"})
        watch.tick(Run(plan))


# --- plain lines -------------------------------------------------------------------------------


def plain(plan):
    clock = Clock()
    file = StringIO()
    return PlainWatch(Console(file=file, width=80), plan, clock), clock, file


def test_one_line_an_event_however_long_and_whatever_is_in_it(plan):
    watch, _, file = plain(plan)
    watch.tick(Run(plan))
    watch.event("start", "build/llama-tiny", {"log": "/x/build.1.log"})
    watch.event("done", "build/llama-tiny", {"seconds": 200.4})
    nasty = "two\nlines, \x1b[2J\x1b]0;title\x07 a bell, [red]markup[/red]" + " long" * 60
    watch.event("start", HEAL, {"log": "/x/heal.1.log"})
    watch.event("retry", HEAL, {"class": "transient", "message": nasty, "delay": 8.0})
    watch.event("start", HEAL, {"log": "/x/heal.2.log"})
    watch.event("failed", HEAL, {"class": "invalid", "message": "the loss is nan"})
    total = len(plan.nodes)
    done, retry, failed = file.getvalue().splitlines()
    assert re.fullmatch(
        rf"\d\d:\d\d:\d\d \[  1/{total}\] done     build/llama-tiny  3 min 20 s", done
    )
    assert f"retry    {HEAL}  (transient) two lines, a bell, [red]markup[/red] long" in retry
    assert retry.endswith("long; again in 8 s")
    assert failed.endswith(f"FAILED   {HEAL}  (invalid) the loss is nan  log: /x/heal.2.log")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", file.getvalue())


def test_what_one_failure_blocks_is_one_line(plan):
    watch, _, file = plain(plan)
    watch.event("failed", HEAL, {"class": "invalid", "message": "no"})
    for node_id in of_cell(plan, HEAL):
        watch.event("blocked", node_id, {"message": f"needs {HEAL}, which failed"})
    watch.tick(Run(plan))
    watch.event("done", "build/llama-tiny", {"seconds": 1.0})
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1].endswith(f"blocked  6 stages: needs {HEAL}, which failed")


def test_what_was_in_the_store_is_counted_and_not_told(plan):
    watch, clock, file = plain(plan)
    run = Run(plan)
    run.end(*list(plan.nodes)[:10])
    watch.tick(run)
    watch.event("done", list(plan.nodes)[10], {"reused": True})
    assert file.getvalue() == ""
    run.end(list(plan.nodes)[10])
    clock.time += 1
    watch.event("done", list(plan.nodes)[11], {"seconds": 1.0})
    assert f"[ 12/{len(plan.nodes)}] done" in file.getvalue()


def test_a_long_silence_has_a_sign_of_life_a_minute(plan, tmp_path):
    log = tmp_path / "heal.log"
    log.write_text("step 7 of 30\n")
    watch, clock, file = plain(plan)
    run = Run(plan, gpus=4.0)
    run.begin(HEAL, seconds=59, log=log, gpus=1.0)
    for clock.time in range(60):
        watch.tick(run)
    assert file.getvalue() == ""
    for clock.time in range(60, 200):
        watch.tick(run)
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].endswith(
        "running  1 of 2 jobs, 1 of 4 GPUs, 1 min so far, time left: ?; "
        f"longest: {HEAL}  59 s  step 7 of 30"
    )


def test_the_run_as_a_whole_is_told_of(plan):
    watch, _, file = plain(plan)
    watch.event("waiting", "", {"message": "waits for room on the cluster"})
    watch.event("capacity", "", {"nodes": 3, "before": 2, "after": 4})
    watch.event("stopping", "", {"message": "interrupted: running stages keep a checkpoint"})
    watch.event("stopped", HEAL, {})
    waiting, capacity, stopping, stopped = file.getvalue().splitlines()
    assert waiting.endswith("waiting  waits for room on the cluster")
    assert capacity.endswith("cluster  3 node(s), 4 job(s) at once (were 2)")
    assert stopping.endswith("stopping interrupted: running stages keep a checkpoint")
    assert stopped.endswith(f"stopped  {HEAL}")


def test_a_reader_that_leaves_does_not_end_the_run():
    code = """
import sys
from rich.console import Console
from orchestrator.graph import Plan
from orchestrator.watch import PlainWatch
watch = PlainWatch(Console(), Plan("s", {}))
for _ in range(100):
    watch.event("done", "build/a", {"seconds": 1.0})
print("went on", file=sys.stderr)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == "went on\n"
    assert process.wait() == 0


def test_quiet_is_quiet_and_a_pipe_gets_plain_lines(plan):
    console = Console(file=StringIO())
    with watching(console, plan, quiet=True) as watch:
        assert isinstance(watch, QuietWatch)
        watch.event("failed", HEAL, {"class": "invalid", "message": "no"})
        watch.tick(Run(plan))
    assert console.file.getvalue() == ""
    with watching(console, plan) as watch:
        assert type(watch) is PlainWatch


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("make", [live, plain])
def test_no_order_of_events_breaks_the_view(plan, make, seed):
    dice = random.Random(seed)
    watch, clock, *_ = make(plan)
    run = Run(plan, gpus=2.0)
    names = ("start", "done", "retry", "failed", "blocked", "stopped", "waiting", "capacity", "new")
    details = ({}, {"message": "m"}, {"seconds": 1.0}, {"class": "c", "message": "x", "delay": 2.0})
    ids = [*plan.nodes, "", "never/heard/of/it"]
    for _ in range(400):
        node_id = dice.choice(ids)
        watch.event(dice.choice(names), node_id, dict(dice.choice(details)))
        if node_id in run.state and dice.random() < 0.5:
            run.state[node_id] = dice.choice(("waiting", "ready", "running", "done", "failed"))
            run.now = [Running(i, 1.0, "", 0.5, 1) for i in dice.sample(list(plan.nodes), 3)]
        clock.time += dice.random()
        watch.tick(run)
    watch._take_over(run)
    counts = watch.board.all.counts
    assert {s: n for s, n in counts.items() if n} == {
        s: list(run.state.values()).count(s) for s in set(run.state.values())
    }


# --- words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (19_200, "5 h 20 min"),
        (183_600, "2 days 3 h"),
    ],
)
def test_measured_times_read_well(seconds, words):
    assert span(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (1, "about 10 s"),
        (44, "about 40 s"),
        (100, "about 2 min"),
        (719, "about 12 min"),
        (19_100, "about 5 h 20 min"),
        (270_000, "about 3 days"),
    ],
)
def test_guessed_times_are_no_finer_than_a_guess(seconds, words):
    assert about(seconds) == words


def test_a_long_name_keeps_its_end():
    short = shortened(HEAL, 30)
    assert len(short) == 30
    assert short.startswith("heal/")
    assert short.endswith("d2/joint/s0")
    assert shortened("音声認識モデル", 7) in ("音…ル", "音…デル", "音…ル ")
