"""eSpeak NG in a process of its own: text in, samples with word and phoneme times out.

The library keeps state from one utterance to the next, so the same request gives other samples the
second time in a process, and it seeds its breath noise by the clock. Requests sent in one order to a
fresh process, with seeds, always give the same bytes, at 4 ms each; a process per utterance would
take 20. This file is therefore both the parent's side and, run as a script, the child: it must
import nothing of this package.
"""

import ctypes
import json
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

SAMPLING_RATE = 22_050
"""Hz; eSpeak NG's own."""
_SYNCHRONOUS = 2
_OPTIONS = 0x1 | 0x2 | 0x8000  # phoneme events, as IPA; return errors instead of exiting
_RATE, _PITCH = 1, 3  # espeak_PARAMETER
_UTF8 = 1
_END, _WORD, _PHONEME = 0, 1, 7  # espeak_EVENT_TYPE


@dataclass(frozen=True)
class Request:
    """What to say, and how."""

    text: str
    voice: str
    """Such as `de` or `en-us+f2`."""
    rate: int
    """Words a minute, 80 … 450."""
    pitch: int
    """0 … 100."""


@dataclass(frozen=True)
class Spoken:
    """One synthesised utterance. Times are sample numbers at `SAMPLING_RATE`."""

    pcm: bytes
    """16-bit samples."""
    words: list[tuple[int, int]]
    """Place of the word's first letter in the text, and its start."""
    phones: list[tuple[str, int]]
    """IPA and start; an empty name is a pause."""


def synthesise(requests: Sequence[Request]) -> Iterator[Spoken]:
    """Say everything, in order, in a fresh process.

    Raises:
        RuntimeError: the process ended early (its message is on standard error).
    """
    command = [sys.executable, "-P", str(Path(__file__).resolve())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps([asdict(request) for request in requests]).encode())
            child.stdin.close()
            for _ in requests:
                yield _receive(child.stdout)
        finally:
            child.kill()


def _receive(stream: IO[bytes]) -> Spoken:
    header = stream.read(8)
    if len(header) < 8:
        raise RuntimeError("speech synthesis ended before its work was done")
    events_size, pcm_size = struct.unpack("<II", header)
    events = json.loads(stream.read(events_size))
    return Spoken(
        stream.read(pcm_size),
        [(place, start) for place, start in events["words"]],
        [(name, start) for name, start in events["phones"]],
    )


class _Identity(ctypes.Union):
    _fields_ = (
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Identity),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class _Synthesiser:
    """The library, opened once in this process."""

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        if self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, _OPTIONS) != SAMPLING_RATE:
            raise RuntimeError("eSpeak NG could not be started")
        self._pcm = bytearray()
        self._words: list[tuple[int, int]] = []
        self._phones: list[tuple[str, int]] = []
        self._callback = _Callback(self._collect)  # kept: the library calls it later
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._pcm += ctypes.string_at(samples, 2 * count)
        i = 0
        while events[i].type != _END:
            event = events[i]
            if event.type == _WORD:
                self._words.append((event.text_position - 1, event.sample))
            elif event.type == _PHONEME:
                name = event.id.string.decode(errors="ignore")
                self._phones.append((name, event.sample))
            i += 1
        return 0

    def say(self, request: Request, seed: int) -> Spoken:
        """Say one request; `seed` is for the voice's noise."""
        self._pcm, self._words, self._phones = bytearray(), [], []
        if self._library.espeak_SetVoiceByName(request.voice.encode()) != 0:
            raise RuntimeError(f"eSpeak NG has no voice {request.voice}")
        self._library.espeak_SetParameter(_RATE, request.rate, 0)
        self._library.espeak_SetParameter(_PITCH, request.pitch, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        text = request.text.encode() + b"\0"
        self._library.espeak_Synth(text, len(text), 0, 0, 0, _UTF8, None, None)
        return Spoken(bytes(self._pcm), self._words, self._phones)


def _serve(source: IO[bytes], sink: IO[bytes]) -> None:
    requests = [Request(**fields) for fields in json.load(source)]
    synthesiser = _Synthesiser()
    for number, request in enumerate(requests):
        spoken = synthesiser.say(request, seed=number)
        events = json.dumps({"words": spoken.words, "phones": spoken.phones}).encode()
        sink.write(struct.pack("<II", len(events), len(spoken.pcm)) + events + spoken.pcm)
    sink.flush()


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
