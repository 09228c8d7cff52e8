"""One try at one stage, on a worker: read inputs, run the stage's function, commit, give a verdict.

The verdict is plain data, never an exception: the driver alone decides what is worth a retry.
Everything printed goes to the attempt's own log file.
"""

import os
import platform
import shutil
import time
import traceback
from importlib.metadata import version
from typing import Any

from orchestrator.attempt_log import logged_to
from orchestrator.store import CorruptArtefact, Store, open_store
from workers.errors import InvalidInput
from workers.stages import STAGES, Context, Input

PACKAGES = ("torch", "transformers", "peft", "ray", "datasets", "jiwer", "sacrebleu", "pandas")

# What a worker process keeps between attempts: the base model it holds, inputs already verified.
_RESIDENT: dict[str, Any] = {}
_VERIFIED: set[tuple[str, str]] = set()


def run_attempt(payload: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """Run one stage and commit its artefact.

    Args:
        payload: `id`, `kind`, `key`, `params`, `inputs` (role → [kind, key]), `sources` (role →
            path, revision, fingerprint), `store` (folder or URL), `log` (file or URL), `provenance`, and `checkpoint_seconds` (None: none
            are kept).
        rank: this process's rank in its lease.
        ranks: ranks of the lease.

    Returns:
        `{"status": "done", "seconds", "summary"}`, or `{"status": "failed", "class", "message"}`.
    """
    del ranks
    started, cpu_started = time.perf_counter(), _cpu_seconds()
    with logged_to(payload["log"]):
        print(f"{_now()} {payload['id']} ({payload['kind']}/{payload['key']})", flush=True)
        try:
            summary = _run(payload, rank, started, cpu_started)
        except BaseException as error:  # noqa: BLE001 - a verdict, whatever it was
            verdict = classify(error)
            if verdict["class"] != "invalid" or not isinstance(error, InvalidInput):
                traceback.print_exc()
            print(f"{_now()} failed ({verdict['class']}): {verdict['message']}", flush=True)
            _RESIDENT.clear()
            return {"status": "failed", **verdict}
        seconds = time.perf_counter() - started
        print(f"{_now()} done in {seconds:.1f} s", flush=True)
    return {"status": "done", "seconds": round(seconds, 3), "summary": summary}


def classify(error: BaseException) -> dict[str, str]:
    """The failure class and message of an exception.

    Classes are those of the design: `device-oom`, `host-oom`, `transient` (I/O and network) and
    `invalid` (everything that would fail again).
    """
    message = str(error) or type(error).__name__
    name = type(error).__name__
    if isinstance(error, InvalidInput):
        return {"class": "invalid", "message": message}
    if name == "OutOfMemoryError":
        return {"class": "device-oom", "message": message}
    if isinstance(error, MemoryError):
        return {"class": "host-oom", "message": message}
    if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError)):
        return {"class": "invalid", "message": f"{name}: {message}"}
    if isinstance(error, (OSError, TimeoutError)):
        return {"class": "transient", "message": f"{name}: {message}"}
    return {"class": "invalid", "message": f"{name}: {message}"}


def _run(payload: dict[str, Any], rank: int, started: float, cpu_started: float) -> dict[str, Any]:
    store = open_store(payload["store"])
    kind, key = payload["kind"], payload["key"]
    inputs = {}
    for role, (input_kind, input_key) in payload["inputs"].items():
        if (input_kind, input_key) not in _VERIFIED:
            _verify(store, input_kind, input_key)
            _VERIFIED.add((input_kind, input_key))
        inputs[role] = Input(str(store.path(input_kind, input_key)))
    for role, source in payload["sources"].items():
        inputs[role] = Input(source["path"], source["revision"])
    import torch

    from workers.checkpoints import Checkpoints

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    seconds = payload["checkpoint_seconds"]
    checkpoints = None
    if seconds is not None:
        folder, mirror = store.checkpoint_folder(kind, key), store.checkpoint_mirror(kind, key)
        checkpoints = Checkpoints(folder, seconds, mirror)
    context = Context(
        progress=_Progress(),
        device="cuda" if torch.cuda.is_available() else "cpu",
        resident=_RESIDENT,
        checkpoints=checkpoints,
    )
    temporary = store.begin(kind, key)
    try:
        summary = STAGES[kind].function()(payload["params"], inputs, temporary, context)
        if rank == 0:
            store.commit(
                temporary,
                kind,
                key,
                {
                    "kind": kind,
                    "key": key,
                    "version": STAGES[kind].version,
                    "params": payload["params"],
                    "inputs": payload["inputs"],
                    "sources": {r: s["fingerprint"] for r, s in payload["sources"].items()},
                    "summary": summary,
                    "provenance": {
                        **payload["provenance"],
                        "finished": _now(),
                        "seconds": round(time.perf_counter() - started, 3),
                        "cpu_seconds": round(_cpu_seconds() - cpu_started, 3),
                        "device": _device(context.device),
                        "python": platform.python_version(),
                        "packages": {name: version(name) for name in PACKAGES},
                    },
                },
            )
            _VERIFIED.add((kind, key))
            if checkpoints is not None:
                checkpoints.clear()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def _verify(store: Store, kind: str, key: str) -> None:
    try:
        store.verify(kind, key)
    except CorruptArtefact as error:
        store.discard(kind, key)
        raise InvalidInput(
            f"{error}; it has been discarded",
            remedy="run the sweep again: it makes what is missing",
        ) from None


class _Progress:
    """Writes progress to the attempt's log, at most once a second."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, fraction: float, message: str) -> None:
        now = time.monotonic()
        if now - self._last >= 1.0 or fraction >= 1.0:
            self._last = now
            print(f"{_now()} {fraction:4.0%} {message}", flush=True)


def _cpu_seconds() -> float:
    """CPU time of this process and the children it waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _device(device: str) -> str:
    if device == "cpu":
        return f"cpu ({platform.machine()})"
    import torch

    return str(torch.cuda.get_device_name())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
