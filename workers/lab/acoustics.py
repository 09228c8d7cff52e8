"""The architectures of the lab's encoders, and the log-mel energies they are trained on.

Energies and network are apart, since noise is added in between. Both give 25 frames a second, from
clips of equal length, so that no mask is needed.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from workers.encoder import positions_cut
from workers.fbank import VectorisedFbank
from workers.lab.shapes import FRAME_RATE

RATE = 16_000
"""Hz."""
NOISY = 0.4
"""Share of the clips that get a noise floor."""


class Whisper:
    """Log-mel each 20 ms, two convolutions, a Transformer with a table of positions."""

    nats = 4 * math.log(10)
    """One unit of Whisper's log-mel in nats."""
    stack = 2
    """Energy frames an output frame covers."""

    def __init__(self, width: int, layers: int, feed_forward: int) -> None:
        self.extractor = WhisperFeatureExtractor(hop_length=320, chunk_length=10)
        config = WhisperConfig(
            d_model=width,
            encoder_layers=layers,
            encoder_attention_heads=width // 32,
            encoder_ffn_dim=feed_forward,
            max_source_positions=10 * FRAME_RATE,
            decoder_layers=0,
            decoder_attention_heads=width // 32,
            decoder_ffn_dim=8,
            max_target_positions=8,
            vocab_size=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=[],
            begin_suppress_tokens=[],
        )
        self.model = WhisperModel(config)
        self.encoder = self.model.get_encoder()
        for conv in (self.encoder.conv1, self.encoder.conv2):
            # With the default 0.02 the positions drown the sound: 39 % WER after an epoch, not 26.
            nn.init.kaiming_normal_(conv.weight)

    def energies(self, waveform: np.ndarray) -> Tensor:
        """`[samples]` to `[time, bins]`, `stack` of them for each frame."""
        unit = RATE // FRAME_RATE
        padded = np.pad(waveform, (0, -len(waveform) % unit))
        options = {"sampling_rate": RATE, "padding": False, "truncation": False}
        mel = self.extractor(padded, return_tensors="np", **options)["input_features"]
        return torch.from_numpy(mel[0].T)

    def __call__(self, energies: Tensor) -> Tensor:
        """`[batch, time, bins]` to frames `[batch, time / stack, width]`."""
        mel = energies.mT
        with positions_cut(self.encoder, mel.shape[2]):
            frames: Tensor = self.encoder(mel).last_hidden_state
        return frames


class Conformer:
    """Kaldi log-mel each 10 ms, four joined to a frame, Conformer layers with relative positions."""

    nats = 1.0
    bins, stack = 40, 4

    def __init__(self, width: int, layers: int, feed_forward: int) -> None:
        self.extractor = SeamlessM4TFeatureExtractor(
            feature_size=self.bins, num_mel_bins=self.bins, stride=self.stack
        )
        self._fbank = VectorisedFbank.of(self.extractor)
        self.model = self.encoder = Wav2Vec2BertModel(
            Wav2Vec2BertConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=width // 32,
                intermediate_size=feed_forward,
                feature_projection_input_dim=self.bins * self.stack,
                conv_depthwise_kernel_size=15,
                left_max_position_embeddings=16,
                right_max_position_embeddings=8,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                activation_dropout=0.0,
                feat_proj_dropout=0.0,
                conformer_conv_dropout=0.0,
                layerdrop=0.0,
                apply_spec_augment=False,
                mask_time_prob=0.0,
            )
        )

    def energies(self, waveform: np.ndarray) -> Tensor:
        """`[samples]` to `[time, bins]`, `stack` of them for each frame."""
        energies = self._fbank.energies(waveform)
        return torch.from_numpy(energies[: len(energies) // self.stack * self.stack])

    def __call__(self, energies: Tensor) -> Tensor:
        """`[batch, time, bins]` to frames `[batch, time / stack, width]`."""
        mean, variance = energies.mean(1, keepdim=True), energies.var(1, keepdim=True)
        normal = (energies - mean) / (variance + 1e-7).sqrt()
        stacked = normal.reshape(len(energies), -1, self.bins * self.stack)
        frames: Tensor = self.encoder(stacked).last_hidden_state
        return frames


def with_noise(energies: Tensor, nats: float, generator: torch.Generator) -> Tensor:
    """Add a noise floor to some clips: of any level and colour, a few dB of flutter.

    Args:
        energies: log-mel energies `[batch, time, bins]`.
        nats: one of their units in nats.
        generator: of the noise.
    """
    batch, time, bins = energies.shape
    level, slope, chosen = torch.rand(3, batch, 1, 1, generator=generator)
    flutter = torch.randn(batch, time, bins, generator=generator)
    # 32 to 80 dB below the loudest bin, which is far above the mean; up to 22 dB lower at the top.
    level = energies.amax(dim=(1, 2), keepdim=True) * nats - (7.4 + 11 * level)
    colour = (7.4 * slope - 5.2) * torch.linspace(-0.5, 0.5, bins)
    noisy = torch.logaddexp(energies * nats, level + colour + 0.55 * flutter) / nats
    return torch.where(chosen < NOISY, noisy, energies)
