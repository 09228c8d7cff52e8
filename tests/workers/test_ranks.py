"""Several processes that train together do what one does, and need less memory where they say so."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_process import SETTINGS
from safetensors.torch import load_file
from tiny_speechllm import shake, tiny_examples, tiny_speechllm

from workers.config import LoraSettings
from workers.relief import Relief
from workers.training import train

SCRIPT = Path(__file__).parent / "rank_process.py"


def start(size: int, out: Path, *, dropout: float = 0.0, stop_after: int = 0):
    """Run `size` ranks to their end; returns their exit statuses."""
    out.mkdir(exist_ok=True)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.set_inheritable(True)
    port = listener.getsockname()[1]
    paths = [str(SCRIPT.parent), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(size), str(port),
             str(listener.fileno() if rank == 0 else -1), out, str(dropout), str(stop_after)],
            pass_fds=[listener.fileno()] if rank == 0 else [], env=environment,
        )
        for rank in range(size)
    ]  # fmt: skip
    listener.close()
    return [process.wait(120) for process in processes]


def results(out: Path, rank: int = 0):
    losses, norms = json.loads((out / f"losses.{rank}.json").read_text())
    return losses, norms, load_file(out / f"state.{rank}.safetensors")


def here(relief: Relief | None = None, **changes):
    model = tiny_speechllm(lora=LoraSettings(rank=4, alpha=8.0))
    shake(model)
    report = train(
        model, tiny_examples(), SETTINGS.model_copy(update=changes), seed=3,
        trainable={"decoder", "projector"}, **({"relief": relief} if relief else {}),
    )  # fmt: skip
    return report, model.trained_state()


def test_two_ranks_with_the_decoder_spread_over_them_learn_what_one_process_learns(tmp_path):
    assert start(2, tmp_path / "two") == [0, 0]
    losses, norms, state = results(tmp_path / "two")
    alone, expected = here()
    assert losses == pytest.approx(alone.losses, rel=1e-5)
    assert norms == pytest.approx(alone.grad_norms, rel=1e-4)
    other = results(tmp_path / "two", rank=1)[2]
    for name, value in state.items():
        assert torch.equal(value, other[name]), name
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def test_ranks_that_are_asked_to_stop_go_on_to_the_same_bytes(tmp_path):
    assert start(2, tmp_path / "whole", dropout=0.3) == [0, 0]
    # The second rank alone is asked: all of them keep a checkpoint and leave at the same step.
    assert start(2, tmp_path / "cut", dropout=0.3, stop_after=7) == [1, 1]
    assert {(tmp_path / "cut" / f"ended.{r}").read_text() for r in (0, 1)} == {"Stopped"}
    assert len(list((tmp_path / "cut" / "kept").iterdir())) == 1
    assert start(2, tmp_path / "cut", dropout=0.3) == [0, 0]
    unbroken, again = results(tmp_path / "whole"), results(tmp_path / "cut")
    assert again[:2] == unbroken[:2]
    for name, value in again[2].items():
        assert torch.equal(value, unbroken[2][name]), name


def test_activation_checkpointing_changes_no_bit():
    plain, expected = here()
    relieved, state = here(Relief(activation_checkpointing=True))
    assert relieved.losses == plain.losses
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


def test_a_halved_micro_batch_is_the_same_step():
    plain, expected = here(micro_batch=2)
    relieved, state = here(Relief(halvings=1))  # of the batch of four
    assert relieved.losses == plain.losses
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name
    assert [Relief(n).size(6) for n in range(5)] == [6, 3, 2, 1, 1]


def test_a_rank_whose_peer_dies_says_so_and_does_not_hang():
    code = (
        "import os, sys; sys.argv[0] = 'x'\n"
        "from workers.ranks import join\n"
        "rank, port, fd = map(int, sys.argv[1:])\n"
        "ranks = join(rank, 2, ('127.0.0.1', port, fd), 'cpu')\n"
        "if rank == 1: os._exit(9)\n"
        "ranks.add_up([], [1.0]); ranks.add_up([], [1.0])\n"
    )
    listener = socket.create_server(("127.0.0.1", 0))
    port, number = listener.getsockname()[1], listener.fileno()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(r), str(port), str(number if r == 0 else -1)],
            pass_fds=[number] if r == 0 else [], env=environment, stderr=subprocess.PIPE, text=True,
        )
        for r in (0, 1)
    ]  # fmt: skip
    listener.close()
    _, error = ranks[0].communicate(timeout=60)
    ranks[1].communicate(timeout=60)
    assert (ranks[0].returncode, ranks[1].returncode) == (1, 9)
    assert "PeerLost" in error
