"""Ray Jobs: a command handed to a cluster's head over HTTP, watched and stopped from anywhere.

The one thing to keep apart here: no answer from the cluster says nothing about the job. Only the
cluster itself can tell that a job failed.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.connection import BadAddress, ClusterUnreachable

REQUEST_SECONDS = 60.0
"""Ray's client sets no limit of its own: a connection that died in silence would hang for ever."""
QUIET_SECONDS = 60.0
"""A log stream that says nothing for so long is opened anew: routers forget idle connections."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
PATIENCE_SECONDS = 3600.0
POLL_SECONDS = 0.5
STOP_SECONDS = 120
"""Between asking a job to end and killing it (Ray's own default is 3 seconds)."""

State = Literal["pending", "running", "done", "failed", "stopped"]
_STATES: dict[str, State] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "done",
    "FAILED": "failed",
    "STOPPED": "stopped",
}
_RAYS_OWN_LINES = re.compile(
    r"^(?:Running entrypoint for job |\d{4}-\d\d-\d\d [\d:,]+\t\w+ job_manager\.py:).*\n?", re.M
)


class JobsError(Exception):
    """The cluster answered, and what it said is not what was asked for."""


class AccessRefused(JobsError):
    """The cluster wants a token, or another one."""


class NoSuchJob(JobsError):
    """The cluster does not know the job: another cluster, or one that was started anew."""


@dataclass(frozen=True)
class Job:
    """What the cluster says of a job."""

    id: str
    state: State
    exit_status: int | None
    """Of the command itself; None while it runs, and when it was stopped or never began."""
    message: str
    """What Ray has to say about it."""
    began: float | None
    """Unix time in seconds."""
    metadata: dict[str, str]

    @property
    def over(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.state in ("done", "failed", "stopped")

    @property
    def status(self) -> int:
        """Exit status to hand on: the command's own, 130 when it was stopped, else 1."""
        if self.state == "stopped":
            return 130
        return (0 if self.state == "done" else 1) if self.exit_status is None else self.exit_status


class Jobs:
    """The jobs of one cluster.

    A token comes from where Ray looks for it (`RAY_AUTH_MODE`, `RAY_AUTH_TOKEN`,
    `RAY_AUTH_TOKEN_PATH`), further headers from `RAY_JOB_HEADERS` (a JSON object), and the
    authority behind an `https` address from `REQUESTS_CA_BUNDLE`.

    Args:
        address: `http://head:8265`, where the head's dashboard listens.

    Raises:
        BadAddress: not such an address, or headers that are no JSON object.
        ClusterUnreachable: nothing answers there.
        AccessRefused: it wants a token.
        JobsError: what answers is not Ray's Jobs API.
    """

    def __init__(self, address: str) -> None:
        self.address = checked_address(address)
        headers = _headers()
        try:
            import aiohttp  # noqa: F401
            import requests  # noqa: F401
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise JobsError(
                f"Ray Jobs cannot be used here ({error}): install the extra layersweep[cluster]"
            ) from None
        for part in ("dashboard_sdk", "job.sdk"):  # they set themselves to INFO when imported
            logging.getLogger(f"ray.dashboard.modules.{part}").setLevel(logging.WARNING)
        with self._plainly():

            class Client(JobSubmissionClient):
                def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                    return super()._do_request(method, endpoint, timeout=REQUEST_SECONDS, **options)

            with _address_wins(self.address):
                self._client = Client(
                    self.address,
                    headers=headers,
                    verify=os.environ.get("REQUESTS_CA_BUNDLE") or True,
                )

    def submit(
        self,
        job: str,
        command: str,
        package: Path,
        environment: dict[str, str],
        metadata: dict[str, str],
    ) -> None:
        """Start a command on the head, in a folder with the content of a package.

        Args:
            job: the new job's id.
            command: a line for the shell.
            package: a zip archive; sent only if the cluster does not have it.
            environment: variables of the command and of every worker it starts.
            metadata: plain text to find it by.

        Raises:
            ClusterUnreachable: no answer, and no sign that the job arrived all the same.
            JobsError: the cluster refused it.
        """
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **environment}
        try:
            with self._plainly():
                self._client.submit_job(
                    submission_id=job,
                    entrypoint=command,
                    runtime_env={"working_dir": str(package), "env_vars": environment},
                    metadata=metadata,
                )
        except ClusterUnreachable:
            if not self._arrived(job):
                raise

    def state(self, job: str) -> Job:
        """What the cluster says of a job.

        Raises:
            ClusterUnreachable: no answer.
            NoSuchJob: it does not know it.
        """
        with self._plainly():
            return _job(self._client.get_job_info(job))

    def living(self) -> list[Job]:
        """Submitted jobs that have not ended."""
        with self._plainly():
            found = [_job(d) for d in self._client.list_jobs() if d.submission_id]
        return [job for job in found if not job.over]

    def logs(self, job: str) -> str:
        """All that the job printed so far."""
        return _own(self._raw_logs(job))

    def follow(self, job: str, write: Callable[[str], None], notice: Callable[[str], None]) -> Job:
        """Hand on what a job prints as it comes, until it ends; each character once.

        A lost connection is waited out, for an hour at most.

        Args:
            job: its id.
            write: called with text.
            notice: called with a line when the connection is lost, and when it is back.

        Returns:
            How it ended.

        Raises:
            ClusterUnreachable: no answer for an hour.
            NoSuchJob: the cluster does not know it.
        """
        rest = _Rest(write)
        pause, lost_at = FIRST_PAUSE, None
        while True:
            try:
                state = self.state(job)
                if lost_at is not None:
                    notice(f"connected to {self.address} again")
                    pause, lost_at = FIRST_PAUSE, None
                rest.whole(self._raw_logs(job))  # all there is to see where streams are forbidden
                if state.over:
                    return state
                if not self._stream(job, rest):
                    time.sleep(FIRST_PAUSE)
            except ClusterUnreachable as error:
                now = time.monotonic()
                lost_at = now if lost_at is None else lost_at
                if now - lost_at > PATIENCE_SECONDS:
                    raise
                notice(f"lost the connection: {error}; trying again in {pause:.0f} s …")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def wait(self, job: str, seconds: float) -> Job:
        """The job's state once it has ended, or after so many seconds."""
        until = time.monotonic() + seconds
        while True:
            state = self.state(job)
            if state.over or time.monotonic() > until:
                return state
            time.sleep(POLL_SECONDS)

    def stop(self, job: str) -> None:
        """Ask a job to end: SIGTERM, and SIGKILL if it lives `STOP_SECONDS` later."""
        with self._plainly():
            self._client.stop_job(job)

    def forget(self, job: str) -> None:
        """Take an ended job out of the cluster's list; no harm if that fails."""
        with contextlib.suppress(ClusterUnreachable, JobsError), self._plainly():
            self._client.delete_job(job)

    def version(self) -> str:
        """Ray's version on the cluster."""
        with self._plainly():
            answer = self._client._do_request("GET", "/api/version").json()
            return str(answer["ray_version"])

    # --- beneath -----------------------------------------------------------------------------

    def _arrived(self, job: str) -> bool:
        """Whether a job whose acceptance we did not hear of is there."""
        for _ in range(3):
            time.sleep(FIRST_PAUSE)
            try:
                return bool(self.state(job))
            except NoSuchJob:
                return False
            except ClusterUnreachable:
                continue
        return False

    def _raw_logs(self, job: str) -> str:
        with self._plainly():
            return str(self._client.get_job_logs(job))

    def _stream(self, job: str, rest: "_Rest") -> bool:
        """Take in the log stream until it ends or falls silent; False if it could not be had."""
        import aiohttp

        async def pump() -> None:
            rest.begin()
            async with contextlib.aclosing(self._client.tail_job_logs(job)) as tail:
                while True:
                    try:
                        rest.take(await asyncio.wait_for(anext(tail), QUIET_SECONDS))
                    except (StopAsyncIteration, TimeoutError):
                        return

        try:
            asyncio.run(pump())
        except (aiohttp.ClientError, OSError, RuntimeError):
            return False  # `state` tells a lost connection from a stream that a proxy forbids
        return True

    @contextlib.contextmanager
    def _plainly(self) -> Iterator[None]:
        """Ray's and the transport's errors as ours."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise AccessRefused(
                f"{self.address} refuses access: {_first_line(error).partition('. ')[0]} "
                "(set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the "
                "cluster's token; a proxy before it may want RAY_JOB_HEADERS)"
            ) from None
        except requests.exceptions.JSONDecodeError:
            raise JobsError(_not_ray(self.address)) from None
        except requests.exceptions.HTTPError as error:
            answer = error.response
            self._raise(0 if answer is None else answer.status_code, str(error))
        except (requests.exceptions.RequestException, ConnectionError, TimeoutError) as error:
            raise ClusterUnreachable(f"no answer from {self.address}: {_cause(error)}") from None
        except RuntimeError as error:
            found = re.search(r"status code (\d{3}): ?(.*)", str(error), re.S)
            if found is None:
                raise JobsError(f"{self.address}: {_first_line(error)}") from None
            self._raise(int(found[1]), found[2])
        except KeyError:
            raise JobsError(_not_ray(self.address)) from None

    def _raise(self, status: int, text: str) -> None:
        if status == 404:
            raise NoSuchJob(f"{self.address}: {text.strip()}") from None
        if status in (502, 503, 504):  # what proxies say when the head is away
            raise ClusterUnreachable(f"no answer from {self.address}: status {status}") from None
        last = (text.strip().splitlines() or [""])[-1]
        raise JobsError(f"{self.address} refused: {last} (status {status})") from None


class _Rest:
    """A log that is sent from its beginning each time, handed on from where we were."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._seen, self._at = write, 0, 0

    def begin(self) -> None:
        self._at = 0

    def take(self, text: str) -> None:
        fresh = text[max(0, self._seen - self._at) :]
        self._at += len(text)
        self._seen = max(self._seen, self._at)
        if own := _own(fresh):
            self._write(own)

    def whole(self, text: str) -> None:
        self.begin()
        self.take(text)


def checked_address(address: str) -> str:
    """The address without a slash at its end.

    Raises:
        BadAddress: not of the form `http://head:8265`, or with a password in it.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadAddress(
            f"--address {address}: jobs go to the head's dashboard, such as http://head:8265"
        )
    if parts.username or parts.password:
        raise BadAddress(
            "--address: no passwords in an address, as it is kept in the run folder; "
            "RAY_JOB_HEADERS can carry them"
        )
    return address.rstrip("/")


def _headers() -> dict[str, str]:
    text = os.environ.get("RAY_JOB_HEADERS")
    if not text:
        return {}
    try:
        headers = json.loads(text)
        if not isinstance(headers, dict):
            raise ValueError
    except ValueError:
        raise BadAddress('RAY_JOB_HEADERS is no JSON object such as {"Name": "value"}') from None
    return {str(name): str(value) for name, value in headers.items()}


@contextlib.contextmanager
def _address_wins(address: str) -> Iterator[None]:
    """Ray's client lets its variables override the address that was given to it."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        state=_STATES[details.status.value],
        exit_status=details.driver_exit_code,
        message=details.message or "",
        began=details.start_time / 1000 if details.start_time else None,
        metadata=details.metadata or {},
    )


def _own(text: str) -> str:
    """A job's log without the lines that Ray adds about itself."""
    return _RAYS_OWN_LINES.sub("", text)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _cause(error: BaseException) -> str:
    """The innermost reason of a chain of transport errors: the one that a person can read."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = str(error)
    if isinstance(error, ssl.SSLError):
        text += " (REQUESTS_CA_BUNDLE may name a file of trusted certificates)"
    return text if text and text.isprintable() else type(error).__name__


def _not_ray(address: str) -> str:
    return f"what answers at {address} is not Ray's dashboard; its port is mostly 8265"
