"""Safetensors, file by file and without the model in memory: headers, and copying the bytes kept.

A file is eight bytes (little-endian length of the header), a JSON header that gives every tensor's
type, shape and byte range, then the tensors' bytes. Cutting layers needs the header and copies
ranges: memory stays at one buffer, whatever the model's size.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from workers.errors import InvalidInput, first_line
from workers.surgery.model_files import INDEX, WEIGHTS, write_json

BUFFER_BYTES = 4 * 2**20
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: what the header says of it."""

    name: str
    dtype: str
    """As safetensors names it: `BF16`, `F32`, …"""
    shape: tuple[int, ...]
    file: Path
    begin: int
    """First byte, from the beginning of the file."""
    size: int
    """Bytes."""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()

    def on_meta(self) -> torch.Tensor:
        """A tensor of this type and shape, without content.

        Raises:
            InvalidInput: a type that only quantised checkpoints have.
        """
        if self.dtype not in _DTYPES:
            raise InvalidInput(f"{self.name} has the type {self.dtype}", str(self.file))
        return torch.empty(self.shape, dtype=_DTYPES[self.dtype], device="meta")


def read_headers(files: Iterable[Path]) -> list[StoredTensor]:
    """All tensors of some files, in the order in which they lie there.

    Raises:
        InvalidInput: a file is damaged or cut short, or a name occurs twice.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            # safetensors checks header, offsets and length; it reads no tensor.
            with safe_open(file, framework="pt"):
                pass
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
        except (OSError, ValueError, SafetensorError) as error:
            raise InvalidInput(
                f"no valid safetensors file: {first_line(error)}",
                str(file),
                "copy or download it again",
            ) from error
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, entry in entries:
            begin, end = entry["data_offsets"]
            if name in found:
                raise InvalidInput(
                    f"{name} is in {found[name].file.name} as well", str(file), "keep one of them"
                )
            found[name] = StoredTensor(
                name, entry["dtype"], tuple(entry["shape"]), file, 8 + length + begin, end - begin
            )
    return list(found.values())


def layer_prefixes(names: Iterable[str], count: int) -> list[str]:
    """Every `P` for which names `P.0.…` to `P.{count-1}.…` exist, and no further number.

    More than one is common: a speech encoder may be as deep as the decoder.
    """
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        words = name.split(".")
        for place, word in enumerate(words):
            if place and word.isdecimal():
                numbers[".".join(words[:place])].add(int(word))
    return sorted(p for p, found in numbers.items() if found == set(range(count)))


def renumbered(name: str, prefix: str, kept: Sequence[int]) -> str | None:
    """A tensor's name after the cut; None if its layer is removed."""
    head = f"{prefix}."
    if not name.startswith(head):
        return name
    number, dot, rest = name[len(head) :].partition(".")
    if not number.isdecimal():
        return name
    return f"{head}{kept.index(int(number))}{dot}{rest}" if int(number) in kept else None


def write_shards(
    kept: Mapping[str, StoredTensor],
    out: Path,
    *,
    parameters: int | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Copies tensors into new files, as many as they come from: `model.safetensors` or an index.

    Args:
        kept: new name and source of every tensor.
        out: the folder.
        parameters: of the model, for the index (tied weights counted once).
        progress: called as bytes are copied.

    Returns:
        SHA-256 of every tensor's bytes as they were read, by new name.
    """
    shards: dict[Path, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in kept.items():
        shards[tensor.file][name] = tensor
    total, done = sum(tensor.size for tensor in kept.values()), 0
    digests: dict[str, str] = {}
    weight_map = {}
    for number, (source, tensors) in enumerate(shards.items(), 1):
        file = WEIGHTS
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for name, digest, size in _write_file(source, tensors, out / file):
            digests[name] = digest
            weight_map[name] = file
            done += size
            if progress:
                progress(done, total)
    if len(shards) > 1:
        metadata: dict[str, Any] = {"total_size": total}
        if parameters is not None:
            metadata["total_parameters"] = parameters
        ordered = dict(sorted(weight_map.items()))
        write_json(out / INDEX, {"metadata": metadata, "weight_map": ordered})
    return digests


def copy_tensors(kept: Mapping[str, StoredTensor], file: Path) -> dict[str, str]:
    """`write_shards` for tensors of one file, into one file of any name."""
    (source,) = {tensor.file for tensor in kept.values()}
    return {name: digest for name, digest, _ in _write_file(source, kept, file)}


def digest_of(tensor: StoredTensor) -> str:
    """SHA-256 of a stored tensor's bytes."""
    digest = hashlib.sha256()
    with tensor.file.open("rb", buffering=0) as stream:
        for piece in _pieces(stream, tensor):
            digest.update(piece)
    return digest.hexdigest()


def _write_file(
    source: Path, tensors: Mapping[str, StoredTensor], file: Path
) -> Iterable[tuple[str, str, int]]:
    with safe_open(source, framework="pt") as opened:
        metadata = opened.metadata() or {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Tensors begin at a multiple of eight bytes, as safetensors itself has it.
    text += b" " * (-len(text) % 8)
    with source.open("rb", buffering=0) as stream, file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little"))
        target.write(text)
        for name, tensor in tensors.items():
            digest = hashlib.sha256()
            for piece in _pieces(stream, tensor):
                digest.update(piece)
                target.write(piece)
            yield name, digest.hexdigest(), tensor.size
        target.flush()
        os.fsync(target.fileno())


def _pieces(stream: Any, tensor: StoredTensor) -> Iterable[memoryview]:
    """A tensor's bytes through one buffer; a piece is valid until the next is asked for."""
    view = memoryview(bytearray(min(BUFFER_BYTES, tensor.size)))
    stream.seek(tensor.begin)
    left = tensor.size
    while left:
        count = stream.readinto(view[: min(left, len(view))])
        if not count:
            raise InvalidInput("the file ended early", str(tensor.file), "copy it again")
        left -= count
        yield view[:count]
