"""One try at one stage, on a worker: read inputs, run the stage's function, commit, give a verdict.

The verdict is plain data, never an exception: the driver alone decides what is worth a retry.
Everything printed goes to the attempt's own log file.
"""

import contextlib
import os
import platform
import shutil
import time
import traceback
from importlib.metadata import version
from typing import Any

from orchestrator.attempt_log import logged_to
from orchestrator.store import CorruptArtefact, Store, StoreUnreachable, open_store
from workers.errors import InvalidInput, Stopped
from workers.stages import STAGES, Context, Input

PACKAGES = ("torch", "transformers", "peft", "ray", "datasets", "jiwer", "sacrebleu", "pandas")

FENCE_SECONDS = 2.0
"""Between looks at whether to stop."""

# What a worker process keeps between attempts: the base model it holds, and inputs it has verified,
# as they were then.
_RESIDENT: dict[str, Any] = {}
_VERIFIED: dict[tuple[str, str], object] = {}


def run_attempt(
    payload: dict[str, Any], rank: int, ranks: int, meeting: tuple[str, int, int] | None
) -> dict[str, Any]:
    """Run one stage and commit its artefact.

    Args:
        payload: `id`, `kind`, `key`, `params`, `inputs` (role → [kind, key]), `sources` (role →
            path, revision, fingerprint), `store` (folder or URL), `log` (file or URL), `provenance`, `checkpoint_seconds` (None:
            none are kept), `relief` (of the OOM ladder), `relief_text`, `need_bytes` (of the GPU's
            memory; None: unknown), `gpus` (a fraction shares a card), and `fence`.
        rank: this process's rank in its lease.
        ranks: ranks of the lease.
        meeting: where ranks meet.

    Returns:
        `{"status": "done", "seconds", "summary"}`, `{"status": "stopped", "message"}`, or
        `{"status": "failed", "class", "message"}`: with `unreachable` where the store is away, and
        `damaged: [kind, key]` where an input was, and has been discarded.
    """
    started, cpu_started = time.perf_counter(), _cpu_seconds()
    log = payload["log"]
    if rank:
        log = f"{log.removesuffix('.log')}.rank{rank}.log"
    with logged_to(log):
        print(f"{_now()} {payload['id']} ({payload['kind']}/{payload['key']})", flush=True)
        if payload["relief_text"]:
            print(f"{_now()} with less memory: {payload['relief_text']}", flush=True)
        try:
            summary = _run(payload, rank, ranks, meeting, started, cpu_started)
        except Stopped as stopped:
            print(f"{_now()} {stopped}", flush=True)
            return {"status": "stopped", "message": str(stopped)}
        except BaseException as error:  # noqa: BLE001 - a verdict, whatever it was
            verdict = {**classify(error), **_fault_of_the_store(payload, error)}
            if verdict["class"] != "invalid" or not isinstance(error, InvalidInput):
                traceback.print_exc()
            print(f"{_now()} failed ({verdict['class']}): {verdict['message']}", flush=True)
            _RESIDENT.clear()
            return {"status": "failed", **verdict}
        seconds = time.perf_counter() - started
        print(f"{_now()} done in {seconds:.1f} s", flush=True)
    return {"status": "done", "seconds": round(seconds, 3), "summary": summary}


def classify(error: BaseException) -> dict[str, Any]:
    """The failure class and message of an exception, as a verdict has them.

    Classes are those of the design: `device-oom`, `host-oom`, `transient` (I/O and network) and
    `invalid` (everything that would fail again); and `fenced`, when another driver has the run, and
    `peer`, when another rank failed.
    """
    message = str(error) or type(error).__name__
    name = type(error).__name__
    if isinstance(error, InvalidInput):
        return {"class": "invalid", "message": message}
    if isinstance(error, CorruptArtefact):
        return {"class": "transient", "message": message, "damaged": [error.kind, error.key]}
    if isinstance(error, StoreUnreachable):
        return {"class": "transient", "message": message, "unreachable": True}
    if isinstance(error, Fenced):
        return {"class": "fenced", "message": message}
    if name == "PeerLost":
        return {"class": "peer", "message": f"another rank was lost: {message}"}
    if name == "OutOfMemoryError":
        return {"class": "device-oom", "message": message}
    if isinstance(error, MemoryError):
        return {"class": "host-oom", "message": message}
    if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError)):
        return {"class": "invalid", "message": f"{name}: {message}"}
    if isinstance(error, (OSError, TimeoutError)) or (
        name == "SafetensorError" and "os error" in message  # its file, not what is in it
    ):
        return {"class": "transient", "message": f"{name}: {message}"}
    return {"class": "invalid", "message": f"{name}: {message}"}


def _fault_of_the_store(payload: dict[str, Any], error: BaseException) -> dict[str, Any]:
    """What to say differently of a failure, since the store went away or an input was damaged.

    The function of a stage sees no more than a file that is missing, or weights that make no sense.
    """
    if not isinstance(error, Exception) or classify(error)["class"] not in ("invalid", "transient"):
        return {}
    try:
        store = open_store(payload["store"], new=False)
        for kind, key in payload["inputs"].values():
            _verify(store, kind, key)
    except (CorruptArtefact, StoreUnreachable) as found:
        return classify(found)
    except OSError:
        return {}
    if isinstance(error, FileNotFoundError) and store.location in str(error):
        return {"class": "transient"}  # the store was away, and is back
    return {}


class Fenced(Exception):
    """Another driver has taken the run: nothing is committed for the old one."""


class _Fence:
    """What a worker sees of the driver it works for, by the driver's note in the store."""

    def __init__(self, store: Store, ticket: dict[str, Any]) -> None:
        self._store, self._name, self._number = store, ticket["name"], ticket["number"]
        self._looked = time.monotonic()
        self._stop = False

    def asked_to_stop(self) -> bool:
        """Whether to keep a checkpoint and leave; looks at most every two seconds."""
        now = time.monotonic()
        if not self._stop and now - self._looked >= FENCE_SECONDS:
            self._looked = now
            with contextlib.suppress(OSError):
                note = self._store.read_note(self._name) or {}
                self._stop = bool(note.get("stop")) or note.get("number") != self._number
        return self._stop

    def check(self) -> None:
        """Refuse to go on for a driver that another has replaced."""
        note = self._store.read_note(self._name) or {}
        if note.get("number") != self._number:
            raise Fenced("another driver has taken this run over; nothing was committed")


def _run(
    payload: dict[str, Any],
    rank: int,
    ranks: int,
    meeting: tuple[str, int, int] | None,
    started: float,
    cpu_started: float,
) -> dict[str, Any]:
    store = open_store(payload["store"], new=False)
    kind, key = payload["kind"], payload["key"]
    fence = _Fence(store, payload["fence"])
    fence.check()
    inputs = {}
    for role, (input_kind, input_key) in payload["inputs"].items():
        as_it_is = store.traits(input_kind, input_key)
        if as_it_is is None or _VERIFIED.get((input_kind, input_key)) != as_it_is:
            _verify(store, input_kind, input_key)
            _VERIFIED[input_kind, input_key] = as_it_is
        inputs[role] = Input(str(store.path(input_kind, input_key)))
    for role, source in payload["sources"].items():
        inputs[role] = Input(source["path"], source["revision"])
    import torch

    from workers.checkpoints import Checkpoints
    from workers.ranks import join
    from workers.relief import Relief

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        _share_card(payload["gpus"], payload["need_bytes"])
    seconds = payload["checkpoint_seconds"]
    checkpoints = None
    if seconds is not None:
        folder, mirror = store.checkpoint_folder(kind, key), store.checkpoint_mirror(kind, key)
        checkpoints = Checkpoints(folder, seconds, mirror, fence.asked_to_stop)
    context = Context(
        progress=_Progress(),
        device=device,
        resident=_RESIDENT,
        checkpoints=checkpoints,
        ranks=join(rank, ranks, meeting, device),
        relief=Relief(**payload["relief"]),
    )
    temporary = store.begin(kind, key)
    try:
        summary = STAGES[kind].function()(payload["params"], inputs, temporary, context)
        if rank == 0:
            provenance = {
                **payload["provenance"],
                "finished": _now(),
                "seconds": round(time.perf_counter() - started, 3),
                "cpu_seconds": round(_cpu_seconds() - cpu_started, 3),
                "device": _device(context.device),
                "ranks": ranks,
                "relief": payload["relief_text"],
                "python": platform.python_version(),
                "packages": {name: version(name) for name in PACKAGES},
            }
            stage = {
                "kind": kind,
                "key": key,
                "version": STAGES[kind].version,
                "params": payload["params"],
                "inputs": payload["inputs"],
                "sources": {r: s["fingerprint"] for r, s in payload["sources"].items()},
                "summary": summary,
                "provenance": provenance,
            }
            fence.check()
            store.commit(temporary, kind, key, stage)
            _VERIFIED[kind, key] = store.traits(kind, key)
            if checkpoints is not None:
                checkpoints.clear()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def _verify(store: Store, kind: str, key: str) -> None:
    try:
        store.verify(kind, key)
    except CorruptArtefact:
        store.discard(kind, key)
        raise


def _share_card(gpus: float, need: int | None) -> None:
    """Take no more of a shared card than is ours, and see that it is free.

    Raises:
        OSError: other processes hold what the stage needs (worth another try).
    """
    import torch

    free, total = torch.cuda.mem_get_info()
    ours = torch.cuda.memory_reserved()
    if 0 < gpus < 1:
        torch.cuda.set_per_process_memory_fraction(gpus)
    refuse_occupied(free + ours, total, need)


def refuse_occupied(free: int, total: int, need: int | None) -> None:
    """Refuse to start on a card on which others hold the memory that a stage needs.

    Args:
        free: bytes that this process could still have.
        total: bytes of the card.
        need: bytes the stage is expected to take; None: unknown. A stage that needs more than the
            card has is not refused: it is the OOM ladder's.

    Raises:
        OSError: too little is free.
    """
    if need is not None and need <= total and free < need:
        raise OSError(
            f"only {free / 2**30:.1f} of the GPU's {total / 2**30:.1f} GiB are free, and this needs "
            f"about {need / 2**30:.1f}: another process holds the rest"
        )


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
