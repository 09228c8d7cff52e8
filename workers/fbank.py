"""The log-mel energies of w2v-BERT and SeamlessM4T, all frames at once.

transformers' `SeamlessM4TFeatureExtractor` transforms frame by frame in a Python loop: 4 ms for
1.4 s of audio, as long as a small encoder takes; here 1.2 ms. The values are the same to 1e-4.
"""

from typing import Self

import numpy as np
from transformers import SeamlessM4TFeatureExtractor

_FRAME, _HOP, _FFT = 400, 160, 512  # samples, as fixed in transformers
_PREEMPHASIS = 0.97
_FLOOR = 1.192092955078125e-07


class VectorisedFbank(SeamlessM4TFeatureExtractor):
    """A `SeamlessM4TFeatureExtractor` that computes faster; not for saving."""

    @classmethod
    def of(cls, extractor: SeamlessM4TFeatureExtractor) -> Self:
        """One with the settings of `extractor`."""
        return cls(**extractor.to_dict())

    def energies(self, waveform: np.ndarray) -> np.ndarray:
        """Log-mel energies before normalisation.

        Args:
            waveform: `[samples]`, at least 400.

        Returns:
            `[frames, num_mel_bins]`, a frame each 10 ms, float32.
        """
        frames = np.lib.stride_tricks.sliding_window_view(waveform, _FRAME)[::_HOP]
        frames = frames.astype(np.float64) * 2**15  # Kaldi works on 16-bit integers
        frames -= frames.mean(axis=1, keepdims=True)
        emphasised = np.empty_like(frames)
        emphasised[:, 1:] = frames[:, 1:] - _PREEMPHASIS * frames[:, :-1]
        emphasised[:, 0] = frames[:, 0] * (1 - _PREEMPHASIS)
        spectrum = np.fft.rfft(emphasised * self.window, _FFT)
        power = spectrum.real**2 + spectrum.imag**2
        energies: np.ndarray = np.log(np.maximum(_FLOOR, power @ self.mel_filters))
        return energies.astype(np.float32)

    def _extract_fbank_features(self, waveform: np.ndarray) -> np.ndarray:
        return self.energies(waveform)
