"""Projectors: encoder frames in, decoder embeddings out, several frames to an embedding.

Weights and arithmetic are float32 whatever the decoder's dtype. Frames beyond an utterance's length
never influence its embeddings, so an utterance gives the same embeddings in every batch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.config import ProjectorConfig
from workers.errors import InvalidInput


class Projector(nn.Module):
    """Base of the projectors: masks the padding, and knows how many embeddings come out.

    Args:
        stack: encoder frames per window; a last window that isn't full counts, filled with zeros.
        per_window: embeddings per window.
    """

    def __init__(self, stack: int, per_window: int = 1) -> None:
        super().__init__()
        self.stack, self.per_window = stack, per_window

    def output_length(self, frames: int) -> int:
        """How many embeddings `frames` encoder frames become."""
        return -(-frames // self.stack) * self.per_window

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Projects a padded batch.

        Args:
            frames: `[batch, time, encoder_dim]`, padded on the right with anything.
            lengths: real frames of each row, `[batch]`.

        Returns:
            Embeddings `[batch, time', decoder_dim]` in float32, zero beyond their length, and their
            lengths `[batch]`.
        """
        frames = frames.float()
        missing = -frames.shape[1] % self.stack
        frames = functional.pad(frames, (0, 0, 0, missing))
        real = torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]
        # where, not a product: padding may hold NaN.
        frames = torch.where(real[..., None], frames, frames.new_zeros(()))
        embeddings = self.project(frames, real)
        lengths = (lengths + self.stack - 1) // self.stack * self.per_window
        kept = torch.arange(embeddings.shape[1], device=frames.device) < lengths[:, None]
        return torch.where(kept[..., None], embeddings, embeddings.new_zeros(())), lengths

    def project(self, frames: Tensor, real: Tensor) -> Tensor:
        """Frames `[batch, windows*stack, encoder_dim]`, zero where `real` is false, to embeddings."""
        raise NotImplementedError


class ScaledNorm(nn.Module):
    """LayerNorm brought to the size of the decoder's own embeddings.

    The scale is fixed and kept apart from the learnt gain: a gain of .02, as large decoders would
    need, would be moved by half its value in ten steps of AdamW at 1e-3.
    """

    scale: Tensor

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `[..., dim]` to a root mean square of `scale`."""
        return self.norm(x) * self.scale


class LinearProjector(Projector):
    """Joins `stack` frames and maps them linearly."""

    def __init__(
        self, config: ProjectorConfig, encoder_dim: int, decoder_dim: int, embedding_rms: float
    ) -> None:
        super().__init__(config.stack)
        width = encoder_dim * config.stack
        self.linear = nn.Linear(width, decoder_dim)
        # Encoders end in a norm: frames of unit size come out at the size of word embeddings.
        nn.init.normal_(self.linear.weight, std=embedding_rms * width**-0.5)
        nn.init.zeros_(self.linear.bias)

    def project(self, frames: Tensor, real: Tensor) -> Tensor:  # noqa: ARG002
        """Joins and maps; zeros beyond the end need no mask."""
        return self.linear(_joined(frames, self.stack))


class MlpProjector(Projector):
    """Joins `stack` frames; one hidden layer; ends at the size of the decoder's embeddings."""

    def __init__(
        self, config: ProjectorConfig, encoder_dim: int, decoder_dim: int, embedding_rms: float
    ) -> None:
        super().__init__(config.stack)
        self.layers = nn.Sequential(
            nn.Linear(encoder_dim * config.stack, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, decoder_dim),
            ScaledNorm(decoder_dim, embedding_rms),
        )

    def project(self, frames: Tensor, real: Tensor) -> Tensor:  # noqa: ARG002
        """Joins and maps; zeros beyond the end need no mask."""
        return self.layers(_joined(frames, self.stack))


class ConvProjector(Projector):
    """A convolution over neighbouring frames, then one that strides by `stack`."""

    def __init__(
        self, config: ProjectorConfig, encoder_dim: int, decoder_dim: int, embedding_rms: float
    ) -> None:
        super().__init__(config.stack)
        self.local = nn.Conv1d(encoder_dim, config.hidden, kernel_size=3, padding=1)
        self.strided = nn.Conv1d(config.hidden, config.hidden, config.stack, stride=config.stack)
        self.out = nn.Linear(config.hidden, decoder_dim)
        self.norm = ScaledNorm(decoder_dim, embedding_rms)

    def project(self, frames: Tensor, real: Tensor) -> Tensor:  # noqa: ARG002
        """Convolves twice; beyond the end both see zeros, in a batch as alone."""
        x = functional.gelu(self.local(frames.transpose(1, 2)))
        x = functional.gelu(self.strided(x)).transpose(1, 2)
        return self.norm(self.out(x))


class QFormerProjector(Projector):
    """Learnt queries attend to each window of `stack` frames (window-level Q-Former)."""

    def __init__(
        self, config: ProjectorConfig, encoder_dim: int, decoder_dim: int, embedding_rms: float
    ) -> None:
        super().__init__(config.stack, config.queries)
        if config.hidden % config.heads:
            raise InvalidInput(
                f"a width of {config.hidden} cannot be shared among {config.heads} heads",
                "projector.heads",
                "choose heads that divide projector.hidden",
            )
        self.heads = config.heads
        hidden = config.hidden
        self.queries = nn.Parameter(torch.randn(config.queries, hidden) * hidden**-0.5)
        self.positions = nn.Parameter(torch.randn(config.stack, hidden) * hidden**-0.5)
        self.inward = nn.Linear(encoder_dim, hidden)
        self.norm_frames = nn.LayerNorm(hidden)
        self.norm_queries = nn.LayerNorm(hidden)
        self.query = nn.Linear(hidden, hidden)
        self.key_value = nn.Linear(hidden, 2 * hidden)
        self.attended = nn.Linear(hidden, hidden)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)
        )  # fmt: skip
        self.out = nn.Linear(hidden, decoder_dim)
        self.norm = ScaledNorm(decoder_dim, embedding_rms)

    def project(self, frames: Tensor, real: Tensor) -> Tensor:
        """Each window on its own; frames beyond the end are not attended to."""
        batch, time, _ = frames.shape
        windows = batch * time // self.stack
        mask = real.reshape(windows, 1, 1, self.stack)
        # What attention makes of an empty window (NaN, in some kernels) would reach the gradients.
        mask = mask | ~mask.any(-1, keepdim=True)
        keys = self.inward(frames).reshape(windows, self.stack, -1)
        keys, values = self.key_value(self.norm_frames(keys + self.positions)).chunk(2, dim=-1)
        query = self.query(self.norm_queries(self.queries)).expand(windows, -1, -1)
        x = functional.scaled_dot_product_attention(
            self._split(query), self._split(keys), self._split(values), attn_mask=mask
        )
        x = self.queries + self.attended(x.transpose(1, 2).flatten(2))
        x = x + self.feed_forward(x)
        return self.norm(self.out(x)).reshape(batch, time // self.stack * self.per_window, -1)

    def _split(self, x: Tensor) -> Tensor:
        """`[windows, n, hidden]` to `[windows, heads, n, hidden / heads]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


_KINDS: dict[str, type[LinearProjector | MlpProjector | ConvProjector | QFormerProjector]] = {
    "linear": LinearProjector,
    "mlp": MlpProjector,
    "conv": ConvProjector,
    "qformer": QFormerProjector,
}


def build_projector(
    config: ProjectorConfig, encoder_dim: int, decoder_dim: int, embedding_rms: float
) -> Projector:
    """Makes an untrained projector in float32, from torch's current random state.

    Args:
        config: kind and sizes.
        encoder_dim: width of the encoder's frames.
        decoder_dim: width of the decoder's embeddings.
        embedding_rms: root mean square of the decoder's input embeddings, the size of the output.

    Raises:
        InvalidInput: sizes that do not fit together.
    """
    return _KINDS[config.kind](config, encoder_dim, decoder_dim, embedding_rms)


def _joined(frames: Tensor, stack: int) -> Tensor:
    """`[batch, windows*stack, dim]` to `[batch, windows, stack*dim]`."""
    batch, time, dim = frames.shape
    return frames.reshape(batch, time // stack, stack * dim)
