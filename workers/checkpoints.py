"""Checkpoints of long work: what a killed stage needs to go on and end with the same bytes.

A checkpoint is one safetensors file, written beside and renamed, its digest in its name. So there is
the last whole one or none, and a damaged one is passed over. Where the folder dies with its node, a
mirror keeps a copy. What is in it is `training`'s and `decoding`'s business.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_NAME = re.compile(r"step-(\d+)\.([0-9a-f]{32})\.safetensors")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read."""

    step: int
    """Steps (or utterances) done."""
    tensors: dict[str, Tensor]
    record: dict[str, Any]
    """Plain data beside the tensors."""


def _never() -> bool:
    return False


class Mirror(Protocol):
    """Where copies of a stage's checkpoints outlive the node."""

    def names(self) -> list[str]:
        """Names of the files that are there."""

    def download(self, name: str, file: Path) -> None:
        """Write one to a file of this machine."""

    def upload(self, file: Path) -> None:
        """Keep a copy under the file's own name."""

    def remove(self, name: str) -> None:
        """Forget one."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage."""

    folder: Path
    """Made when the first is written; the one it lies in must be there."""
    seconds: float = 300.0
    """From one to the next; 0: after each step."""
    mirror: Mirror | None = None
    """None: the folder is seen by every node."""
    asked_to_stop: Callable[[], bool] = _never
    """Whether to keep a checkpoint now and leave."""

    def newest(self, **expected: Any) -> Saved | None:
        """The last whole checkpoint; None if there is none.

        Args:
            expected: what its record must say, such as the device: one made elsewhere does not end
                in the same weights, and is passed over.
        """
        self._bring()
        for step, file in reversed(self._files()):
            content = _content(file)
            if content is None:
                continue
            record = content.record
            if all(record.get(name) == value for name, value in expected.items()):
                return Saved(step, content.tensors, record)
        return None

    def write(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep the state after `step` steps, in place of what was kept before."""
        # Not its parents: a store that is away for a while must not be begun anew in its place.
        self.folder.mkdir(parents=self.mirror is not None, exist_ok=True)
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = save(held, metadata={"record": json.dumps(dict(record))})
        before = self._files()
        file = self.folder / f"step-{step:08d}.{_digest(content)}.safetensors"
        unfinished = self.folder / f".{uuid.uuid4().hex}"
        with unfinished.open("wb") as target:
            target.write(content)
            target.flush()
            os.fsync(target.fileno())
        unfinished.rename(file)
        for _, old in before:
            if old != file:
                old.unlink(missing_ok=True)
        self._copy(file)

    def clear(self) -> None:
        """Forget them: the stage is done."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.mirror is not None:
            with _spared("the copies of its checkpoints stay"):
                for name in self.mirror.names():
                    self.mirror.remove(name)

    def _bring(self) -> None:
        """Fetch from the mirror what is newer than what is here."""
        if self.mirror is None:
            return
        here = max((step for step, _ in self._files()), default=-1)
        there = [
            (int(match[1]), match[0])
            for match in map(_NAME.fullmatch, self.mirror.names())
            if match
        ]
        for step, name in sorted(there):
            if step > here:
                self.folder.mkdir(parents=True, exist_ok=True)
                unfinished = self.folder / f".{uuid.uuid4().hex}"
                self.mirror.download(name, unfinished)
                unfinished.rename(self.folder / name)

    def _copy(self, file: Path) -> None:
        """Keep a copy in the mirror, in place of those before."""
        if self.mirror is None:
            return
        with _spared("its newest checkpoint is on this node alone"):
            before = self.mirror.names()
            self.mirror.upload(file)
            for name in before:
                if name != file.name:
                    self.mirror.remove(name)

    def _files(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        named = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(match[1]), path) for match, path in named if match)


@contextlib.contextmanager
def _spared(consequence: str) -> Iterator[None]:
    """Work goes on when only a copy of its checkpoint could not be kept."""
    try:
        yield
    except OSError as error:
        print(f"{consequence}: {error}", flush=True)


def place_of(device: torch.device) -> dict[str, str]:
    """Where arithmetic is the same to the last bit, for a checkpoint's record."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor()
    return {"device": f"{device.type} {name}".strip(), "torch": torch.__version__}


def _content(file: Path) -> Saved | None:
    match = _NAME.fullmatch(file.name)
    try:
        content = file.read_bytes()
        if match is None or _digest(content) != match[2]:
            return None
        length = int.from_bytes(content[:8], "little")
        record = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["record"])
        return Saved(int(match[1]), load(content), record)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
