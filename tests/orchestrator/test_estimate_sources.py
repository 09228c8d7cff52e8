"""Where shapes and lengths come from: weight headers on disk and on the hub, manifests, audio files."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from orchestrator.estimate.lengths import Lengths, manifest_lengths, together
from orchestrator.estimate.tensors import hub_shapes, stored_shapes
from orchestrator.sources import Source

SHAPES = {"a.weight": (3, 5), "b.bias": (7,)}


def weights(file, names=tuple(SHAPES)):
    save_file({name: torch.zeros(SHAPES[name]) for name in names}, file)


def local(folder):
    return Source(str(folder), "folder:0")


def test_shapes_of_one_file_and_of_several(tmp_path):
    weights(tmp_path / "model.safetensors")
    assert stored_shapes(local(tmp_path)) == SHAPES
    (tmp_path / "model.safetensors").unlink()
    index = {}
    for number, name in enumerate(SHAPES):
        weights(tmp_path / f"part-{number}.safetensors", [name])
        index[name] = f"part-{number}.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert stored_shapes(local(tmp_path)) == SHAPES


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0no json!"])
def test_a_damaged_file_gives_no_shapes(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert stored_shapes(local(tmp_path)) is None
    assert stored_shapes(local(tmp_path / "nothing")) is None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that gives out one repository as the hub does, and counts the bytes."""
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in SHAPES.items()} | {
        "large": torch.zeros(1 << 20)}, file)  # fmt: skip
    whole, sent = file.read_bytes(), []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(whole)

        def do_GET(self):
            asked = self.headers.get("Range", "bytes=0-0").removeprefix("bytes=")
            first, last = asked.split("-")
            self.answer(whole[int(first) : int(last) + 1], 206)

        def answer(self, body, status=200):
            there = self.path == "/org/llm/resolve/c0ffee/model.safetensors"
            self.send_response(status if there else 404)
            self.send_header("Content-Length", str(len(body) if there else 0))
            self.end_headers()
            if there and self.command == "GET":
                sent.append(len(body))
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", here + template)
    yield sent, len(whole)
    server.shutdown()
    server.server_close()


def test_of_a_hub_repository_only_headers_are_fetched(hub):
    sent, size = hub
    found = hub_shapes(Source("org/llm", "hub:org/llm@c0ffee", "c0ffee"))
    assert found == {**SHAPES, "large": (1 << 20,)}
    assert 0 < sum(sent) < size / 10
    assert hub_shapes(Source("org/none", "hub:org/none@c0ffee", "c0ffee")) is None


# --- lengths ----------------------------------------------------------------------------------


def manifest(folder, rows):
    file = folder / "m.jsonl"
    file.write_text("\n".join(json.dumps({"audio_filepath": "a.wav", **row}) for row in rows))
    return file


def test_lengths_of_a_manifest_come_from_its_durations_and_texts(tmp_path):
    rows = [
        {"text": "x" * 30, "duration": 2.0},
        {"text": "x" * 9, "text_de": "x" * 90, "duration": 6},
    ]
    found = manifest_lengths(manifest(tmp_path, rows))
    assert (found.utterances, found.seconds, found.longest) == (2, 4.0, 6.0)
    assert (found.text, found.longest_text) == (20.0, 31)


def test_without_durations_the_audio_is_looked_at(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16000)
    found = manifest_lengths(manifest(tmp_path, [{"text": "a"}] * 100))
    assert (found.seconds, found.longest) == (0.5, 0.5)


def test_a_manifest_that_cannot_be_read_has_no_lengths(tmp_path):
    assert manifest_lengths(tmp_path / "none.jsonl") is None
    assert manifest_lengths(manifest(tmp_path, [{"text": None}])) is None


def test_corpora_together_are_weighted_by_their_utterances():
    short, long = Lengths(30, 1.0, 2.0, 5.0, 9), Lengths(10, 5.0, 8.0, 9.0, 20)
    assert together([short, long]) == Lengths(40, 2.0, 8.0, 6.0, 20)
    assert together([short, None]) is None
    assert together([]) is None
