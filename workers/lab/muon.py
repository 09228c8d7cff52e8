"""Muon for the lab's decoders: momentum, orthogonalised (Jordan et al. 2024, "Muon").

AdamW needs about 200 steps before a small decoder starts to copy, Muon about 70, which is what makes
a 12-layer decoder affordable on one core. `torch.optim.Muon` works one matrix at a time and in
bfloat16, which a processor without bfloat16 units does five times slower than float32; here all
matrices of one shape go through one batched float32 iteration.
"""

import torch
from torch import Tensor, nn

# Coefficients of the quintic Newton–Schulz iteration, from the same source.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalised(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices to `[count, rows ≤ columns]`."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return x


class Muon:
    """Steps the matrices that have a gradient; the rest keep their momentum."""

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self._averages = {matrix: torch.zeros_like(matrix) for matrix in matrices}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update with learning rate `rate` (of a matrix with unit singular values)."""
        groups: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        for matrix, average in self._averages.items():
            if matrix.grad is None:
                continue
            average.lerp_(matrix.grad, 1 - self.momentum)
            update = matrix.grad.lerp(average, self.momentum)  # Nesterov
            wide = update if update.shape[0] <= update.shape[1] else update.mT
            groups.setdefault((wide.shape[0], wide.shape[1]), []).append((matrix, wide))
        for members in groups.values():
            updates = orthogonalised(torch.stack([wide for _, wide in members]))
            for (matrix, _), update in zip(members, updates, strict=True):
                rows, columns = matrix.shape
                scale = max(1.0, rows / columns) ** 0.5
                matrix.add_(update if rows <= columns else update.mT, alpha=-rate * scale)
