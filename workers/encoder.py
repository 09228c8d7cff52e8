"""Any of transformers' speech encoders, frozen, with one promise: an utterance's frames are its own.

They have the audio's real length (no 30 s of silence), and they do not depend on which other
utterances are in the batch. How inputs are prepared for that differs by family:

- mel (Whisper, Qwen2-Audio, Voxtral): no attention mask, and a position table that demands its full
  length. Audio is padded to a bucket that depends on its own length alone, equal ones are batched,
  the table is cut for the call.
- wave (wav2vec 2, HuBERT, WavLM, …): masked where the architecture's mask is exact, else buckets.
- frames (w2v-BERT, …): masked where exact, else only inputs of equal length are batched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModel, SeamlessM4TFeatureExtractor

from workers.errors import InvalidInput, refuse_missing
from workers.fbank import VectorisedFbank

EXACT_MASK = {"hubert", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-bert", "wavlm"}
"""Model types whose output under an attention mask equals the utterance's output alone. Others let
padding leak (Conformer's convolutions, Data2Vec's stacked position convolutions), as do group norms
over time and adapters."""
BATCH_SECONDS = 160.0
"""Padded audio in one forward pass."""
SHORTEST = 0.1
"""Seconds; shorter audio is padded to this with silence, as convolutions need some frames."""
BUCKETS = 32
"""Audio is padded by at most 1/32 of its length (or one frame) to meet others of equal length."""

Family = Literal["mel", "wave", "frames"]


@dataclass(frozen=True)
class _Prepared:
    """One utterance as the encoder takes it."""

    values: np.ndarray
    """Padded waveform (mel), normalised waveform (wave) or `[frames, bins]` (frames)."""
    frames: int | None
    """Output frames that are the utterance's own; None: all of them."""


class SpeechEncoder:
    """A frozen speech encoder in evaluation mode."""

    def __init__(self, model: nn.Module, extractor: Any) -> None:
        """Wrap a loaded model.

        Args:
            model: a speech encoder, or a model that has one (Whisper, Qwen2-Audio).
            extractor: its feature extractor.
        """
        self._saved, self.model = _encoder_of(model)
        self.model.eval().requires_grad_(False)
        self.extractor = extractor
        # The vectorised one computes; the original is what is saved.
        plain = type(extractor) is SeamlessM4TFeatureExtractor
        self._extract = VectorisedFbank.of(extractor) if plain else extractor
        self.sampling_rate = int(extractor.sampling_rate)
        self._family = _family_of(self.model, extractor)
        # Samples an output frame covers (mel), or the grain of bucket lengths (20 ms).
        self._unit, self._longest = self.sampling_rate // 50, 0
        if self._family == "mel":
            pooled = 2 if hasattr(self.model, "avg_pooler") else 1
            strides = self.model.conv1.stride[0] * self.model.conv2.stride[0]
            self._unit = extractor.hop_length * strides * pooled
            self._longest = self.model.embed_positions.num_embeddings // pooled
        config = self.model.config
        self._masked = (
            config.model_type in EXACT_MASK
            and getattr(config, "feat_extract_norm", "layer") == "layer"
            and not getattr(config, "add_adapter", False)
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
    ) -> Self:
        """Open a folder or a hub repository.

        Raises:
            InvalidInput: there is no speech encoder in it, or weights of the encoder are missing.
        """
        where = str(path_or_id)
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            extractor = AutoFeatureExtractor.from_pretrained(where, **options)
            model, report = AutoModel.from_pretrained(
                where, dtype=dtype, output_loading_info=True, **options
            )
        except (OSError, ValueError, KeyError) as error:
            raise InvalidInput(
                f"no speech encoder can be opened: {str(error).splitlines()[0]}",
                where,
                "it needs config.json, preprocessor_config.json and model.safetensors",
            ) from None
        # The masking vector is used in pre-training only; decoders are dropped.
        refuse_missing(
            (
                key
                for key in report["missing_keys"]
                if "masked_spec_embed" not in key and not key.startswith("decoder.")
            ),
            where,
        )
        if not hasattr(extractor, "sampling_rate"):
            raise InvalidInput("its feature extractor is not for audio", where)
        return cls(model.to(device), extractor)

    def save_pretrained(self, folder: Path) -> None:
        """Write a plain Hugging Face folder: the encoder (Whisper's decoder emptied)."""
        self._saved.save_pretrained(folder)
        self.extractor.save_pretrained(folder)

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the encoder computes in."""
        return next(self.model.parameters()).dtype

    @cached_property
    def dim(self) -> int:
        """Width of the frames, seen by encoding a second of silence."""
        return self.encode([np.zeros(self.sampling_rate, np.float32)])[0].shape[1]

    @cached_property
    def frame_rate(self) -> float:
        """Frames a second (measured over two seconds, so within half a frame)."""
        short, long = (np.zeros(s * self.sampling_rate, np.float32) for s in (1, 3))
        first, second = self.encode([short, long])
        return (len(second) - len(first)) / 2

    @property
    def limit(self) -> float | None:
        """Longest audio in seconds; None: no limit."""
        return self._longest * self._unit / self.sampling_rate if self._longest else None

    @torch.no_grad()
    def encode(self, waveforms: Sequence[np.ndarray], ids: Sequence[str] = ()) -> list[Tensor]:
        """Encode utterances; each result is independent of the others.

        Args:
            waveforms: each `[samples]`, float32, at `sampling_rate`.
            ids: names for error messages.

        Returns:
            For each, `[frames, dim]` in float32 on the encoder's device.

        Raises:
            InvalidInput: empty audio, more than one channel, or audio beyond `limit`.
        """
        prepared = [
            self._prepare(waveform, ids[i] if ids else f"number {i}")
            for i, waveform in enumerate(waveforms)
        ]
        results: list[Tensor | None] = [None] * len(prepared)
        for batch in self._batches(prepared):
            frames = self._forward([prepared[i].values for i in batch]).float()
            for row, i in enumerate(batch):
                results[i] = frames[row, : prepared[i].frames].clone()
        return [frames for frames in results if frames is not None]

    def _prepare(self, waveform: np.ndarray, name: str) -> _Prepared:
        if waveform.ndim != 1 or len(waveform) == 0:
            raise InvalidInput(
                f"utterance {name!r} is not a waveform of one channel: shape {waveform.shape}"
            )
        limit, seconds = self.limit, len(waveform) / self.sampling_rate
        if limit is not None and seconds > limit:
            raise InvalidInput(
                f"utterance {name!r} has {seconds:.1f} s, the encoder takes at most {limit:g} s",
                remedy="split or drop longer audio, or choose another encoder",
            )
        waveform = _padded(waveform, round(SHORTEST * self.sampling_rate))
        if self._family == "mel":
            frames = -(-len(waveform) // self._unit)
            bucket = min(_bucket(frames), self._longest)
            return _Prepared(_padded(waveform, bucket * self._unit), frames)
        extracted = self._extract(waveform, sampling_rate=self.sampling_rate)
        values = np.asarray(extracted[self.extractor.model_input_names[0]][0], np.float32)
        if self._family == "frames" and "attention_mask" in extracted:
            values = values[np.asarray(extracted["attention_mask"][0]) > 0]
        count = getattr(self.model, "_get_feat_extract_output_lengths", None)
        own = int(count(torch.tensor(len(values)))) if count else None
        if self._family == "wave" and not self._masked:
            values = _padded(values, _bucket(-(-len(values) // self._unit)) * self._unit)
        return _Prepared(values, own)

    def _batches(self, prepared: Sequence[_Prepared]) -> Iterator[list[int]]:
        """Indexes to run together: similar lengths under a mask, equal lengths without one."""
        order = sorted(range(len(prepared)), key=lambda i: len(prepared[i].values))
        per_second = self.sampling_rate / (self._unit if self._family == "frames" else 1)
        batch: list[int] = []
        for i in order:
            length = len(prepared[i].values)
            full = (len(batch) + 1) * length > BATCH_SECONDS * per_second
            unequal = batch and length != len(prepared[batch[0]].values)
            if batch and (full or (unequal and not self._masked)):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _forward(self, values: Sequence[np.ndarray]) -> Tensor:
        """`[batch, frames, dim]` of inputs that are equal in length or maskable."""
        if self._family == "mel":
            return self._forward_mel(values)
        lengths = torch.tensor([len(v) for v in values])
        inputs = nn.utils.rnn.pad_sequence([torch.from_numpy(v) for v in values], batch_first=True)
        options = {}
        if self._masked:
            mask = torch.arange(inputs.shape[1])[None] < lengths[:, None]
            options["attention_mask"] = mask.long().to(self.device)
        inputs = inputs.to(device=self.device, dtype=self.dtype)
        frames: Tensor = self.model(inputs, **options).last_hidden_state
        return frames

    def _forward_mel(self, waveforms: Sequence[np.ndarray]) -> Tensor:
        mel = self.extractor(
            list(waveforms),
            sampling_rate=self.sampling_rate,
            padding="longest",
            truncation=False,
            return_tensors="pt",
        )["input_features"].to(device=self.device, dtype=self.dtype)
        with positions_cut(self.model, mel.shape[2]):
            frames: Tensor = self.model(mel).last_hidden_state
        return frames


def _encoder_of(model: Any) -> tuple[Any, Any]:
    """What to save, and the speech encoder in it."""
    if hasattr(model, "speech_encoder"):  # SeamlessM4T; it cannot be opened on its own
        return model, model.speech_encoder
    tower = model.get_encoder(modality="audio")
    if tower is not model:
        return tower, tower
    if not model.config.is_encoder_decoder:
        return model, model
    if model.config.model_type == "whisper":
        model.decoder.layers = nn.ModuleList()
        model.config.decoder_layers = 0
    return model, model.get_encoder()


def _family_of(encoder: Any, extractor: Any) -> Family:
    if hasattr(encoder, "embed_positions") and hasattr(encoder, "conv1"):
        return "mel"
    return "wave" if extractor.model_input_names[0] == "input_values" else "frames"


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values, (0, max(0, length - len(values))))


def _bucket(count: int) -> int:
    """`count` rounded up by at most 1/32, so that audio of about equal length becomes equal."""
    step = 1 << max(0, (count // BUCKETS).bit_length() - 1)
    return -(-count // step) * step


@contextmanager
def positions_cut(encoder: Any, mel_frames: int) -> Iterator[None]:
    """Cut the position table to an input's length for one call; the weights stay as they are."""
    table, longest = encoder.embed_positions, encoder.config.max_source_positions
    count = mel_frames // (encoder.conv1.stride[0] * encoder.conv2.stride[0])
    encoder.embed_positions = nn.Embedding.from_pretrained(table.weight[:count])
    encoder.config.max_source_positions = count
    try:
        yield
    finally:
        encoder.embed_positions, encoder.config.max_source_positions = table, longest
