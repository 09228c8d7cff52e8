"""What workers call in `test_driver`: stages that do as their parameters say, at once."""

import json
import os
import signal
import time
from pathlib import Path

from orchestrator.store import open_store


def joined(rank, ranks, meeting):
    # Seconds of imports that most of the stages here can do without.
    from workers.ranks import join

    return join(rank, ranks, meeting, "cpu")


def run(payload, rank, ranks, meeting):
    params, log = payload["params"], Path(payload["log"])
    tries = params.get("tries", [])
    attempt = int(log.stem.rpartition(".")[2])
    what = tries[attempt - 1] if attempt <= len(tries) else "done"
    began = time.time()
    if "seconds" in params:
        time.sleep(params["seconds"])
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "rank 1 killed":
        group = joined(rank, ranks, meeting)
        group.add_up([], [1.0])
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    if what == "sum":
        sums = joined(rank, ranks, meeting).add_up([], [rank + 1.0])
        what, params = "done", {**params, "sum": sums[0]}
    if what == "hang":
        time.sleep(600)
    if what == "waits to stop":
        store = open_store(payload["store"], new=False)
        while not (store.read_note(payload["fence"]["name"]) or {}).get("stop"):
            time.sleep(0.1)
        return {"status": "stopped", "message": "kept a checkpoint"}
    if what != "done":
        return {"status": "failed", "class": what, "message": f"{what} on try {attempt}"}
    if rank == 0:
        store = open_store(payload["store"], new=False)
        folder = store.begin(payload["kind"], payload["key"])
        told = {
            "began": began,
            "pid": os.getpid(),
            "ranks": ranks,
            "relief": payload["relief"],
            "threads": os.environ["OMP_NUM_THREADS"],
            "sum": params.get("sum"),
        }
        (folder / "told.json").write_text(json.dumps(told))
        store.commit(folder, payload["kind"], payload["key"], {})
    return {"status": "done", "seconds": time.time() - began, "summary": {}}
