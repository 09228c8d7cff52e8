"""The quickstart in a fresh folder: wall-clock, CPU seconds and peak memory, by kind of stage.

    python benchmarks/quickstart.py [SWEEP] [--keep FOLDER]

Prints a table and a line for `benchmarks/LOG.md`. The naive way it stands beside is the sum of the
jobs' own seconds: what one process would take that did the same stages one after another, with the
same sharing of work.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


class PeakMemory(threading.Thread):
    """Samples the summed proportional memory of a process and all it started, twice a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.largest = pid, 0, 0

    def run(self) -> None:
        while psutil.pid_exists(self.pid):
            sizes = []
            try:
                tree = [
                    psutil.Process(self.pid),
                    *psutil.Process(self.pid).children(recursive=True),
                ]
            except psutil.Error:
                return
            for process in tree:
                try:
                    sizes.append(process.memory_full_info().pss)
                except psutil.Error:
                    continue
            self.peak = max(self.peak, sum(sizes))
            self.largest = max([self.largest, *sizes])
            time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", nargs="?", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--keep", help="run here and leave store and report behind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return measure(Path(options.sweep).absolute(), Path(options.keep or scratch))


def measure(sweep: Path, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    program = Path(sys.executable).parent / "layersweep"
    started = time.monotonic()
    process = subprocess.Popen([program, "run", sweep], cwd=folder, env=os.environ)
    memory = PeakMemory(process.pid)
    memory.start()
    status = process.wait()
    wall = time.monotonic() - started
    kinds: dict[str, list[dict[str, float]]] = defaultdict(list)
    for path in (folder / "store").glob("*/*/stage.json"):
        stage = json.loads(path.read_text())
        kinds[stage["kind"]].append(stage["provenance"])
    print(f"\n{'stage':10}{'count':>7}{'job s':>9}{'CPU s':>9}{'longest':>9}")
    for kind in ("build", "encode", "adapt", "map", "heal", "evaluate"):
        jobs = kinds.get(kind, [])
        seconds = [job["seconds"] for job in jobs]
        cpu = sum(job["cpu_seconds"] for job in jobs)
        print(f"{kind:10}{len(jobs):7}{sum(seconds):9.1f}{cpu:9.1f}{max(seconds, default=0):9.1f}")
    total = sum(job["seconds"] for jobs in kinds.values() for job in jobs)
    cpu = sum(job["cpu_seconds"] for jobs in kinds.values() for job in jobs)
    print(
        f"\nwall {wall:.0f} s, jobs {total:.0f} s ({total / wall:.2f} x the wall-clock), "
        f"CPU {cpu:.0f} s, peak memory {memory.peak / 2**30:.2f} GiB in all, "
        f"{memory.largest / 2**30:.2f} GiB the largest process, exit status {status}"
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
