"""`layersweep submit`: the sweep goes to a cluster, this machine may go away."""

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import (
    AsJson,
    Overrides,
    SweepFile,
    app,
    console,
    error_console,
    print_json,
)

if TYPE_CHECKING:
    from cluster.jobs import Jobs
    from orchestrator.shipping import Shipped
    from orchestrator.submitted import Submission


@app.command()
def submit(
    sweep_file: SweepFile,
    address: Annotated[
        str,
        typer.Option(metavar="URL", help="The cluster's dashboard, such as http://head:8265."),
    ],
    root: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="Folder on the cluster, seen by all its nodes, for runs and store."
        ),
    ] = "~/layersweep",
    store: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="Store on the cluster; default: ROOT/store."),
    ] = None,
    overrides: Overrides = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Stay, and print what the run prints.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Hand a sweep to a Ray cluster as a job; it runs on when this machine is switched off."""
    from dataclasses import asdict

    from cluster.jobs import Jobs
    from orchestrator.submitted import hand_over
    from orchestrator.sweep import load_sweep

    sweep = load_sweep(sweep_file, overrides or ())
    submission, shipped = hand_over(sweep, sweep_file.absolute().parent, address, root, store)
    if as_json:
        print_json({**asdict(submission), "files": shipped.files, "bytes": shipped.size})
    else:
        _say(submission, shipped)
    if follow:
        ended = follow_job(submission, Jobs(submission.address))
        raise typer.Exit(ended)


def follow_job(submission: "Submission", jobs: "Jobs") -> int:
    """Print what a run's job prints until it ends.

    Returns:
        Its exit status.
    """
    notices = error_console()

    def notice(line: str) -> None:
        notices.print(line, markup=False, soft_wrap=True)

    def write(text: str) -> None:
        print(text, end="", flush=True)

    try:
        ended = jobs.follow(submission.id, write, notice)
    except KeyboardInterrupt:
        notice(f"left; the job goes on (`layersweep cancel {submission.run}` stops it)")
        raise
    if ended.exit_status is None:
        notice(f"job {ended.id} {ended.state}: {ended.message}")
    return ended.status


def _say(submission: "Submission", shipped: "Shipped") -> None:
    out = console()
    out.print(
        f"Run {submission.run} is job {submission.id} at {submission.address} "
        f"({shipped.files} files, {shipped.size / 1000:.0f} kB, commit {submission.commit[:12]}"
        f"{'-dirty' if submission.commit.endswith('-dirty') else ''})",
        markup=False,
    )
    for command, does in (
        (f"status {submission.run}", "shows how far it is"),
        (f"logs {submission.run} -f", "follows what it prints"),
        (f"report {submission.run}", "brings the report here"),
        (f"cancel {submission.run}", "stops it; submitting again goes on"),
    ):
        out.print(f"  layersweep {command:{24 + len(submission.run)}}{does}", markup=False)
