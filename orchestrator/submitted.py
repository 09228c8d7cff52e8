"""A sweep on somebody else's machine: handed over as a Ray Job, asked after by the run's name.

`runs/<name>/job.json` here says where it went. The run itself (journal, logs, report) lies on the
cluster, so whatever reads it is an errand: the same command, run on the head as a small job of its own.
"""

import json
import shlex
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.connection import ClusterUnreachable
from cluster.jobs import Job, Jobs, JobsError
from orchestrator.commit import VARIABLE as COMMIT_VARIABLE
from orchestrator.commit import commit
from orchestrator.parcel import Contents, Unreadable, unpack
from orchestrator.runs import RunHeld, runs_folder
from orchestrator.shipping import SWEEP, Shipped, pack, refuse_local_paths
from orchestrator.sweep import Sweep
from workers.errors import InvalidInput

RECORD = "job.json"
PACKAGE = "shipped.zip"
ERRAND_SECONDS = 600.0
ROLE = "layersweep"
"""Under this name a job's metadata says whether it is a `sweep` or an `errand`."""


@dataclass(frozen=True)
class Submission:
    """Where a run went."""

    run: str
    address: str
    """Of the cluster's dashboard."""
    id: str
    """Of the job."""
    root: str
    """Folder on the cluster that holds `runs/`."""
    store: str
    commit: str
    time: float
    """Of handing over, in Unix seconds."""

    @property
    def folder(self) -> Path:
        """The run's folder here."""
        return _folder(self.run).absolute()

    @property
    def overtaken(self) -> bool:
        """Whether a driver has since begun in the folder here: it is shared, or the run is local now."""
        try:
            began = (self.folder / "run.json").stat().st_mtime
        except OSError:
            return False
        return began > (self.folder / RECORD).stat().st_mtime

    @property
    def package(self) -> Path:
        """What was shipped."""
        return self.folder / PACKAGE


def find_submission(name: str) -> Submission | None:
    """The submission of the run called `name` (or of its folder); None if there was none."""
    for folder in (Path(name), runs_folder() / name):
        path = folder / RECORD
        if path.is_file():
            try:
                return Submission(**json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                raise InvalidInput("cannot be read", str(path), "submit the sweep again") from None
    return None


def hand_over(
    sweep: Sweep, base: Path, address: str, root: str, store: str | None
) -> tuple[Submission, Shipped]:
    """Give a sweep to a cluster.

    Args:
        sweep: the sweep.
        base: folder its relative paths start from.
        address: the cluster's dashboard, `http://head:8265`.
        root: folder on the cluster for runs and, unless `store` says otherwise, the store.
        store: store on the cluster; relative to `root`.

    Raises:
        InvalidInput: paths of this machine in the sweep, a bad root, or a run of this machine that
            has the name already.
        RunHeld: the run's job lives.
        ClusterUnreachable: no answer.
        JobsError: the cluster refused.
    """
    root = _checked_root(root)
    refuse_local_paths(sweep, base)
    folder = _folder(sweep.name)
    _refuse_local_run(sweep.name, root)
    jobs = Jobs(address)
    _refuse_living(jobs, sweep.name, root)
    folder.mkdir(parents=True, exist_ok=True)
    shipped = pack(sweep, folder / PACKAGE)
    submission = Submission(
        run=sweep.name,
        address=jobs.address,
        id=f"{sweep.name}-{uuid.uuid4().hex[:8]}",
        root=root,
        store=_store(root, store),
        commit=commit(),
        time=round(time.time(), 3),
    )
    _send(
        jobs,
        submission,
        submission.id,
        f"run {SWEEP} --address auto --store {_shell(submission.store)}",
        "orchestrator.cli",
        {ROLE: "sweep", "run": sweep.name, "root": root},
    )
    temporary = folder / f".{RECORD}.part"
    temporary.write_text(json.dumps(asdict(submission), indent=1), encoding="utf-8")
    temporary.replace(folder / RECORD)
    return submission, shipped


def errand(submission: Submission, jobs: Jobs, *words: str) -> tuple[int, str]:
    """Run one of our commands on the head, beside the run.

    Returns:
        Its exit status and what it printed.
    """
    job = _errand(submission, jobs, "orchestrator.cli", words)
    return _answer(jobs, job)


def errand_followed(
    submission: Submission,
    jobs: Jobs,
    write: Callable[[str], None],
    notice: Callable[[str], None],
    *words: str,
) -> int:
    """The same, with its output handed on as it comes; Ctrl-C ends it there too.

    Returns:
        Its exit status.
    """
    job = _errand(submission, jobs, "orchestrator.cli", words)
    try:
        ended = jobs.follow(job, write, notice)
    except KeyboardInterrupt:
        jobs.stop(job)
        raise
    jobs.forget(job)
    return ended.status


def fetch_report(submission: Submission, jobs: Jobs) -> Contents:
    """Have the report built on the head, and bring it here.

    Raises:
        InvalidInput: it cannot be built (yet), in the head's words.
        JobsError: what came over is damaged.
    """
    job = _errand(submission, jobs, "orchestrator.parcel", (submission.run,))
    status, text = _answer(jobs, job)
    if status:
        raise InvalidInput(complaint(text))
    try:
        return unpack(text, submission.folder / "report")
    except Unreadable as error:
        raise JobsError(f"the report did not come over whole ({error}): try again") from None


def stage_status(submission: Submission, jobs: Jobs) -> dict[str, Any] | str:
    """What `status` finds on the cluster, or why it finds nothing."""
    status, text = errand(submission, jobs, "status", submission.run, "--json")
    if status:
        return complaint(text)
    try:
        found: dict[str, Any] = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except ValueError:
        return complaint(text)
    return found


def complaint(text: str) -> str:
    """What a command that failed on the head said, without our name before each line."""
    lines = [line for line in text.splitlines() if line.strip()]
    ours = [line.removeprefix("layersweep: ") for line in lines if line.startswith("layersweep: ")]
    return "\n".join(ours or lines[-5:] or ["it printed nothing"])


# --- beneath ---------------------------------------------------------------------------------


def _errand(submission: Submission, jobs: Jobs, module: str, words: tuple[str, ...]) -> str:
    job = f"{submission.run}-errand-{uuid.uuid4().hex[:8]}"
    metadata = {ROLE: "errand", "run": submission.run, "root": submission.root}
    _send(jobs, submission, job, shlex.join(words), module, metadata)
    return job


def _answer(jobs: Jobs, job: str) -> tuple[int, str]:
    ended = jobs.wait(job, ERRAND_SECONDS)
    if not ended.over:
        jobs.stop(job)
        raise JobsError(
            f"the head of {jobs.address} did not answer within {ERRAND_SECONDS:.0f} s "
            f"(job {job} is {ended.state}): it may be overloaded, or down"
        )
    text = jobs.logs(job) if ended.exit_status is not None else ended.message
    jobs.forget(job)
    return ended.status, text


def _send(
    jobs: Jobs,
    submission: Submission,
    job: str,
    words: str,
    module: str,
    metadata: dict[str, str],
) -> None:
    if not submission.package.is_file():
        raise InvalidInput(f"{submission.package} is gone", remedy="submit the sweep again")
    runs = _shell(str(PurePosixPath(submission.root) / "runs"))
    # `exec`: the signal that stops a job then reaches the driver and nobody else.
    command = f"LAYERSWEEP_RUNS={runs} exec python -m {module} {words}"
    jobs.submit(job, command, submission.package, {COMMIT_VARIABLE: submission.commit}, metadata)


def _refuse_living(jobs: Jobs, run: str, root: str) -> None:
    """Two drivers on one run would fight, whoever sent the other.

    Nor is a record overwritten while its job lives, wherever that is.
    """
    earlier = find_submission(run)
    for job in jobs.living():
        told = (job.metadata.get(ROLE), job.metadata.get("run"), job.metadata.get("root"))
        if told == ("sweep", run, root) or (earlier and job.id == earlier.id):
            raise RunHeld(_held(run, jobs.address, job))
    if earlier is None or earlier.address == jobs.address:
        return
    try:
        job = Jobs(earlier.address).state(earlier.id)
    except (ClusterUnreachable, JobsError):
        return
    if not job.over:
        raise RunHeld(_held(run, earlier.address, job))


def _held(run: str, address: str, job: Job) -> str:
    return (
        f"another driver holds run {run}: job {job.id} at {address} is {job.state} "
        f"(`layersweep logs {run} -f` follows it, `layersweep cancel {run}` stops it)"
    )


def _refuse_local_run(run: str, root: str) -> None:
    folder = _folder(run)
    shared = (Path(root).expanduser() / "runs" / run).absolute() == folder.absolute()
    if (folder / "run.json").is_file() and not (folder / RECORD).is_file() and not shared:
        raise InvalidInput(
            f"{folder} is a run of this machine",
            "sweep.name",
            "give the submitted one a name of its own: --set name=NAME",
        )


def _folder(run: str) -> Path:
    return runs_folder() / run


def _checked_root(root: str) -> str:
    if not (root.startswith(("/", "~/")) or root == "~"):
        raise InvalidInput(
            f"{root} is no folder of the cluster",
            "--root",
            "give an absolute path, or one that starts with ~/ (the home of the head's user)",
        )
    return str(PurePosixPath(root))


def _store(root: str, store: str | None) -> str:
    if store is None:
        return str(PurePosixPath(root) / "store")
    if "://" in store or store.startswith(("/", "~/")):
        return store
    return str(PurePosixPath(root) / store)


def _shell(path: str) -> str:
    """A path as a word for the shell, its `~` left for the head's shell to fill in."""
    if path == "~" or path.startswith("~/"):
        return "~/" + shlex.quote(path[2:]) if path[2:] else "~"
    return shlex.quote(path)
