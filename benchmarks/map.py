"""A redundancy map beside a forward pass, and beside a full run for every depth.

    python benchmarks/map.py
    python benchmarks/map.py --preset llama-3.1-8b --dtype bfloat16 --samples 128 --tokens 512  # GPU

Same decoder (random weights: speed and memory are the same), same batches. Prints seconds (the
median of several rounds, variants in turn), the memory each takes beyond the model, and ratios:

- headless: the layers alone, which is the least any map can cost;
- with head: the plain forward pass of the causal LM;
- ours: all blocks, five token pools, by the criteria named;
- per depth: what tools do that ask for all hidden states and score one depth a run (angular, all
  tokens). Timed for one depth, times the number of depths.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterator

import torch
from shapes import PRESETS, batches, decoder, peak_bytes, seconds

from workers.config import CHEAP_CRITERIA, POOLS
from workers.maps.measure import MapBatch, redundancy_map, run_body
from workers.surgery.decoder_parts import decoder_parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = PRESETS[args.preset]
    model = decoder(shape, getattr(torch, args.dtype), device)
    parts = decoder_parts(model)
    print(
        f"{args.preset}: {shape['layers']} layers of width {shape['width']}, {args.dtype}, {device}; "
        f"{args.samples} samples of {args.tokens} tokens, {args.batch_size} a batch; torch "
        f"{torch.__version__}, {torch.get_num_threads()} thread(s)",
        flush=True,
    )

    def each(samples: int = args.samples) -> Iterator[MapBatch]:
        return batches(model, samples, args.tokens, args.batch_size)

    def headless() -> None:
        for batch in each():
            run_body(parts, batch)

    @torch.no_grad()
    def with_head() -> None:
        for batch in each():
            model(
                inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask,
                use_cache=False,
            )  # fmt: skip

    def ours(*criteria: str, samples: int = args.samples) -> Callable[[], None]:
        return lambda: (redundancy_map(model, each(samples), POOLS, criteria=criteria), None)[1]

    @torch.no_grad()
    def one_depth(depth: int = shape["layers"] // 3) -> None:
        sums = torch.zeros(shape["layers"] + 1 - depth)
        for batch in each():
            states = model(
                inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask,
                use_cache=False, output_hidden_states=True,
            ).hidden_states  # fmt: skip
            for start in range(len(states) - depth):
                cosine = torch.cosine_similarity(
                    states[start].float(), states[start + depth].float(), -1
                )
                sums[start] += cosine.clamp(-1, 1).arccos().mean().cpu()

    variants = {
        "headless forward": headless,
        "forward with head": with_head,
        "ours, angular": ours("angular"),
        "ours, three criteria": ours(*CHEAP_CRITERIA),
        "one depth, all states kept": one_depth,
    }
    spent: dict[str, list[float]] = {name: [] for name in variants}
    headless()  # warm
    for _ in range(args.rounds):
        for name, work in variants.items():
            spent[name].append(seconds(work, device))
    least = statistics.median(spent["headless forward"])
    for name, work in variants.items():
        median = statistics.median(spent[name])
        ratios = [a / b for a, b in zip(spent[name], spent["headless forward"], strict=True)]
        print(
            f"{name:28} {median:8.2f} s  {statistics.median(ratios):6.3f} x headless  "
            f"{peak_bytes(work, device) / 2**20:8.0f} MiB beyond the model",
            flush=True,
        )
    depths = shape["layers"] - 1
    naive = depths * statistics.median(spent["one depth, all states kept"])
    mine = statistics.median(spent["ours, angular"])
    print(f"all {depths} depths, one run each {naive:8.1f} s = {naive / mine:.1f} x ours")
    for times in (1, 4):
        flat = peak_bytes(ours("angular", samples=times * args.samples), device)
        print(
            f"ours with {times * args.samples:4} samples       {flat / 2**20:8.0f} MiB beyond the model"
        )
    print(f"headless forward: {args.samples * args.tokens / least:.0f} tokens/s")


if __name__ == "__main__":
    main()
