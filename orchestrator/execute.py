"""Running a sweep from start to report: lock, cluster, driver, tables, page, exit status."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from cluster.connection import Capacity, Cluster
from cluster.lease import Shape
from orchestrator.consensus import consensus_table
from orchestrator.driver import Driver, Outcome
from orchestrator.graph import Plan
from orchestrator.plan import build_plan
from orchestrator.report import Report, RunSummary, build_report
from orchestrator.results import (
    fetch_tables,
    maps_table,
    profile_table,
    results_table,
    validation_table,
)
from orchestrator.reuse import assess
from orchestrator.runs import RunFolder
from orchestrator.sources import DigestCache
from orchestrator.store import Store, open_store
from orchestrator.sweep import Sweep
from orchestrator.watch import LiveWatch, PlainWatch, status_data
from workers.errors import InvalidInput


@dataclass(frozen=True)
class Result:
    """How `run` ended."""

    status: int
    data: dict[str, Any]


def execute(
    sweep: Sweep,
    store: Store,
    base: Path,
    plan: Plan,
    *,
    address: str | None,
    cpus: int | None,
    plain: bool,
    console: Console,
) -> Result:
    """Run or resume a sweep and write its report.

    Raises:
        RunHeld: another driver holds the run.
        ClusterUnreachable: no Ray cluster at `address`.
        InvalidInput: no node of the cluster can hold one job.
    """
    folder = RunFolder(Path("runs") / sweep.name)
    began = time.monotonic()
    with folder.lock():
        folder.start(sweep, base, store.location, plan)
        assessment = assess(plan, store)
        if assessment.count("run") or assessment.count("undetermined"):
            with Cluster(address, cpus) as cluster, _terminated_like_interrupted():
                capacity = cluster.capacity()
                shape = _shape(sweep, capacity)
                slots = _slots(shape, capacity)
                if not plain:
                    console.print(
                        f"Run {sweep.name}: {len(plan.nodes)} stages, "
                        f"{assessment.count('reuse')} of them in the store; "
                        f"{slots} job(s) at once on {capacity.nodes} node(s)"
                    )
                with _watch(console, plain, len(plan.nodes)) as watch:
                    minutes = sweep.resources.checkpoint_minutes
                    driver = Driver(
                        plan,
                        store,
                        folder,
                        shape,
                        slots,
                        _provenance(),
                        watch,
                        assessment,
                        None if minutes is None else 60 * minutes,
                    )
                    outcome = driver.execute()
                loads = driver.model_loads
        else:
            # Nothing to do needs no cluster; the journal says so for `status`.
            driver = Driver(
                plan, store, folder, Shape(), 0, _provenance(), _Quiet(console, 0), assessment
            )
            outcome, loads = driver.execute(), 0
        report = write_report(folder)
    seconds = time.monotonic() - began
    data = {
        "run": sweep.name,
        "done": outcome.done,
        "reused": outcome.reused,
        "failed": outcome.failed,
        "blocked": outcome.blocked,
        "interrupted": outcome.interrupted,
        "seconds": round(seconds, 1),
        "model_loads": loads,
        "verdicts": report.verdicts,
        "report": str(report.page),
    }
    if not plain:
        _summarise(console, outcome, seconds, loads, folder, report)
    if outcome.interrupted:
        return Result(130, data)
    return Result(0 if outcome.complete else 1, data)


def write_report(folder: RunFolder) -> Report:
    """Build the report of a run from the store."""
    sweep = folder.sweep()
    base, location = folder.place()
    store = open_store(location)
    plan = build_plan(sweep, base, DigestCache(store.folder / "digests.json"))
    records = folder.records()
    known = fetch_tables(plan, store)
    results = results_table(plan, known, records)
    maps = maps_table(plan, known)
    depths = [depth for depth in sweep.depths if depth]
    consensus = consensus_table(maps, depths, sweep.maps.pool, results)
    state = status_data(folder)
    summary = RunSummary(
        name=sweep.name,
        created=time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        sweep=sweep.model_dump(mode="json"),
        stages=state["states"],
        failures=[(f["id"], f["class"], f["message"], f["log"]) for f in state["failed"]],
        lab=any(
            reference.startswith("lab:")
            for reference in (
                *(m.reference for m in sweep.models),
                *(e.encoder for e in sweep.encoders),
                *(t.data or "" for t in sweep.tasks),
            )
        ),
        pool=sweep.maps.pool,
        tolerance=sweep.report.tolerance,
        depths=depths,
        wall_seconds=folder.seconds(),
        versions=_provenance(),
    )
    return build_report(
        results,
        maps,
        consensus,
        profile_table(),
        summary,
        folder.report,
        validation_table(plan, known),
    )


def _shape(sweep: Sweep, capacity: Capacity) -> Shape:
    gpus = sweep.resources.gpus
    if gpus is None:
        gpus = 1.0 if capacity.gpus else 0.0
    shape = Shape(cpus=sweep.resources.cpus, gpus=gpus)
    if shape.cpus > capacity.node_cpus:
        raise InvalidInput(
            f"a job wants {shape.cpus:g} CPUs, but no node has more than {capacity.node_cpus:g}",
            "sweep.resources.cpus",
            "lower it",
        )
    if shape.gpus > capacity.node_gpus:
        raise InvalidInput(
            f"a job wants {shape.gpus:g} GPUs, but no node has more than {capacity.node_gpus:g}",
            "sweep.resources.gpus",
            "lower it, or set it to 0 to run on CPUs",
        )
    return shape


def _slots(shape: Shape, capacity: Capacity) -> int:
    slots = int(capacity.cpus // shape.cpus)
    if shape.gpus:
        slots = min(slots, int(capacity.gpus // shape.gpus))
    return max(1, slots)


class _Quiet(PlainWatch):
    def event(self, name: str, node_id: str, detail: dict[str, Any]) -> None:
        """Say nothing: the caller wants one JSON document."""


@contextlib.contextmanager
def _watch(console: Console, plain: bool, total: int) -> Iterator[PlainWatch]:
    if plain:
        yield _Quiet(console, total)
    elif console.is_terminal:
        with LiveWatch(console, total) as live:
            yield live
    else:
        yield PlainWatch(console, total)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM (batch systems, Ray Jobs) ends a run as Ctrl-C does. Ray sets its own handler first."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _provenance() -> dict[str, str]:
    checkout = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=checkout,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        commit = answer.stdout.strip() if answer.returncode == 0 else "unknown"
    except (OSError, subprocess.TimeoutExpired):
        commit = "unknown"
    return {"commit": commit, "layersweep": version("layersweep")}


def _summarise(
    console: Console,
    outcome: Outcome,
    seconds: float,
    loads: int,
    folder: RunFolder,
    report: Report,
) -> None:
    fresh = outcome.done - outcome.reused
    console.print(
        f"{outcome.done} stages done ({outcome.reused} reused, {fresh} run) in {seconds:.0f} s; "
        f"base models loaded {loads} times"
    )
    records = folder.records() if outcome.failed else {}
    for node_id in outcome.failed:
        record = records[node_id]
        console.print(f"failed: {node_id} ({record.failure}) {record.message}", markup=False)
        console.print(f"        log: {record.log}", markup=False)
    if outcome.blocked:
        console.print(f"{len(outcome.blocked)} more stages wait for what failed")
    if outcome.interrupted:
        console.print("Interrupted. Run the same command again to go on.")
    for model, sentence in report.verdicts.items():
        console.print(f"{model}: {sentence}", markup=False, soft_wrap=True)
    console.print(f"Report: {report.page}", markup=False, soft_wrap=True)
