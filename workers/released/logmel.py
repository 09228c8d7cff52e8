"""Granite-Speech's input features without torchaudio, which its own extractor demands.

torchaudio as it is packaged does not load beside a torch without CUDA, and one spectrogram is all
that is used of it. Values equal its to float32 rounding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BatchFeature,
    FeatureExtractionMixin,
    GraniteSpeechFeatureExtractor,
    SequenceFeatureExtractor,
)
from transformers.audio_utils import mel_filter_bank

THEIRS = "GraniteSpeechFeatureExtractor"


class LogMelExtractor(GraniteSpeechFeatureExtractor):
    """Log-mel energies, two frames joined to one; lengths are counted as in the class above."""

    def __init__(
        self,
        sampling_rate: int = 16000,
        n_fft: int = 512,
        win_length: int = 400,
        hop_length: int = 160,
        n_mels: int = 80,
        projector_window_size: int = 15,
        projector_downsample_rate: int = 5,
        padding_value: float = 0.0,
        **kwargs: Any,
    ) -> None:
        # `feature_size` of a saved folder is passed over, as in the class above.
        SequenceFeatureExtractor.__init__(
            self,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            **{**kwargs, "feature_size": n_mels},
        )
        self.n_fft, self.win_length, self.hop_length = n_fft, win_length, hop_length
        self.n_mels = n_mels
        self.melspec_kwargs = {"hop_length": hop_length}
        self.projector_window_size = projector_window_size
        self.projector_downsample_rate = projector_downsample_rate

    def __call__(
        self,
        audios: np.ndarray | Tensor | Sequence[np.ndarray],
        device: str | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Features of one waveform.

        Args:
            audios: one waveform `[samples]`, float32; alone or as a list of one.
            device: ignored; it is computed on the CPU.
        """
        del device
        waveform = torch.as_tensor(audios if isinstance(audios, np.ndarray) else audios[0])
        features = self._stacked(waveform.reshape(1, -1).float())
        sizes = self._get_num_audio_features([waveform.shape[-1]])
        mask = torch.ones(1, sizes[0], dtype=torch.bool)
        return BatchFeature(
            {"input_features": features, "audio_embed_sizes": sizes, "input_features_mask": mask}
        )

    def to_dict(self) -> dict[str, Any]:
        """What a folder holds: the class that transformers knows."""
        return {**super().to_dict(), "feature_extractor_type": THEIRS}

    def _stacked(self, waveforms: Tensor) -> Tensor:
        """`[batch, samples]` to `[batch, frames // 2, 2 * bins]`."""
        spectrum = torch.stft(
            waveforms,
            self.n_fft,
            self.hop_length,
            self.win_length,
            torch.hann_window(self.win_length),
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        energies = self._filters().T @ spectrum.abs().square()
        logarithms = energies.transpose(1, 2).clamp(min=1e-10).log10()
        # As Whisper has it: 8 decades below the loudest at most.
        loudest = logarithms.amax(dim=(1, 2), keepdim=True)
        scaled = torch.maximum(logarithms, loudest - 8.0) / 4 + 1
        scaled = scaled[:, : scaled.shape[1] // 2 * 2]
        return scaled.reshape(len(scaled), -1, 2 * scaled.shape[2])

    def _filters(self) -> Tensor:
        """`[frequencies, bins]`, the triangles torchaudio builds by default."""
        bank = mel_filter_bank(
            num_frequency_bins=self.n_fft // 2 + 1,
            num_mel_filters=self.n_mels,
            min_frequency=0.0,
            max_frequency=self.sampling_rate / 2,
            sampling_rate=self.sampling_rate,
            norm=None,
            mel_scale="htk",
        )
        return torch.from_numpy(bank).float()


def log_mel_extractor(reference: str, **options: Any) -> LogMelExtractor | None:
    """The extractor of a folder or hub id if it is Granite-Speech's; None if it is another one.

    Args:
        reference: folder or hub id.
        options: `revision` and the like.
    """
    content, _ = FeatureExtractionMixin.get_feature_extractor_dict(reference, **options)
    if content.get("feature_extractor_type") != THEIRS:
        return None
    return LogMelExtractor.from_dict(content)
