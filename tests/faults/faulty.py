"""What workers call in place of `run_attempt` in these tests: the same, with faults that were planned.

The plan is `faults.json` beside the store: by stage, what is to happen and at how many tries (1). It
also writes down which process, on which node, tries which stage, in `tries/`.
"""

import dataclasses
import json
import os
import time
from pathlib import Path

import ray

from orchestrator import attempt
from workers.stages import STAGES, Stage


def run_attempt(payload, rank, ranks, meeting):
    drill = Path(payload["store"]).parent
    name = payload["id"].replace("/", ".")
    number = _note_try(drill / "tries", name, rank)
    plans = json.loads((drill / "faults.json").read_text())
    fault = plans.get(payload["id"])
    if fault is None or number > fault.get("times", 1):
        return attempt.run_attempt(payload, rank, ranks, meeting)
    stages = attempt.STAGES
    stage = FaultyStage(**vars(STAGES[payload["kind"]]), fault=fault, drill=drill, rank=rank)
    attempt.STAGES = {**stages, payload["kind"]: stage}
    try:
        if fault["do"] == "wait before":
            _wait_for_release(drill)
        return attempt.run_attempt(payload, rank, ranks, meeting)
    finally:
        attempt.STAGES = stages


@dataclasses.dataclass(frozen=True)
class FaultyStage(Stage):
    """A stage whose function does what it should, or what is planned."""

    fault: dict
    drill: Path
    rank: int

    def function(self):
        run = super().function()
        match self.fault["do"]:
            case "raise":
                return self._raise
            case "hang":
                return self._hang
            case "wait after":
                return lambda *arguments: self._wait_after(run, *arguments)
            case "stall":
                return lambda *arguments: self._stall(run, *arguments)
        return run

    def _raise(self, *_):
        import torch

        errors = {
            "OSError": OSError(5, "the disk does not answer"),
            "ValueError": ValueError("this stage has a bug"),
            "MemoryError": MemoryError("no memory left"),
            "OutOfMemoryError": torch.OutOfMemoryError("the card is full"),
        }
        raise errors[self.fault["error"]]

    def _hang(self, *_):
        (self.drill / "hanging").touch()
        time.sleep(3600)

    def _wait_after(self, run, *arguments):
        """All is done but for the commit."""
        summary = run(*arguments)
        _wait_for_release(self.drill)
        return summary

    def _stall(self, run, params, inputs, out, context):
        """Rank 0 stops in mid-training, right after it has kept a checkpoint of some steps."""
        fault, drill = self.fault, self.drill

        class Stalling(type(context.checkpoints)):
            def write(self, step, tensors, record):
                super().write(step, tensors, record)
                if step == fault["step"]:
                    _wait_for_release(drill)

        of = context.checkpoints
        fields = {f.name: getattr(of, f.name) for f in dataclasses.fields(of)}
        return run(
            params, inputs, out, dataclasses.replace(context, checkpoints=Stalling(**fields))
        )


def _note_try(folder, name, rank):
    """Write down who tries; returns the number of this try."""
    folder.mkdir(exist_ok=True)
    node = ray.get_runtime_context().get_node_id()
    number = 1
    while True:
        try:
            with (folder / f"{name}.{number}.rank{rank}.json").open("x") as file:
                json.dump({"pid": os.getpid(), "node": node}, file)
            return number
        except FileExistsError:
            number += 1


def _wait_for_release(drill):
    (drill / "waiting").touch()
    while not (drill / "release").exists():
        time.sleep(0.02)
