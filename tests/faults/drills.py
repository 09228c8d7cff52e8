"""A drill: a small sweep in a folder of its own, a driver at work on it, and what must hold at the end."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from orchestrator.runs import RunFolder

FAULTS = Path(__file__).parent
ROOT = FAULTS.parents[1]
PATIENCE = 400.0
"""Seconds that anything may take on a busy machine."""
TABLES = ("results", "maps")
BASE = "llama-tiny+whisper-tiny"
ADAPT = f"adapt/{BASE}/all"
MAP = f"map/{BASE}/asr-en/speech"


def heal(depth):
    chosen = f"consensus/d{depth}" if depth else "d0"
    return f"heal/{BASE}/all/{chosen}/joint/s0"


def evaluate(depth):
    chosen = f"consensus/d{depth}" if depth else "d0"
    return f"evaluate/{BASE}/asr-en/test/{chosen}/joint/s0"


def cut_down():
    """configs/smoke.yaml with one encoder, one condition, one mode and few steps."""
    sweep = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text())
    splits = {name: f"lab:speech-tiny/{name}" for name in ("train", "dev")}
    test = [{"name": "test", "data": "lab:speech-tiny/test"}]
    sweep |= {
        "name": "drill",
        "encoders": sweep["encoders"][:1],
        "tasks": [{"task": "asr", "language": "en", **splits, "test": test}],
        "maps": {"samples": 4},
    }
    sweep["heal"] |= {"modes": ["joint"], "steps": 8}
    return sweep


@dataclass
class Drill:
    """A folder with a sweep, its store and its run."""

    folder: Path
    temporary: Path
    """Of Ray's, for clusters that drivers of this drill start."""
    address: str | None = None
    """Of the cluster it runs on; None: drivers start their own."""
    drivers: list[subprocess.Popen] = field(default_factory=list)

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "drill.yaml").write_text(yaml.safe_dump(cut_down()))
        self.plan_faults({})

    @property
    def run(self):
        return RunFolder(self.folder / "runs" / "drill")

    @property
    def store(self):
        return self.folder / "store"

    def copy_from(self, other, *kinds):
        """Begin with another drill's artefacts of some kinds."""
        for kind in kinds:
            shutil.copytree(other.store / kind, self.store / kind)

    def plan_faults(self, faults):
        """By stage: what its next tries do."""
        (self.folder / "faults.json").write_text(json.dumps(faults))

    def start(self, *arguments, settings=()):
        """Start a driver; what it prints goes to `driver.N.txt`."""
        command = [sys.executable, str(FAULTS / "drive.py"), "run", "drill.yaml", *arguments]
        command += ["--address", self.address] if self.address else ["--cpus", "2"]
        for setting in ("resources.checkpoint_minutes=0", *settings):
            command += ["--set", setting]
        environment = {**os.environ, **ENVIRONMENT}
        environment["RAY_TMPDIR"] = str(self.temporary)
        with (self.folder / f"driver.{len(self.drivers)}.txt").open("w") as printed:
            driver = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=printed, stderr=printed
            )
        self.drivers.append(driver)
        return driver

    def finish(self, *arguments, settings=(), status=0):
        """Run a driver to its end."""
        self.ends(self.start(*arguments, settings=settings), status)

    def ends(self, driver, status):
        """Wait until a driver has ended, with this status."""
        found = driver.wait(PATIENCE)
        assert found == status, self.printed(driver)

    def status(self):
        """What `layersweep status --json` says."""
        command = [sys.executable, "-m", "orchestrator.cli", "status", "drill", "--json"]
        environment = {**os.environ, **ENVIRONMENT}
        found = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=True
        )
        return json.loads(found.stdout)

    def printed(self, driver):
        number = self.drivers.index(driver)
        return (self.folder / f"driver.{number}.txt").read_text()

    def wait_for(self, what, condition, driver=None):
        """Wait until something is so; the driver, if given, must live on."""
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert driver is None or driver.poll() is None, self.printed(driver)
            assert time.monotonic() < deadline, f"never came: {what}\n{self.story()}"
            time.sleep(0.05)
        return found

    def wait_for_stall(self, driver):
        """Wait until the planned fault waits to be released."""
        self.wait_for("a stage that waits", (self.folder / "waiting").exists, driver)

    def release(self):
        (self.folder / "release").touch()

    def tries(self, stage):
        """Process and node of every try at a stage, in order, ranks beside each other."""
        name = re.escape(stage.replace("/", "."))
        pattern = re.compile(rf"{name}\.(\d+)\.rank(\d+)\.json")
        matches = (
            (pattern.fullmatch(path.name), path) for path in (self.folder / "tries").glob("*.json")
        )
        found = sorted((int(match[1]), int(match[2]), path) for match, path in matches if match)
        return [json.loads(path.read_text()) for _, _, path in found]

    def events(self, name, stage=None):
        return [
            e
            for e in self.run.events()
            if e["event"] == name and (stage is None or e.get("id") == stage)
        ]

    def story(self):
        return "\n".join(str(event) for event in self.run.events())

    def log(self, stage, number=1):
        return Path(self.run.log(stage, number)).read_text()

    def artefact(self, stage):
        """The folder of a stage's artefact, by the journal's newest word."""
        key = [e["key"] for e in self.run.events() if e.get("id") == stage and e.get("key")][-1]
        return self.store / stage.partition("/")[0] / key

    def tables(self):
        return {name: (self.run.report / f"{name}.parquet").read_bytes() for name in TABLES}

    def holds(self, undisturbed, *, anew=()):
        """What every drill must end with.

        Args:
            undisturbed: the drill whose tables these must be, byte for byte.
            anew: stages whose artefact was lost, which may be done again.
        """
        assert self.tables() == undisturbed.tables(), self.story()
        done = Counter(e["id"] for e in self.events("done") if not e.get("reused"))
        again = {stage for stage, times in done.items() if times > 1}
        assert again == set(anew), self.story()
        assert not list(self.store.glob("*/.*.checkpoint")), "checkpoints are left in the store"


ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{FAULTS}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
}


def living(temporary, title=""):
    """Processes that have to do with a temporary folder of Ray's, by what they have open."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            command = process.cmdline()
            known = [*command, *(file.path for file in process.open_files())]
            if (
                process.status() != psutil.STATUS_ZOMBIE
                and any(str(temporary) in text for text in known)
                and " ".join(command).startswith(title)
            ):
                found.append(process)
    return found


def all_gone(temporary, title=""):
    """Wait until no such process is left; fails if some stay."""
    deadline = time.monotonic() + 60
    while left := living(temporary, title):
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {[(p.pid, p.cmdline()) for p in left]}")
        time.sleep(0.1)
