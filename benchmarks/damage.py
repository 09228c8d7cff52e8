"""The damage map beside removing each block and running the model.

    python benchmarks/damage.py
    python benchmarks/damage.py --preset llama-3.1-8b --dtype bfloat16 --samples 16 --tokens 256  # GPU

Same decoder, same batches, same losses (the largest difference is printed). The naive way removes
one block after another in place, runs the rest of the model with logits at the target positions
only, and takes the loss. Where that is too slow to run for all blocks, `--naive-blocks` times a
spread of them and scales up by layers run.
"""

import argparse
import os

import numpy as np
import torch
from shapes import PRESETS, batches, decoder, peak_bytes, seconds
from torch import nn
from torch.nn import functional

from workers.batches import IGNORED
from workers.maps.damage import damage_map
from workers.maps.measure import MapBatch
from workers.maps.redundancy import Measure, blocks_of
from workers.surgery.cut import pruned


@torch.no_grad()
def losses(model: nn.Module, batch: MapBatch) -> np.ndarray:
    """Mean target loss of each utterance, logits at target positions only."""
    places = batch.labels != IGNORED
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][places][None],))
    try:
        logits = model(
            inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask, use_cache=False
        ).logits[0]
    finally:
        hook.remove()
    each = functional.cross_entropy(logits.float(), batch.labels[places], reduction="none")
    return each.view(len(batch.ids), -1).double().mean(1).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="narrow")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--naive-blocks", type=int, default=0, help="0: all of them")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = PRESETS[args.preset]
    layers = shape["layers"]
    model = decoder(shape, getattr(torch, args.dtype), device)
    given = list(batches(model, args.samples, args.tokens, args.batch_size))
    blocks = [block for block in blocks_of(layers) if block[1] < layers]
    print(
        f"{args.preset}: {layers} layers of width {shape['width']}, {args.dtype}, {device}; "
        f"{args.samples} samples of {args.tokens} tokens; {len(blocks)} blocks",
        flush=True,
    )
    for batch in given:
        losses(model, batch)  # warm
    forward = seconds(lambda: [losses(model, batch) for batch in given], device)
    measured = []
    ours = seconds(lambda: measured.append(damage_map(model, given)), device)
    rows = measured[0].measures[Measure("damage", "target")].rows
    cells = {block: i for i, block in enumerate(blocks_of(layers))}
    step = max(1, len(blocks) // args.naive_blocks) if args.naive_blocks else 1
    timed = blocks[::step]
    removed: dict[tuple[int, int], np.ndarray] = {}

    def naively() -> None:
        for start, depth in timed:
            with pruned(model, range(start, start + depth)):
                removed[start, depth] = np.concatenate([losses(model, b) for b in given])

    naive = seconds(naively, device)
    share = sum(layers - d for _, d in timed) / sum(layers - d for _, d in blocks)
    unpruned = measured[0].unpruned_loss
    gap = max(np.abs(rows[:, cells[b]] + unpruned - removed[b]).max() for b in timed)
    print(f"forward pass (logits at targets)  {forward:8.2f} s")
    print(f"ours, all blocks                  {ours:8.2f} s = {ours / forward:.0f} forward passes")
    print(
        f"each block removed and run        {naive / share:8.2f} s = {naive / share / ours:.2f} x ours"
        + ("" if step == 1 else f" (from {len(timed)} of them)")
    )
    print(f"largest difference of a loss      {gap:.1e} nats")
    print(
        f"ours takes {peak_bytes(lambda: damage_map(model, given), device) / 2**20:.0f} MiB beyond the model"
    )


if __name__ == "__main__":
    main()
