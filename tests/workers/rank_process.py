"""One rank of a training run, for `test_ranks`: trains a tiny model and writes what came out."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_speechllm import shake, tiny_config, tiny_decoder, tiny_examples, tiny_tokenizer

from workers.checkpoints import Checkpoints
from workers.config import LoraSettings, TrainSettings
from workers.ranks import join
from workers.speechllm import SpeechLLM
from workers.training import train

SETTINGS = TrainSettings(
    steps=20, batch_size=4, lr_decoder=1e-2, lr_projector=1e-2, warmup=0.2, clip=1.0
)


def main(
    rank: int, size: int, port: int, listener: int, out: Path, dropout: float, stop_after: int
) -> None:
    ranks = join(rank, size, ("127.0.0.1", port, listener), "cpu")
    decoder = tiny_decoder().requires_grad_(False)
    if size > 1:
        ranks.spread_layers(decoder, "cpu")
    lora = LoraSettings(rank=4, alpha=8.0, dropout=dropout)
    model = SpeechLLM.create(decoder, tiny_tokenizer(), tiny_config(lora=lora), 0)
    shake(model)
    calls = []

    def asked() -> bool:
        calls.append(None)
        return rank == size - 1 and len(calls) == stop_after

    try:
        report = train(
            model, tiny_examples(), SETTINGS, seed=3, trainable={"decoder", "projector"},
            checkpoints=Checkpoints(out / "kept", 1e6, asked_to_stop=asked), ranks=ranks,
        )  # fmt: skip
    except Exception as error:
        (out / f"ended.{rank}").write_text(type(error).__name__)
        raise
    (out / f"losses.{rank}.json").write_text(json.dumps([report.losses, report.grad_norms]))
    save_file(model.trained_state(), out / f"state.{rank}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    number, many, where, socket, folder, drop, stop = sys.argv[1:]
    main(int(number), int(many), int(where), int(socket), Path(folder), float(drop), int(stop))
