"""`layersweep prune` file by file beside the same cut in memory: peak memory and seconds.

    python benchmarks/cut.py [--gigabytes 2] [--layers 16] [--shard-megabytes 500] [--folder DIR]

Writes a random sharded Llama-shaped model (bfloat16), shard by shard; then cuts a quarter of its
layers in fresh processes and compares what they wrote. Peak memory is the kernel's (`ru_maxrss`): it
counts pages of mapped files as well. The floor is a process that imports the same and does nothing.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADS, HEAD_SIZE = 16, 128
FLOOR = "import orchestrator.cli, workers.surgery.prune"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shard-megabytes", type=float, default=500.0)
    parser.add_argument("--streamed-only", action="store_true", help="for models beyond memory")
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        return measure(Path(scratch), options)


def measure(scratch: Path, options: argparse.Namespace) -> int:
    source = scratch / "model"
    # In a process of its own: what this one once held would count as its children's peak.
    writer = multiprocessing.get_context("spawn").Process(
        target=write_model,
        args=(source, options.layers, options.gigabytes * 1e9, options.shard_megabytes),
    )
    writer.start()
    writer.join()
    index = json.loads((source / "model.safetensors.index.json").read_text())
    size = index["metadata"]["total_size"]
    shards = len(list(source.glob("*.safetensors")))
    depth = max(1, options.layers // 4)
    print(f"model: {size / 1e9:.2f} GB in {shards} files, {options.layers} layers; cut: {depth}")
    block = ["--start", str(options.layers // 2), "--depth", str(depth), "--json"]
    ways = {
        "floor (imports)": ["-c", FLOOR],
        "streamed": ["--streamed"],
        "in memory": ["--in-memory", "--check", "stored"],
        "in memory, full check": ["--in-memory", "--check", "full"],
    }
    if options.streamed_only:
        ways = dict(list(ways.items())[:2])
    figures: dict[str, tuple[float, float]] = {}
    print(f"\n{'':24}{'peak MB':>9}{'seconds':>9}")
    for name, words in ways.items():
        out = scratch / name.split(" (")[0].replace(" ", "-")
        if not name.startswith("floor"):
            words = ["-m", "orchestrator.cli", "prune", str(source), *block, *words]
            words += ["--out", str(out)]
        peak, seconds = run([sys.executable, *words])
        figures[name] = (peak, seconds)
        print(f"{name:24}{peak / 1e6:9.0f}{seconds:9.1f}", flush=True)
        if name.endswith("full check"):
            shutil.rmtree(out)
    floor = figures["floor (imports)"][0]
    if options.streamed_only:
        print(f"\nstreamed: {(figures['streamed'][0] - floor) / 1e6:.0f} MB above the floor")
        return 0
    same_tensors(scratch / "streamed", scratch / "in-memory")
    print("\nboth ways wrote the same tensors")
    streamed, loaded = figures["streamed"][0], figures["in memory"][0]
    print(
        f"peak memory: streamed {(streamed - floor) / 1e6:.0f} MB above the floor, in memory "
        f"{(loaded - floor) / 1e6:.0f} MB; {streamed / loaded:.2f} x in all, "
        f"{(streamed - floor) / (loaded - floor):.3f} x above the floor; "
        f"time {figures['streamed'][1] / figures['in memory'][1]:.2f} x"
    )
    return 0


def run(words: list[str]) -> tuple[float, float]:
    """Peak bytes and seconds of a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(log.read().decode())
    return usage.ru_maxrss * 1024, time.monotonic() - started


def write_model(folder: Path, layers: int, size: float, shard_megabytes: float) -> None:
    """A Llama with about `size` bytes of weights; never more than one shard in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    width, vocabulary = HEADS * HEAD_SIZE, 32000
    # Two bytes a number: embeddings and head, four attention matrices, three of the MLP.
    rest = size / 2 - 2 * vocabulary * width - layers * 4 * width * width
    inner = max(64, round(rest / layers / 3 / width))
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    filled = total = 0
    for number, (name, shape) in enumerate(shapes.items(), 1):
        shard[name] = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        filled += shard[name].nbytes
        total += shard[name].nbytes
        if filled >= shard_megabytes * 1e6 or number == len(shapes):
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard, filled = {}, 0
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def same_tensors(one: Path, other: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from workers.surgery.model_files import weight_files
    from workers.surgery.shards import digest_of, read_headers

    found = [
        {t.name: (t.dtype, t.shape, digest_of(t)) for t in read_headers(weight_files(folder))}
        for folder in (one, other)
    ]
    if found[0] != found[1]:
        sys.exit("the two ways wrote different tensors")


if __name__ == "__main__":
    sys.exit(main())
