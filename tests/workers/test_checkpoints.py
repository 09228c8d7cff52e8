"""Work that is killed goes on and ends with the bytes of work that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_speechllm import shake, tiny_examples, tiny_speechllm

from workers.checkpoints import Checkpoints
from workers.config import DecodeSettings, LoraSettings, TrainSettings
from workers.decoding import greedy
from workers.training import resumable, train

SETTINGS = TrainSettings(
    steps=8, batch_size=4, micro_batch=3, lr_decoder=1e-2, lr_projector=1e-2, warmup=0.2
)
DROPOUT = LoraSettings(rank=4, alpha=8.0, dropout=0.3)


class Killed(Exception):
    """Stands for whatever ends a process."""


def trained(checkpoints=None, until=None, trainable=("decoder", "projector")):
    """A model trained to the end, or until a step; and the report."""
    model = tiny_speechllm(lora=DROPOUT)
    shake(model)

    def progress(done, steps, loss):
        del steps, loss
        if done == until:
            raise Killed

    report = train(
        model, tiny_examples(), SETTINGS, seed=3, trainable=set(trainable), progress=progress,
        log_every=1, checkpoints=checkpoints,
    )  # fmt: skip
    return model, report


@pytest.mark.parametrize("trainable", [("decoder", "projector"), ("decoder",), ("projector",)])
@pytest.mark.parametrize("until", [1, 5, 7])
def test_it_ends_with_the_same_weights_bit_for_bit(tmp_path, until, trainable):
    unbroken, report = trained(trainable=trainable)
    checkpoints = Checkpoints(tmp_path / "kept", 0)
    with pytest.raises(Killed):
        trained(checkpoints, until, trainable)
    assert resumable(unbroken, checkpoints)
    steps = []
    model = tiny_speechllm(lora=DROPOUT)
    shake(model)
    again = train(
        model, tiny_examples(), SETTINGS, seed=3, trainable=set(trainable), log_every=1,
        progress=lambda done, *_: steps.append(done), checkpoints=checkpoints,
    )  # fmt: skip
    assert steps == list(range(until, SETTINGS.steps + 1))
    expected = unbroken.trained_state()
    for name, value in model.trained_state().items():
        assert torch.equal(value, expected[name]), name
    assert (again.losses, again.grad_norms) == (report.losses, report.grad_norms)
    assert (again.target_tokens, again.positions) == (report.target_tokens, report.positions)


def test_what_was_decoded_is_not_decoded_again(tmp_path):
    model, examples = tiny_speechllm(), tiny_examples(9)
    shake(model)
    settings = DecodeSettings(batch_size=2, extra_tokens=4)
    calls = []

    def count(module, args, kwargs):
        del module, args
        calls.append(kwargs["inputs_embeds"] is not None if "inputs_embeds" in kwargs else False)
        if sum(calls) == until:
            raise Killed

    until = 0
    hook = model.causal_lm.register_forward_pre_hook(count, with_kwargs=True)
    unbroken = greedy(model, examples, settings)
    assert sum(calls) == 5  # a prompt each batch
    checkpoints, until = Checkpoints(tmp_path / "kept", 0), 4
    calls.clear()
    with pytest.raises(Killed):
        greedy(model, examples, settings, checkpoints=checkpoints)
    until = 0
    calls.clear()
    assert greedy(model, examples, settings, checkpoints=checkpoints) == unbroken
    assert sum(calls) == 2
    hook.remove()


def test_keeping_checkpoints_changes_nothing(tmp_path):
    plain, _ = trained()
    model, _ = trained(Checkpoints(tmp_path / "kept", 0))
    expected = plain.trained_state()
    assert all(torch.equal(v, expected[name]) for name, v in model.trained_state().items())


def test_one_is_kept_as_often_as_asked_and_none_after_the_last_step(tmp_path):
    trained(Checkpoints(tmp_path / "often", 0))
    (kept,) = (tmp_path / "often").iterdir()
    assert kept.name.startswith("step-00000007.")
    trained(Checkpoints(tmp_path / "seldom", 3600))
    assert not (tmp_path / "seldom").exists()


def test_damaged_unfinished_and_foreign_files_are_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path, 0)
    checkpoints.write(4, {"a": torch.ones(3)}, {"device": "cpu"})
    (good,) = tmp_path.iterdir()
    content = good.read_bytes()
    flipped = bytearray(content)
    flipped[-1] ^= 1
    name = good.name.replace("00000004", "00000006")
    (tmp_path / name).write_bytes(bytes(flipped))
    (tmp_path / name.replace("00000006", "00000007")).write_bytes(content[: len(content) // 2])
    (tmp_path / ".unfinished").write_bytes(content)
    (tmp_path / "notes.txt").write_text("mine")
    found = checkpoints.newest(device="cpu")
    assert found.step == 4
    assert torch.equal(found.tensors["a"], torch.ones(3))
    assert checkpoints.newest(device="cuda NVIDIA H100") is None
    checkpoints.clear()
    assert not tmp_path.exists()
    assert checkpoints.newest() is None


STAGE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tiny_speechllm import shake, tiny_examples, tiny_speechllm
from test_checkpoints import DROPOUT, SETTINGS
from workers.checkpoints import Checkpoints
from workers.training import train
model = tiny_speechllm(lora=DROPOUT)
shake(model)
def slowly(done, steps, loss):
    if sys.argv[2] == "slowly":
        time.sleep(0.5)
train(model, tiny_examples(), SETTINGS, seed=3, trainable={"decoder", "projector"},
      progress=slowly, log_every=1, checkpoints=Checkpoints(Path(sys.argv[1]) / "kept", 0))
model.save_trained(Path(sys.argv[1]) / "out")
"""


def test_a_process_that_is_killed_goes_on_in_another(tmp_path):
    here = str(Path(__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder: Path, pace: str) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", STAGE, str(folder), pace, here]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)

    process = start(tmp_path / "killed", "slowly")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("kept/step-0000000[3-6]*")):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "out").exists()
    for folder in ("killed", "unbroken"):
        process = start(tmp_path / folder, "at once")
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    for file in ("projector.safetensors", "adapter/adapter_model.safetensors"):
        unbroken = (tmp_path / "unbroken" / "out" / file).read_bytes()
        assert (tmp_path / "killed" / "out" / file).read_bytes() == unbroken
