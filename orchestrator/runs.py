"""A run folder: the resolved sweep, the plan, the journal of attempts, their logs, and the lock."""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orchestrator.graph import Plan
from orchestrator.planfile import planned_stages, write_plan
from orchestrator.store import Store
from orchestrator.sweep import Sweep, parse_sweep
from workers.errors import InvalidInput

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 30.0


def runs_folder() -> Path:
    """Where run folders lie: `runs` where one stands, or what `LAYERSWEEP_RUNS` names."""
    return Path(os.environ.get("LAYERSWEEP_RUNS") or "runs").expanduser()


class RunHeld(Exception):
    """Another driver holds the run."""


class RunTaken(Exception):
    """Another driver has taken this run over."""


@dataclass
class StageRecord:
    """What the journal says of one stage."""

    id: str
    kind: str
    state: str = "pending"
    """`pending`, `running`, `done`, `failed`, `blocked` or `stopped`."""
    key: str | None = None
    reused: bool = False
    attempts: int = 0
    seconds: float = 0.0
    started: float = 0.0
    """When its newest attempt began: seconds since the epoch."""
    failure: str = ""
    """Class of its last failure; of a stage that runs again, of the attempt before."""
    message: str = ""
    relief: str = ""
    """What its newest attempt did differently to need less memory."""
    log: str = ""
    dependencies: list[str] = field(default_factory=list)
    cell: dict[str, Any] = field(default_factory=dict)
    """Labels of the tables."""


@dataclass(frozen=True)
class History:
    """What the journal tells a driver of those before it."""

    gpu_seconds: float
    """That stages of this run have used."""
    done: Mapping[str, str | None]
    """Keys of the stages that were done last time they were heard of, by id."""


class RunFolder:
    """One run's folder.

    Args:
        path: `runs/<sweep>`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lines: list[str] = []
        self._gathering = False

    @classmethod
    def existing(cls, name: str) -> "RunFolder":
        """The run called `name`: a folder, or a name under `runs/`.

        Raises:
            InvalidInput: there is none; names those that exist.
        """
        for path in (Path(name), runs_folder() / name):
            if (path / "run.json").is_file():
                return cls(path)
        found = (runs_folder().glob(f"*/{kind}.json") for kind in ("run", "job"))
        known = sorted({path.parent.name for paths in found for path in paths})
        hint = f"runs here: {', '.join(known)}" if known else "no run was started in this folder"
        raise InvalidInput(f"no run called {name}", remedy=hint)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.path / "report"

    def log(self, node_id: str, attempt: int) -> Path:
        """Log file of one attempt."""
        return self.path / "logs" / f"{node_id.replace('/', '.')}.{attempt}.log"

    # --- what is fixed when a run starts -----------------------------------------------------

    def start(self, sweep: Sweep, base: Path, store: str, plan: Plan) -> None:
        """Write the resolved sweep, where it runs, and the plan."""
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        _replace(self.path / "sweep.yaml", text)
        _replace(self.path / "plan.json", write_plan(plan))
        place = {"id": self.identity(), "base": str(base.absolute()), "store": store}
        _replace(self.path / "run.json", json.dumps(place, indent=1))

    def identity(self) -> str:
        """What tells this run from others of its name elsewhere; made at its first start."""
        try:
            known = json.loads((self.path / "run.json").read_text()).get("id")
        except (OSError, ValueError):
            known = None
        return str(known or uuid.uuid4().hex)

    def sweep(self) -> Sweep:
        """The resolved sweep."""
        return parse_sweep(yaml.safe_load((self.path / "sweep.yaml").read_text()))

    def place(self) -> tuple[Path, str]:
        """The folder relative paths start from, and the store (folder or URL)."""
        place = json.loads((self.path / "run.json").read_text())
        return Path(place["base"]), str(place["store"])

    # --- journal -----------------------------------------------------------------------------

    def note(self, event: str, **fields: Any) -> None:
        """Append an event to the journal, a line of JSON.

        Where the folder cannot be written for a while, lines are kept and written with a later one.
        """
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
        self._lines.append(line + "\n")
        if self._gathering:
            return
        try:
            with (self.path / "journal.jsonl").open("a", encoding="utf-8") as file:
                file.write("".join(self._lines))
        except OSError:
            # A part may have been written: its last line must not run into the next one.
            if self._lines[0] != "\n":
                self._lines.insert(0, "\n")
            return
        self._lines.clear()

    @contextlib.contextmanager
    def noting_many(self) -> Iterator[None]:
        """Write the events of the block together at the next one."""
        self._gathering = True
        try:
            yield
        finally:
            self._gathering = False

    def events(self) -> Iterator[dict[str, Any]]:
        """The journal's events; a line cut short by a crash is passed over."""
        try:
            file = (self.path / "journal.jsonl").open(encoding="utf-8")
        except OSError:
            return
        with file:
            while lines := list(itertools.islice(file, 1000)):
                yield from _parsed(lines)

    def records(self) -> dict[str, StageRecord]:
        """The state of every stage of the newest plan, as the journal tells it."""
        data = json.loads((self.path / "plan.json").read_text(encoding="utf-8"))
        records = {
            node_id: StageRecord(node_id, kind, dependencies=needs, cell=cell)
            for node_id, kind, needs, cell in planned_stages(data)
        }
        for event in self.events():
            if event["event"] == "begin":
                for record in records.values():
                    if record.state != "done":
                        record.state, record.failure, record.message = "pending", "", ""
            record_or_none = records.get(event.get("id", ""))
            if record_or_none is not None:
                _apply(record_or_none, event)
        if not self.held():
            for record in records.values():
                if record.state == "running":
                    record.state = "pending"
        for node in data["nodes"]:
            record = records[node["id"]]
            if record.state == "done" and record.key and node.get("key") not in (None, record.key):
                record.state = "pending"  # an earlier plan's stage of that name was done
        return records

    def seconds(self) -> float:
        """Wall-clock seconds drivers spent on this run."""
        total, began, last = 0.0, None, 0.0
        for event in self.events():
            if event["event"] == "begin":
                if began is not None:
                    total += last - began
                began = event["time"]
            last = event["time"]
        return total + (last - began if began is not None else 0.0)

    def history(self) -> "History":
        """What earlier drivers left in the journal."""
        used, done = 0.0, {}
        for event in self.events():
            used += event.get("gpu_seconds", 0.0)
            if event["event"] == "done":
                done[event["id"]] = event.get("key")
            elif event["event"] in ("start", "failed", "blocked"):
                done.pop(event["id"], None)
        return History(used, done)

    # --- lock --------------------------------------------------------------------------------

    def held(self) -> bool:
        """Whether a living driver holds the run."""
        return self.holder() is not None

    def holder(self) -> dict[str, Any] | None:
        """The living driver that holds the run: its `pid` and `host`."""
        return _alive(self.path / "lock.json")

    @contextlib.contextmanager
    def lock(self, takeover: bool = False) -> Iterator["Hold"]:
        """Hold the run while the block lasts; a heartbeat shows that we live.

        Args:
            takeover: take it from a driver that seems to live; that one stops at its next heartbeat,
                and nothing it still does is committed.

        Raises:
            RunHeld: another driver does; names its machine and process.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / "lock.json"
        holder = _alive(path)
        if holder is not None and not takeover:
            raise RunHeld(
                f"another driver holds run {self.name} "
                f"(process {holder['pid']} on {holder['host']}); if it is gone for good, "
                "run with --takeover"
            )
        if path.exists():  # Its driver is gone. Renaming is atomic: one of several takers wins.
            with contextlib.suppress(FileNotFoundError):
                stale = path.with_name(f"lock.{uuid.uuid4().hex}.stale")
                path.rename(stale)
                stale.unlink()
        hold = Hold(path)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            raise RunHeld(f"another driver has just taken run {self.name}") from None
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "token": hold.token}
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(holder, file)
        except OSError:
            path.unlink()  # a disk without room: nobody would know who holds it
            raise
        with hold.beating():
            yield hold


class Hold:
    """The lock of a run, held by this process."""

    def __init__(self, path: Path) -> None:
        self._path, self.token = path, uuid.uuid4().hex
        self.taken = False
        """Whether another driver has taken it from us."""

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Show that we live until the block ends, then let go."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                self.look()
                with contextlib.suppress(OSError):
                    if not self.taken:
                        os.utime(self._path)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            if self._ours():
                with contextlib.suppress(OSError):
                    self._path.unlink()

    def look(self) -> None:
        """See whether the lock is still ours; a folder that cannot be read tells nothing."""
        ours = self._ours()
        if ours is not None:
            self.taken = not ours

    def _ours(self) -> bool | None:
        try:
            return bool(json.loads(self._path.read_text()).get("token") == self.token)
        except (OSError, ValueError):
            return None


class Fence:
    """The number of a driver among those that held a run, kept in the store for workers to see.

    A worker commits only while the number it was given is the newest, so that a driver which was
    taken for dead changes nothing any more. The same note asks workers to stop.

    Args:
        store: of the run.
        run: the run's identity.
        hold: the lock.
    """

    def __init__(self, store: Store, run: str, hold: Hold) -> None:
        self._store, self._hold = store, hold
        self.name = f"driver-{run}"
        self.number = int((store.read_note(self.name) or {}).get("number", 0)) + 1
        store.write_note(self.name, {"number": self.number, "stop": False})

    def ticket(self) -> dict[str, Any]:
        """What a worker needs to see whether the fence still stands."""
        return {"name": self.name, "number": self.number}

    def ask_to_stop(self) -> None:
        """Have workers keep a checkpoint and leave."""
        self._store.write_note(self.name, {"number": self.number, "stop": True})

    def check(self) -> None:
        """See that no other driver has taken the run.

        Raises:
            RunTaken: one has.
        """
        if self._hold.taken:
            raise RunTaken("another driver has taken this run over; this one stops")


def _parsed(lines: list[str]) -> list[dict[str, Any]]:
    """The events of lines of JSON: all in one go where they are whole, which takes half the time."""
    found: list[dict[str, Any]] = []
    try:
        found = json.loads(f"[{','.join(lines)}]")
    except ValueError:
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def _apply(record: StageRecord, event: dict[str, Any]) -> None:
    match event["event"]:
        case "start":
            record.state, record.attempts = "running", event["attempt"]
            record.started, record.relief = event["time"], event.get("relief", "")
            record.key, record.log = event.get("key"), event.get("log", "")
        case "done":
            record.state, record.reused = "done", event.get("reused", False)
            record.key, record.seconds = event.get("key"), event.get("seconds", 0.0)
            record.failure = record.message = ""
        case "failed":
            record.state = "failed"
            record.failure, record.message = event["class"], event["message"]
        case "retry":
            record.state = "pending"
            record.failure, record.message = event["class"], event["message"]
        case "blocked":
            record.state, record.message = "blocked", event["message"]
        case "stopped":
            record.state, record.message = "stopped", event.get("message", "")


def _alive(lock: Path) -> dict[str, Any] | None:
    """The holder written in a lock file, if it still lives."""
    try:
        holder: dict[str, Any] = json.loads(lock.read_text())
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        holder, age = {"pid": 0, "host": "?"}, 0.0
        with contextlib.suppress(OSError):
            age = time.time() - lock.stat().st_mtime
    if age > STALE_SECONDS:
        return None
    if holder["host"] == socket.gethostname() and not _running(int(holder["pid"])):
        return None
    return holder


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
