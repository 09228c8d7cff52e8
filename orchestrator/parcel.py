"""A report on its way from the cluster's head to a laptop, as text with a digest.

It goes through the only door there is, a job's printed output, and is unpacked when it came whole.

`python -m orchestrator.parcel RUN` builds the run's report and prints the parcel.
"""

import base64
import binascii
import hashlib
import io
import json
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "layersweep-parcel-begin ", "layersweep-parcel-end"
LINE = 16_000
MOST_BYTES = 256 * 2**20
"""Packed. The dashboard hands a job's output on in one piece, out of its memory."""


class Unreadable(Exception):
    """No parcel in the text, or not a whole one."""


@dataclass(frozen=True)
class Contents:
    """What arrived."""

    folder: Path
    files: int
    size: int
    """Bytes, unpacked."""
    packed: int
    """Bytes that came over, before they were written as text."""
    about: dict[str, Any]


def pack(folder: Path, about: dict[str, Any]) -> str:
    """The files of a folder as lines of text.

    Raises:
        ValueError: larger than a job's output can carry.
    """
    buffer = io.BytesIO()
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in files:
            archive.add(path, path.name, recursive=False)
    data = buffer.getvalue()
    if len(data) > MOST_BYTES:
        raise ValueError(f"{len(data) / 2**20:.0f} MiB, more than can be sent: copy {folder}")
    head = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "about": about}
    text = base64.b64encode(data).decode()
    lines = [text[i : i + LINE] for i in range(0, len(text), LINE)]
    return "\n".join([BEGIN + json.dumps(head), *lines, END])


def unpack(text: str, folder: Path) -> Contents:
    """Write a parcel's files into a folder, each whole or not at all.

    Raises:
        Unreadable: there is none in the text, or bytes are missing or wrong.
    """
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(BEGIN)]
    if not starts or END not in lines[starts[0] :]:
        raise Unreadable("no end of it" if starts else "no parcel in the answer")
    start = starts[0]
    try:
        head = json.loads(lines[start].removeprefix(BEGIN))
        body = "".join(lines[start + 1 : lines.index(END, start)])
        data = base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error):
        raise Unreadable("it is garbled") from None
    if hashlib.sha256(data).hexdigest() != head["sha256"]:
        raise Unreadable("its digest is wrong")
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch,
        tarfile.open(fileobj=io.BytesIO(data)) as archive,
    ):
        archive.extractall(scratch, filter="data")
        arrived = [path for path in Path(scratch).iterdir() if path.is_file()]
        size = sum(path.stat().st_size for path in arrived)
        for path in arrived:
            path.replace(folder / path.name)
    return Contents(folder, len(arrived), size, len(data), head["about"])


def main() -> None:
    """Build a run's report and print it as a parcel."""
    from orchestrator.execute import write_report
    from orchestrator.runs import RunFolder
    from workers.errors import InvalidInput

    try:
        written = write_report(RunFolder.existing(sys.argv[1])).report
        parcel = pack(written.page.parent, {"verdicts": written.verdicts})
    except (InvalidInput, ValueError) as error:
        for line in str(error).splitlines():
            print(f"layersweep: {line}", file=sys.stderr)
        sys.exit(2)
    print(parcel)


if __name__ == "__main__":
    main()
