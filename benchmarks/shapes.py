"""What the benchmarks of maps share: decoders of real shapes with random weights, batches, gauges."""

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from workers.batches import IGNORED
from workers.maps.measure import MapBatch

PRESETS = {
    "narrow": {"layers": 32, "width": 256, "ff": 704, "heads": 8, "kv": 4, "vocabulary": 4096},
    "small": {"layers": 32, "width": 1024, "ff": 2816, "heads": 16, "kv": 8, "vocabulary": 32000},
    "llama-3.2-1b": {
        "layers": 16, "width": 2048, "ff": 8192, "heads": 32, "kv": 8, "vocabulary": 128256,
    },
    "llama-3.1-8b": {
        "layers": 32, "width": 4096, "ff": 14336, "heads": 32, "kv": 8, "vocabulary": 128256,
    },
}  # fmt: skip


def decoder(shape: dict[str, int], dtype: torch.dtype, device: str) -> torch.nn.Module:
    config = LlamaConfig(
        num_hidden_layers=shape["layers"], hidden_size=shape["width"],
        intermediate_size=shape["ff"], num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"], vocab_size=shape["vocabulary"],
        max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def batches(model: torch.nn.Module, samples: int, tokens: int, size: int) -> Iterator[MapBatch]:
    """Batches without padding; a tenth prompt, six tenths audio, the rest target."""
    width, device = model.config.hidden_size, next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    for start in range(0, samples, size):
        rows = min(size, samples - start)
        generator = torch.Generator(device).manual_seed(start)
        embeds = 0.02 * torch.randn(rows, tokens, width, generator=generator, device=device)
        place = torch.arange(tokens, device=device).expand(rows, tokens)
        first, second = tokens // 10, tokens * 7 // 10
        pools = {
            "last": place == second - 1,
            "prompt": place < first,
            "audio": (place >= first) & (place < second),
            "target": place >= second,
            "all": place >= 0,
        }
        mask = torch.ones(rows, tokens, dtype=torch.long, device=device)
        names = [f"u{start + row:05}" for row in range(rows)]
        ids = torch.randint(
            model.config.vocab_size, (rows, tokens), generator=generator, device=device
        )
        labels = torch.where((place >= second - 1) & (place < tokens - 1), ids, IGNORED)
        yield MapBatch(names, embeds.to(dtype), mask, pools, labels)


def seconds(work: Callable[[], object], device: str) -> float:
    """CPU seconds of one thread (others on the machine disturb them less), or a GPU's wall clock."""
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Memory that `work` takes beyond what is there: on a CPU in a forked process of its own."""
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).malloc_trim(0)
        before = _resident()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        work()
        os.write(writer, str(_resident("VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(reader, 64))


def _resident(field: str = "VmRSS") -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024
