"""Running a sweep from start to report: lock, cluster, driver, tables, page, exit status."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from cluster.connection import Capacity, Cluster
from orchestrator.commit import commit
from orchestrator.consensus import consensus_table
from orchestrator.driver import Driver, Listener, Outcome
from orchestrator.driver.loop import TARGET
from orchestrator.estimate.feasible import obstacles
from orchestrator.estimate.forecast import Forecast, forecast_of
from orchestrator.graph import Plan
from orchestrator.plan import build_plan
from orchestrator.report import Report, RunSummary, build_report
from orchestrator.resources import Resources
from orchestrator.results import (
    deviations,
    fetch_tables,
    maps_table,
    profile_table,
    results_table,
    validation_table,
)
from orchestrator.reuse import Assessment, assess
from orchestrator.runs import Fence, RunFolder, runs_folder
from orchestrator.sources import DigestCache
from orchestrator.status import status_data
from orchestrator.store import Store, open_store
from orchestrator.sweep import Sweep
from orchestrator.watch import QuietWatch, watching
from workers.errors import InvalidInput

ONE_SIGNAL_SECONDS = 1.0


@dataclass(frozen=True)
class Result:
    """How `run` ended."""

    status: int
    data: dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a sweep runs.

    Args:
        address: of a running cluster; None: Ray is started in this process.
        cpus: slots of the started one.
        gpus: that the started one declares.
        takeover: take the run from a driver that seems to live.
        target: what workers call for an attempt.
    """

    address: str | None = None
    cpus: int | None = None
    gpus: int | None = None
    takeover: bool = False
    target: str = TARGET


def execute(
    sweep: Sweep,
    store: Store,
    base: Path,
    plan: Plan,
    *,
    place: Place,
    plain: bool,
    console: Console,
) -> Result:
    """Run or resume a sweep and write its report.

    Raises:
        RunHeld: another driver holds the run.
        RunTaken: another driver has taken it over.
        ClusterUnreachable: no Ray cluster at `address`.
        InvalidInput: no node of the cluster can hold one job.
    """
    folder = RunFolder(runs_folder() / sweep.name)
    began = time.monotonic()
    with folder.lock(place.takeover) as hold:
        assessment = assess(plan, store)
        folder.start(sweep, base, store.location, plan)
        fence = Fence(store, folder.identity(), hold)
        driven = _Driven(sweep, store, plan, folder, fence, place, plain, console)
        outcome = driven.run(assessment)
        report = write_report(folder)
        if report.damaged and outcome.complete:
            # Bytes that changed on disk show only when they are read.
            for kind, key in report.damaged:
                store.discard(kind, key)
            if not plain:
                console.print(f"{len(report.damaged)} artefacts are damaged and are made anew")
            outcome = driven.run(assess(plan, store))
            report = write_report(folder)
    seconds = time.monotonic() - began
    data = {
        "run": sweep.name,
        "done": outcome.done,
        "reused": outcome.reused,
        "failed": outcome.failed,
        "blocked": outcome.blocked,
        "interrupted": outcome.interrupted,
        "reason": outcome.reason,
        "seconds": round(seconds, 1),
        "model_loads": driven.model_loads,
        "gpu_hours": round(driven.gpu_hours, 3),
        "verdicts": report.report.verdicts,
        "report": str(report.report.page),
    }
    if not plain:
        _summarise(console, outcome, seconds, driven, folder, report.report)
    if outcome.interrupted:
        return Result(130, data)
    return Result(0 if outcome.complete else 1, data)


@dataclass
class _Driven:
    """A plan brought to its end by one driver, or by a second where the first left holes."""

    sweep: Sweep
    store: Store
    plan: Plan
    folder: RunFolder
    fence: Fence
    place: Place
    plain: bool
    console: Console
    model_loads: int = 0
    gpu_hours: float = 0.0

    def run(self, assessment: Assessment) -> Outcome:
        if not assessment.count("run") and not assessment.count("undetermined"):
            # Nothing to do needs no cluster; the journal says so for `status`.
            nothing = Capacity(())
            return self._drive(lambda: nothing, QuietWatch(), assessment, Forecast({}, {}, {}))
        with Cluster(self.place.address, self.place.cpus, self.place.gpus) as cluster:
            capacity = cluster.capacity()
            resources = self.sweep.resources
            if not resources.autoscaling:
                _refuse_impossible(self.plan, resources, capacity)
            card = cluster.card_bytes() if capacity.gpus and not resources.gpu_memory_gib else None
            forecast = forecast_of(self.plan, self.store, resources, card)
            if not self.plain:
                nodes = f"{capacity.nodes} node{'s' if capacity.nodes > 1 else ''}"
                cards = f", {capacity.gpus:g} GPUs" if capacity.gpus else ""
                self.console.print(
                    f"Run {self.sweep.name}: {len(self.plan.nodes)} stages, "
                    f"{assessment.count('reuse')} of them in the store; "
                    f"{nodes} with {capacity.cpus:g} CPUs{cards}"
                )
            with watching(self.console, self.plan, quiet=self.plain) as watch:
                return self._drive(cluster.capacity, watch, assessment, forecast)

    def _drive(
        self,
        look: Callable[[], Capacity],
        listener: Listener,
        assessment: Assessment,
        forecast: Forecast,
    ) -> Outcome:
        driver = Driver(
            self.plan,
            self.store,
            self.folder,
            self.sweep,
            look,
            self.fence,
            listener,
            _provenance(),
            assessment=assessment,
            estimates=forecast.seconds,
            needs=forecast.needs,
            shares=forecast.shares,
            target=self.place.target,
        )
        with _stopped_by_signals(driver):
            outcome = driver.execute()
        self.model_loads += driver.model_loads
        self.gpu_hours = driver.gpu_hours
        return outcome


@dataclass(frozen=True)
class Written:
    """A report, and what could not be put into it."""

    report: Report
    damaged: list[tuple[str, str]]
    """Kind and key of artefacts that are not what was written."""


def write_report(folder: RunFolder) -> Written:
    """Build the report of a run from the store."""
    sweep = folder.sweep()
    base, location = folder.place()
    store = open_store(location, new=False)
    plan = build_plan(sweep, base, DigestCache(store.folder / "digests.json"))
    records = folder.records()
    damaged: list[tuple[str, str]] = []
    known = fetch_tables(plan, store)
    results = results_table(plan, known, records, damaged)
    maps = maps_table(plan, known, records, damaged)
    depths = [depth for depth in sweep.depths if depth]
    consensus = consensus_table(maps, depths, sweep.maps.pool, results)
    state = status_data(folder)
    summary = RunSummary(
        name=sweep.name,
        created=time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        sweep=sweep.model_dump(mode="json"),
        stages=state["states"],
        failures=[(f["id"], f["class"], f["message"], f["log"]) for f in state["failed"]],
        deviations=deviations(plan, known, store),
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
    report = build_report(
        results,
        maps,
        consensus,
        profile_table(),
        summary,
        folder.report,
        validation_table(plan, known, damaged),
    )
    return Written(report, damaged)


def _refuse_impossible(plan: Plan, resources: Resources, capacity: Capacity) -> None:
    """A job that no node can hold would wait for ever."""
    for obstacle in obstacles(plan, {}, resources, capacity):
        raise InvalidInput(obstacle.problem, obstacle.where, obstacle.remedy)


@contextlib.contextmanager
def _stopped_by_signals(driver: Driver) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM (Ray Jobs, SLURM) and a lost terminal stop a run in an orderly way.

    A second one ends it at once. Ray's own handlers were set before.
    """
    asked: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if asked and number == signal.SIGTERM and now - asked[-1] < ONE_SIGNAL_SECONDS:
            return  # a batch system told both the job and its child
        asked.append(now)
        if len(asked) > 1:
            raise KeyboardInterrupt
        driver.stop("interrupted" if number == signal.SIGINT else "told to end")

    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signals.append(signal.SIGHUP)
    previous = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _provenance() -> dict[str, str]:
    return {"commit": commit(), "layersweep": version("layersweep")}


def _summarise(
    console: Console,
    outcome: Outcome,
    seconds: float,
    driven: _Driven,
    folder: RunFolder,
    report: Report,
) -> None:
    fresh = outcome.done - outcome.reused
    console.print(
        f"{outcome.done} stages done ({outcome.reused} reused, {fresh} run) in {seconds:.0f} s; "
        f"base models loaded {driven.model_loads} times"
        + (f"; {driven.gpu_hours:.2f} GPU-hours so far" if driven.gpu_hours else "")
    )
    records = folder.records() if outcome.failed else {}
    for node_id in outcome.failed:
        record = records[node_id]
        console.print(f"failed: {node_id} ({record.failure}) {record.message}", markup=False)
        console.print(f"        log: {record.log}", markup=False)
    if outcome.blocked:
        console.print(f"{len(outcome.blocked)} more stages wait for what failed")
    if outcome.reason:
        go_on = "Run the same command again to go on."
        if not outcome.interrupted:
            go_on = "Raise limits.gpu_hours to go on."
        console.print(f"Stopped: {outcome.reason}. {go_on}")
    for model, sentence in report.verdicts.items():
        console.print(f"{model}: {sentence}", markup=False, soft_wrap=True)
    console.print(f"Report: {report.page}", markup=False, soft_wrap=True)
