"""A released SpeechLLM's own way from audio to what its projector reads, watched and not rewritten.

Each utterance runs alone through the model's processor and code, padded, cut and trimmed as they
do it. What the projector is given is kept. Its output is replaced by numbered rows, and the numbers
that end up in the audio's place say which rows count: so lengths need no formula for any family.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from workers.encoder import SHORTEST
from workers.errors import InvalidInput
from workers.released.parts import configuration, described, released_parts, skeleton
from workers.released.processor import audio_extractor, open_processor

_BASE = 128  # every integer below is exact in bfloat16 and float16
_WEIGHTS = "encoder.safetensors"


class OwnEncoder:
    """A released SpeechLLM's frozen audio side, in evaluation mode."""

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        """Wrap a loaded model; it stays whole, and nothing in it is changed.

        Args:
            model: a released SpeechLLM.
            processor: its processor.
        """
        self.model, self.processor = model, processor
        self.parts = released_parts(model)
        self.extractor = audio_extractor(processor)
        self.sampling_rate = int(self.extractor.sampling_rate)

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return next(self.parts.tower.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the encoder computes in."""
        return next(self.parts.tower.parameters()).dtype

    @cached_property
    def dim(self) -> int:
        """Width of the frames, seen by encoding a second of silence."""
        return self.encode([np.zeros(self.sampling_rate, np.float32)])[0].shape[1]

    @torch.no_grad()
    def encode(self, waveforms: Sequence[np.ndarray], ids: Sequence[str] = ()) -> list[Tensor]:
        """Encode utterances, each alone.

        Args:
            waveforms: each `[samples]`, float32, at `sampling_rate`.
            ids: names for error messages.

        Returns:
            For each, `[frames, dim]` in float32 on the encoder's device: what the projector reads
            for it.

        Raises:
            InvalidInput: empty audio, more than one channel, audio that the model would cut off, or
                a model that does more with its projector than put what it gives in the audio's
                place.
        """
        return [
            self._encode(waveform, ids[i] if ids else f"number {i}")
            for i, waveform in enumerate(waveforms)
        ]

    def save_pretrained(self, folder: Path) -> None:
        """Write the encoder's weights, the model's configuration and its processor."""
        folder.mkdir(parents=True, exist_ok=True)
        # Not the live object: the decoder of a pruned model shares it.
        configuration(described(self.model.config)).save_pretrained(folder)
        state = {key: value.contiguous() for key, value in self.parts.tower.state_dict().items()}
        save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
        self.processor.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: Path, *, device: str | torch.device = "cpu") -> Self:
        """Reads what `save_pretrained` wrote; no language model comes into memory.

        Raises:
            InvalidInput: not such a folder, or damaged.
        """
        try:
            content = described(AutoConfig.from_pretrained(folder, local_files_only=True))
            model = skeleton(content)
            parts = released_parts(model)
            # Built anew off the meta device: buffers that no file holds have their values then.
            tower = type(parts.tower)(parts.tower.config)
            tower.load_state_dict(load_file(folder / _WEIGHTS), assign=True)
            processor = open_processor(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InvalidInput(
                f"the encoder cannot be read: {str(error).partition(chr(10))[0]}",
                str(folder),
                "copy or save the model again",
            ) from error
        setattr(parts.joint, parts.tower_name, tower)
        projector = type(parts.projector)(configuration(content))
        setattr(parts.joint, parts.projector_name, projector)
        parts.language.set_input_embeddings(_Blank(parts.language.config.hidden_size))
        model.eval().requires_grad_(False)
        tower.to(device)
        projector.to(device=device, dtype=next(tower.parameters()).dtype)
        return cls(model, processor)

    def _encode(self, waveform: np.ndarray, name: str) -> Tensor:
        if waveform.ndim != 1 or len(waveform) == 0:
            raise InvalidInput(
                f"utterance {name!r} is not a waveform of one channel: shape {waveform.shape}"
            )
        shortest = round(SHORTEST * self.sampling_rate)
        waveform = np.pad(waveform, (0, max(0, shortest - len(waveform))))
        read, rows = self._watched(waveform)
        for seconds in self._limits():
            samples = int(seconds * self.sampling_rate)
            if len(waveform) > samples and len(self._watched(waveform[:samples])[1]) == len(rows):
                raise InvalidInput(
                    f"utterance {name!r} has {len(waveform) / self.sampling_rate:.1f} s, the model "
                    f"takes at most {seconds:g} s",
                    remedy="split or drop longer audio, or choose another model",
                )
        if len(rows) == 0:
            raise InvalidInput(f"the model's processor leaves nothing of utterance {name!r}")
        return read.float()

    def _limits(self) -> list[float]:
        """Seconds at which a processor may cut audio off, or begin a new chunk."""
        named = (
            getattr(self.extractor, "chunk_length", None),
            getattr(self.processor, "max_audio_len", None),
        )
        return [float(seconds) for seconds in named if seconds]

    def _watched(self, waveform: np.ndarray) -> tuple[Tensor, Tensor]:
        """The frames the projector reads for an utterance, and the rows of its output that count."""
        seen: list[tuple[Tensor, tuple[int, ...]]] = []

        def number(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen.append((arguments[0], tuple(output.shape)))
            return _numbered(output)

        hook = self.parts.projector.register_forward_hook(number)
        try:
            placed = self._placed(self._inputs(waveform))
        finally:
            hook.remove()
        rows = _numbers(placed)
        if rows is None or len(seen) != 1:
            raise self._unlike("does more than put its projector's output in the audio's place")
        read, shape = seen[0]
        if shape[:-1] == read.shape[:-1]:
            return read.flatten(0, -2)[rows], rows
        alone = read.numel() == read.shape[-2] * read.shape[-1]
        whole = torch.equal(rows, torch.arange(len(rows), device=rows.device))
        if not alone or not whole or len(rows) != shape[-2]:
            raise self._unlike("leaves out part of what its windowed projector gives")
        return read.reshape(read.shape[-2:]), rows

    def _inputs(self, waveform: np.ndarray) -> dict[str, Any]:
        """What the model is given for one utterance and no text."""
        # Voxtral's processor takes audio through requests that only mistral-common can make.
        chunks = getattr(self.processor, "_retrieve_input_features", None)
        if chunks is not None:
            settings = dict(self.processor.audio_kwargs)
            positions = settings.pop("max_source_positions")
            found = {"input_features": chunks([waveform], positions, **settings)}
        else:
            found = dict(
                self.processor(
                    text=[self.processor.audio_token],
                    audio=[waveform],
                    audio_kwargs={"sampling_rate": self.sampling_rate},
                    text_kwargs={"add_special_tokens": False},
                    return_tensors="pt",
                )
            )
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in found.items()
            if isinstance(value, Tensor)
        }

    def _placed(self, inputs: dict[str, Any]) -> Tensor:
        """What stands in the audio's place, `[embeddings, decoder_dim]`."""
        joint = self.parts.joint
        direct: Callable[..., Any] | None = getattr(joint, "get_audio_features", None)
        if direct is not None:
            known = inspect.signature(direct).parameters
            given = {name: value for name, value in inputs.items() if name in known}
            found: Tensor = direct(**given, return_dict=True).pooler_output
            return found.flatten(0, -2)
        heard: list[Tensor] = []

        def stop(_: nn.Module, __: Any, options: dict[str, Any]) -> NoReturn:
            heard.append(options["inputs_embeds"])
            raise _EnoughError

        hook = self.parts.language.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            joint(**inputs, use_cache=False)
        except _EnoughError:
            pass
        finally:
            hook.remove()
        return heard[0][inputs["input_ids"] == self.model.config.audio_token_id]

    def _unlike(self, deed: str) -> InvalidInput:
        return InvalidInput(
            f"{type(self.model).__name__} {deed}", "speechllm", "name another model"
        )


class _EnoughError(Exception):
    """Ends a forward pass that has shown what was to be seen."""


class _Blank(nn.Module):
    """Stands for token embeddings where no text is read."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, ids: Tensor) -> Tensor:
        """Zeros `[*ids.shape, dim]`."""
        return torch.zeros(*ids.shape, self.dim, device=ids.device)


def _numbered(output: Tensor) -> Tensor:
    """Rows that say their number: three digits, and a one that shows whether they were altered."""
    rows = torch.zeros_like(output).flatten(0, -2)
    number = torch.arange(len(rows), device=rows.device)
    for digit in range(3):
        rows[:, digit] = (number // _BASE**digit % _BASE).to(rows.dtype)
    rows[:, 3] = 1
    return rows.reshape(output.shape)


def _numbers(rows: Tensor) -> Tensor | None:
    """The numbers of rows `[rows, dim]`; None if anything was done to them."""
    digits = rows[:, :3].double()
    intact = bool((rows[:, 3] == 1).all() and not rows[:, 4:].any() and (digits % 1 == 0).all())
    weights = torch.tensor([1, _BASE, _BASE**2], device=rows.device, dtype=torch.double)
    return (digits @ weights).long() if intact else None
