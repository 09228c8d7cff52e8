"""The SpeechLLM: frozen encoder, projector, and a decoder with LoRA, with its folder on disk.

The adapter sits on the decoder alone and is numbered by the layers the decoder has now: inside
`surgery.pruned`, what is saved and loaded belongs to the pruned decoder.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from workers.config import (
    LoraSettings,
    OwnProjectorConfig,
    ProjectorConfig,
    PromptSettings,
    RecordedPrompts,
    Settings,
)
from workers.encoder import SpeechEncoder
from workers.errors import InvalidInput, first_line
from workers.lora import lora_config
from workers.projectors import Projector, build_projector
from workers.released.projector import build_own_projector
from workers.surgery.decoder_parts import decoder_layers
from workers.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from workers.released.audio import OwnEncoder

Part = Literal["projector", "decoder"]
FORMAT = 1
"""Version of the folder's layout."""


class SpeechLLMConfig(Settings):
    """What a SpeechLLM is made of, apart from the weights."""

    encoder_dim: int
    """Width of the encoder's frames."""
    projector: ProjectorConfig | OwnProjectorConfig = ProjectorConfig()
    lora: LoraSettings = LoraSettings()
    prompts: PromptSettings | RecordedPrompts = PromptSettings()
    decoder_name: str = ""
    """For people; changes nothing."""
    encoder_name: str = ""
    """For people; changes nothing."""

    @classmethod
    def read(cls, folder: Path) -> "SpeechLLMConfig":
        """The configuration of a folder that `save_trained` or `save_pretrained` wrote.

        Raises:
            InvalidInput: not such a folder, or damaged.
        """
        return _read_description(folder)[0]


class SpeechLLM(nn.Module):
    """Encoder, projector and decoder as one model. Use `create` or `from_pretrained`.

    Nothing in it requires a gradient except while `workers.training.train` runs. It stays in
    evaluation mode throughout.
    """

    def __init__(
        self,
        decoder: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        projector: Projector,
        config: SpeechLLMConfig,
        encoder: "SpeechEncoder | OwnEncoder | None" = None,
    ) -> None:
        super().__init__()
        self.decoder, self.projector, self.encoder = decoder, projector, encoder
        self.tokenizer, self.config = tokenizer, config
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def create(
        cls,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SpeechLLMConfig,
        seed: int,
        encoder: "SpeechEncoder | OwnEncoder | None" = None,
    ) -> "SpeechLLM":
        """Puts an untrained projector and an untrained adapter (which changes nothing yet) on.

        The decoder is changed in place: peft puts its layers into it.

        Args:
            decoder: a causal LM of transformers, any dtype, without an adapter.
            tokenizer: its tokenizer.
            config: sizes, LoRA, prompts.
            seed: of the new weights; the same on every device.
            encoder: optional, needed only by `save_pretrained` and for new audio.

        Raises:
            InvalidInput: sizes or LoRA targets that do not fit.
        """
        generator = torch.Generator().manual_seed(seed)
        embeddings = decoder.get_input_embeddings().weight
        rms = embeddings.detach().float().square().mean().sqrt().item()
        # peft and torch.nn draw from the global generator: leave the caller's as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projector = (
                build_own_projector(config.projector, config.encoder_dim)
                if isinstance(config.projector, OwnProjectorConfig)
                else build_projector(config.projector, config.encoder_dim, embeddings.shape[1], rms)
            )
            wrapped = get_peft_model(decoder, lora_config(decoder, config.lora))
        # peft would write down the folder the decoder was read from on this machine.
        wrapped.peft_config["default"].base_model_name_or_path = config.decoder_name or None
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:
                fresh = torch.empty(parameter.shape)
                nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
                parameter.data.copy_(fresh)
        return cls(wrapped, tokenizer, projector.to(embeddings.device), config, encoder)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The decoder as transformers knows it, with the adapter's layers inside."""
        return cast(PreTrainedModel, self.decoder.get_base_model())

    @property
    def device(self) -> torch.device:
        """Where the decoder lies."""
        return self.causal_lm.get_input_embeddings().weight.device

    @property
    def layer_count(self) -> int:
        """Layers the decoder has now."""
        return len(decoder_layers(self.decoder))

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[batch, length]` to embeddings `[batch, length, decoder_dim]`."""
        return self.causal_lm.get_input_embeddings()(ids)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The LoRA weights, layer by layer."""
        return [p for name, p in self.decoder.named_parameters() if "lora_" in name]

    def parameters_of(self, part: Part) -> list[nn.Parameter]:
        """What is trained when `part` is: the projector, or the decoder's LoRA weights."""
        return (
            list(self.projector.parameters()) if part == "projector" else self.adapter_parameters()
        )

    @contextlib.contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """The decoder as it was before it was adapted, until the block ends."""
        # peft's own context leaves LoRA weights trainable behind.
        trainable = [(p, p.requires_grad) for p in self.adapter_parameters()]
        try:
            with self.decoder.disable_adapter():
                yield
        finally:
            for parameter, flag in trainable:
                parameter.requires_grad_(flag)

    def trained_state(self) -> dict[str, Tensor]:
        """Adapter and projector weights on the CPU, copied; keys begin with their part."""
        state = {f"decoder.{key}": value for key, value in self._adapter_state().items()}
        state |= {f"projector.{key}": value for key, value in self.projector.state_dict().items()}
        return {key: value.detach().cpu().clone() for key, value in state.items()}

    def load_trained_state(self, state: dict[str, Tensor], where: str = "") -> None:
        """Copies weights that `trained_state` gave into this model.

        Raises:
            InvalidInput: a weight is missing, unknown or of another shape; nothing is changed then.
        """
        own = {f"decoder.{key}": value for key, value in self._adapter_state().items()}
        own |= {f"projector.{key}": value for key, value in self.projector.state_dict().items()}
        faults = [f"{key} is missing" for key in sorted(own.keys() - state.keys())]
        faults += [f"{key} does not belong here" for key in sorted(state.keys() - own.keys())]
        faults += [
            f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}"
            for key in sorted(own.keys() & state.keys())
            if state[key].shape != own[key].shape
        ]
        if faults:
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            raise InvalidInput(
                f"the trained weights do not fit this model: {faults[0]}{more}",
                where,
                f"the decoder has {self.layer_count} layers now; load weights trained on exactly "
                "this decoder, with the same projector and LoRA settings",
            )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])

    def save_trained(self, folder: Path) -> None:
        """Writes what training changed: `adapter/` (as peft does), the projector, the settings."""
        adapter = folder / "adapter"
        for made in (folder, adapter):  # what the folder lies in must be there
            made.mkdir(exist_ok=True)
        state = self.trained_state()
        for part, file in _WEIGHT_FILES.items():
            prefix = f"{part}."
            weights = {
                key.removeprefix(prefix): value.contiguous()
                for key, value in state.items()
                if key.startswith(prefix)
            }
            save_file(weights, folder / file, metadata={"format": "pt"})
        self.decoder.peft_config["default"].save_pretrained(str(adapter))
        text = self.causal_lm.config.get_text_config(decoder=True)
        described = {
            "format": FORMAT,
            "config": self.config.model_dump(mode="json"),
            "decoder": {
                "model_type": text.model_type,
                "layers": self.layer_count,
                "hidden_size": text.hidden_size,
            },
        }
        (folder / _DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")

    def load_trained(self, folder: Path) -> None:
        """Copies the weights of a folder that `save_trained` wrote into this model.

        Raises:
            InvalidInput: not such a folder, damaged, or of a model with other settings or layers.
        """
        config, _ = _read_description(folder)
        for field in ("encoder_dim", "projector", "lora", "prompts"):
            theirs, ours = getattr(config, field), getattr(self.config, field)
            if theirs != ours:
                raise InvalidInput(
                    f"the weights were trained with another {field}: {theirs!r}, not {ours!r}",
                    str(folder / _DESCRIPTION),
                    "use the settings they were trained with",
                )
        self.load_trained_state(_read_weights(folder), str(folder))

    def save_pretrained(self, folder: Path) -> None:
        """Writes the whole model; `decoder/` and `encoder/` are plain Hugging Face models."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save_trained(folder)
        with self._without_adapter_layers() as plain:
            plain.save_pretrained(folder / "decoder")
        self.tokenizer.save_pretrained(folder / "decoder")
        if self.encoder is not None:
            self.encoder.save_pretrained(folder / "encoder")

    @classmethod
    def from_pretrained(
        cls, folder: Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu"
    ) -> "SpeechLLM":
        """Reads what `save_pretrained` wrote (without an encoder if it was saved without one).

        Args:
            folder: the model's.
            dtype: of the decoder; `auto`: as stored.
            device: where all of it goes.

        Raises:
            InvalidInput: not such a folder, or damaged.
        """
        config, described = _read_description(folder)
        place = folder / "decoder"
        if not (place / "config.json").is_file():
            raise InvalidInput(
                "there is no decoder in this folder",
                str(place),
                "name a folder that holds a whole model, or use load_trained",
            )
        try:
            decoder, report = AutoModelForCausalLM.from_pretrained(
                place, dtype=dtype, output_loading_info=True, local_files_only=True
            )
            tokenizer = open_tokenizer(place, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InvalidInput(
                f"the decoder cannot be read: {first_line(error)}", str(place), _AGAIN
            ) from error
        lost = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
        if lost:
            raise InvalidInput(
                f"the decoder's weights and its configuration disagree about {lost[0]} "
                f"({len(lost)} in all)",
                str(place),
                _AGAIN,
            )
        encoder = _open_encoder(folder / "encoder", config, device)
        decoder.to(device)
        model = cls.create(decoder, tokenizer, config, seed=0, encoder=encoder)
        if described.get("layers") != model.layer_count:
            raise InvalidInput(
                f"the adapter is for {described.get('layers')} layers and the decoder has "
                f"{model.layer_count}",
                str(folder / _DESCRIPTION),
                _AGAIN,
            )
        model.load_trained_state(_read_weights(folder), str(folder))
        return model

    def _adapter_state(self) -> dict[str, Tensor]:
        """The LoRA weights themselves, under the names peft gives them in files."""
        return {
            name.replace(".default.", "."): parameter.data
            for name, parameter in self.decoder.named_parameters()
            if "lora_" in name
        }

    @contextlib.contextmanager
    def _without_adapter_layers(self) -> Iterator[PreTrainedModel]:
        """The plain decoder, its linear layers put back where peft's stand."""
        base = self.causal_lm
        places = [
            (base.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)
            for name, module in base.named_modules()
            if isinstance(module, LoraLayer)
        ]
        try:
            for parent, name, module in places:
                setattr(parent, name, module.get_base_layer())
            yield base
        finally:
            for parent, name, module in places:
                setattr(parent, name, module)


_DESCRIPTION = "speechllm.json"
_WEIGHT_FILES = {
    "decoder": "adapter/adapter_model.safetensors",
    "projector": "projector.safetensors",
}
_AGAIN = "copy or save the model again"


def _read_description(folder: Path) -> tuple[SpeechLLMConfig, dict[str, Any]]:
    file = folder / _DESCRIPTION
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise InvalidInput(
                f"the layout {content['format']!r} is not known",
                str(file),
                f"this version reads layout {FORMAT}",
            )
        return SpeechLLMConfig.model_validate(content["config"]), dict(content["decoder"])
    except FileNotFoundError:
        raise InvalidInput(
            f"this is no SpeechLLM: there is no {_DESCRIPTION}",
            str(folder),
            "name a folder written by save_trained or save_pretrained",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise InvalidInput(f"cannot be read: {first_line(error)}", str(file), _AGAIN) from error


def _open_encoder(
    folder: Path, config: SpeechLLMConfig, device: str
) -> "SpeechEncoder | OwnEncoder | None":
    if not folder.is_dir():
        return None
    if not isinstance(config.projector, OwnProjectorConfig):
        return SpeechEncoder.from_pretrained(folder, device=device)
    # That module opens tokenizers with this one.
    from workers.released.audio import OwnEncoder

    return OwnEncoder.from_pretrained(folder, device=device)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for part, name in _WEIGHT_FILES.items():
        try:
            weights = load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise InvalidInput(
                f"the {part}'s weights cannot be read: {first_line(error)}",
                str(folder / name),
                _AGAIN,
            ) from error
        state |= {f"{part}.{key}": value for key, value in weights.items()}
    return state
