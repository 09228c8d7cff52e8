"""The commands on runs: status, logs, report, cancel.

A run that was submitted to a cluster is asked there; one whose folder is here is read here.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.options import AsJson, RunName, app, console, error_console, print_json

if TYPE_CHECKING:
    from cluster.jobs import Jobs
    from orchestrator.submitted import Submission

CANCEL_SECONDS = 150.0
POLL_SECONDS = 0.5


@app.command()
def status(run_name: RunName, as_json: AsJson = False) -> None:
    """Show how far a run is: stages by state, what runs now, what failed and why."""
    from orchestrator.runs import RunFolder
    from orchestrator.status import status_data, status_table

    away = _away(run_name)
    if away is not None:
        _status_there(*away, as_json)
        return
    data = status_data(RunFolder.existing(run_name))
    if as_json:
        print_json(data)
    else:
        status_table(data, console())


@app.command()
def logs(
    run_name: RunName,
    stage: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="A stage's id, or a part of it.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run, or the stage, has ended.")
    ] = False,
) -> None:
    """Print a run's journal, or the log of one stage's newest attempt."""
    from orchestrator.follow import follow_journal, follow_stage
    from orchestrator.runs import RunFolder
    from orchestrator.status import journal_lines, stage_log

    away = _away(run_name)
    if away is not None:
        raise typer.Exit(_logs_there(*away, stage, follow))
    folder = RunFolder.existing(run_name)
    lines: Iterable[str]
    if stage is None:
        lines = follow_journal(folder) if follow else journal_lines(folder)
    else:
        lines = follow_stage(folder, stage) if follow else stage_log(folder, stage)
    for line in lines:
        print(line, flush=follow)


@app.command()
def report(run_name: RunName, as_json: AsJson = False) -> None:
    """Build a run's report from the store, finished or not: HTML, Markdown, Parquet and CSV."""
    from orchestrator.execute import write_report
    from orchestrator.runs import RunFolder

    away = _away(run_name)
    if away is not None:
        verdicts, page = _report_there(*away)
    else:
        written = write_report(RunFolder.existing(run_name)).report
        verdicts, page = written.verdicts, str(written.page)
    if as_json:
        print_json({"verdicts": verdicts, "report": page})
    else:
        print(page)


@app.command()
def cancel(run_name: RunName) -> None:
    """Stop a run, here or on a cluster: what is done is kept, and the same command goes on from it."""
    from orchestrator.submitted import find_submission

    submission = find_submission(run_name)
    stopped = None if submission is None else _cancel_there(submission)
    if stopped is None:
        stopped = _cancel_here(run_name)
    raise typer.Exit(0 if stopped else 1)


# --- on a cluster ----------------------------------------------------------------------------


def _away(run_name: str) -> "tuple[Submission, Jobs] | None":
    """The submission a name stands for, and the jobs of its cluster; None for a run of this machine."""
    from cluster.jobs import Jobs
    from orchestrator.submitted import find_submission

    submission = find_submission(run_name)
    if submission is None or submission.overtaken:
        return None
    return submission, Jobs(submission.address)


def _status_there(submission: "Submission", jobs: "Jobs", as_json: bool) -> None:
    from dataclasses import asdict

    from orchestrator.status import status_table
    from orchestrator.submitted import stage_status

    job = jobs.state(submission.id)
    found = stage_status(submission, jobs)
    if as_json:
        told: dict[str, Any] = {"stages": found} if isinstance(found, str) else found
        print_json({"job": {**asdict(job), "address": jobs.address}, **told})
        return
    out = console()
    out.print(f"Job {job.id} at {jobs.address}: {job.state}", markup=False)
    if isinstance(found, str):
        out.print(f"No stages to show: {found}", markup=False)
        if job.state == "failed":
            out.print(job.message, markup=False)
    else:
        status_table(found, out)


def _logs_there(submission: "Submission", jobs: "Jobs", stage: str | None, follow: bool) -> int:
    from orchestrator.cli.submit import follow_job
    from orchestrator.submitted import complaint, errand, errand_followed
    from workers.errors import InvalidInput

    if stage is None:
        if follow:
            follow_job(submission, jobs)
        else:
            print(jobs.logs(submission.id), end="")
        return 0
    words = ("logs", submission.run, stage)
    if follow:
        notices = error_console()
        return errand_followed(
            submission,
            jobs,
            lambda text: print(text, end="", flush=True),
            lambda line: notices.print(line, markup=False, soft_wrap=True),
            *words,
            "--follow",
        )
    code, text = errand(submission, jobs, *words)
    if code:
        raise InvalidInput(complaint(text))
    print(text, end="")
    return 0


def _report_there(submission: "Submission", jobs: "Jobs") -> tuple[Any, str]:
    from orchestrator.submitted import fetch_report

    arrived = fetch_report(submission, jobs)
    error_console().print(
        f"{arrived.files} files from {jobs.address}: {arrived.packed / 1e6:.1f} MB sent, "
        f"{arrived.size / 1e6:.1f} MB unpacked",
        markup=False,
    )
    return arrived.about["verdicts"], str(arrived.folder / "index.html")


def _cancel_there(submission: "Submission") -> bool | None:
    """Whether its job is stopped; None if it had ended before."""
    from cluster.jobs import Jobs

    jobs = Jobs(submission.address)
    job = jobs.state(submission.id)
    if not job.over:
        jobs.stop(job.id)
        print(f"asked job {job.id} to stop: it keeps what it has and leaves", flush=True)
        job = jobs.wait(job.id, CANCEL_SECONDS)
        print(f"job {job.id} is {job.state}; submit the sweep again to go on")
        return job.over
    if submission.overtaken:
        return None
    print(f"job {job.id} had ended before ({job.state}): nothing to stop")
    return True


# --- here ------------------------------------------------------------------------------------


def _cancel_here(run_name: str) -> bool:
    """Whether no driver holds the run any more.

    Raises:
        RunHeld: one of another machine does.
    """
    from orchestrator.runs import RunFolder, RunHeld

    folder = RunFolder.existing(run_name)
    holder = folder.holder()
    if holder is None:
        print(f"no driver is at work on run {folder.name}: nothing to stop")
        return True
    if holder["host"] != socket.gethostname():
        raise RunHeld(
            f"run {folder.name} is held by process {holder['pid']} on {holder['host']}: "
            f"cancel it there"
        )
    os.kill(int(holder["pid"]), signal.SIGTERM)
    print(f"asked process {holder['pid']} to stop: it keeps what it has and leaves", flush=True)
    until = time.monotonic() + CANCEL_SECONDS
    while folder.held():
        if time.monotonic() > until:
            print(f"process {holder['pid']} is still at it: look at its logs", file=sys.stderr)
            return False
        time.sleep(POLL_SECONDS)
    print(f"run {folder.name} has stopped; run the sweep again to go on")
    return True
