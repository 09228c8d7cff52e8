"""A released SpeechLLM's own projector, on the terms of ours: padding in, lengths out."""

import torch
from torch import Tensor, nn

from workers.config import OwnProjectorConfig
from workers.errors import InvalidInput
from workers.projectors import Projector
from workers.released.parts import configuration, released_parts, skeleton

LONGEST_WINDOW = 4096
"""Frames; a module whose output does not grow within it is not taken for a windowed one."""


class OwnProjector(Projector):
    """Their module, which works frame by frame or on windows of frames."""

    def __init__(self, module: nn.Module, encoder_dim: int) -> None:
        super().__init__(*_windows(module.eval(), encoder_dim))
        self.module = module

    def project(self, frames: Tensor, real: Tensor) -> Tensor:  # noqa: ARG002
        """Runs their module: alone, too, it sees zeros in the rest of the last window."""
        projected: Tensor = self.module(frames)
        return projected


def build_own_projector(config: OwnProjectorConfig, encoder_dim: int) -> OwnProjector:
    """Makes a released model's projector in float32, with weights that mean nothing yet.

    Args:
        config: names the model.
        encoder_dim: width of the frames it reads.

    Raises:
        InvalidInput: transformers does not know the model, or the frames do not fit.
    """
    kind = type(released_parts(skeleton(config.model)).projector)
    return OwnProjector(kind(configuration(config.model)).float(), encoder_dim)


@torch.no_grad()
def _windows(module: nn.Module, encoder_dim: int) -> tuple[int, int]:
    """Frames per window and embeddings per window, from how the output's length grows."""
    device = next(module.parameters()).device
    dtype = next(module.parameters()).dtype

    def count(frames: int) -> int:
        return int(module(torch.zeros(1, frames, encoder_dim, device=device, dtype=dtype)).shape[1])

    try:
        per_window = count(1)
        window = 1
        while window < LONGEST_WINDOW and count(window + 1) == per_window:
            window += 1
        regular = count(2 * window) == 2 * per_window and count(2 * window + 1) == 3 * per_window
    except RuntimeError as error:
        raise InvalidInput(
            f"the model's projector does not take frames of width {encoder_dim}: {error}",
            "speechllm",
        ) from error
    if not regular:
        raise InvalidInput(
            "the model's projector works neither frame by frame nor on windows of equal length",
            "speechllm",
            "name another model",
        )
    return window, per_window
