"""The ranks of one stage: several processes that do one training step, or hold one decoder, together.

Every rank runs the same stage function. A batch is shared out, gradients are added up, and the frozen
layers of the decoder are spread over the ranks (FSDP2), each gathered for the moment it computes.
Adapters and projector are small, so each rank has them whole: what rank 0 saves is all there is.
"""

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.surgery.decoder_parts import decoder_layers

T = TypeVar("T")
TIMEOUT = datetime.timedelta(hours=2)
"""A rank that waits longer for the others gives up; the driver ends them all long before."""


class PeerLost(Exception):
    """Another rank failed: what happened is its to tell."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its stage."""

    rank: int = 0
    size: int = 1

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of what all ranks do together."""
        return list(items[self.rank :: self.size])

    def agree(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every rank the parameters of rank 0."""
        for parameter in parameters if self.size > 1 else ():
            with torch.no_grad():
                _together(partial(dist.broadcast, parameter.data, 0))

    def add_up(self, parameters: Sequence[nn.Parameter], figures: Sequence[float]) -> list[float]:
        """Sum gradients (in place) and figures over the ranks.

        Args:
            parameters: those without a gradient here count as zero.
            figures: plain numbers, summed in float64.

        Returns:
            The sums of the figures.
        """
        if self.size == 1:
            return list(figures)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for dtype in {parameter.dtype for parameter in parameters}:
            gradients = [p.grad for p in parameters if p.dtype == dtype and p.grad is not None]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            _together(partial(dist.all_reduce, flat))
            for gradient, part in zip(
                gradients, flat.split([g.numel() for g in gradients]), strict=True
            ):
                gradient.copy_(part.view_as(gradient))
        sums = torch.tensor(list(figures), dtype=torch.float64)
        _together(partial(dist.all_reduce, sums))
        return sums.tolist()

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The same tensor (on the CPU) of every rank, in their order."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        _together(partial(dist.all_gather, found, tensor))
        return found

    def spread_layers(self, decoder: PreTrainedModel, device: str) -> None:
        """Bring a decoder to the device with each layer's weights spread over the ranks.

        Layers are gathered one at a time, so that no rank's device ever holds the whole decoder.
        What is added to them later (LoRA) is not spread.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        mesh = init_device_mesh(device, (self.size,))
        for layer in decoder_layers(decoder):
            layer.to(device)
            fully_shard(layer, mesh=mesh)
        rest = [p for p in decoder.parameters() if not isinstance(p, DTensor)]
        for parameter in (*rest, *decoder.buffers()):
            parameter.data = parameter.data.to(device)


ALONE = Ranks()
"""A stage of one process."""


def join(rank: int, size: int, meeting: tuple[str, int, int] | None, device: str) -> Ranks:
    """Become one of the ranks of a stage; the process group lasts as long as the process.

    Args:
        rank: of this process.
        size: how many there are.
        meeting: host and port at which rank 0 listens, and there the open socket's number (-1 for
            the others); None when there is one rank.
        device: `cpu` or `cuda`.
    """
    if size == 1 or meeting is None:
        return ALONE
    if not dist.is_initialized():
        host, port, listener = meeting
        if host.startswith("127."):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            size,
            is_master=rank == 0,
            timeout=datetime.timedelta(minutes=5),
            master_listen_fd=listener if rank == 0 else None,
        )
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        _together(
            partial(
                dist.init_process_group,
                backend,
                store=store,
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
            )
        )
    return Ranks(rank, size)


def _together(call: Callable[[], object]) -> None:
    try:
        call()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise PeerLost(str(error).strip().partition("\n")[0]) from error
