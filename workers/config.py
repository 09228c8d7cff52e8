"""The settings of the science, one frozen model a component, shared by sweep files and stages.

Importing this costs no torch. Field descriptions are what `--help`, the docs and errors print.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Task = Literal["asr", "ast"]
HealMode = Literal["none", "projector", "decoder", "joint"]
Pool = Literal["last", "prompt", "audio", "target", "all"]
POOLS: tuple[Pool, ...] = ("last", "prompt", "audio", "target", "all")
Criterion = Literal["angular", "influence", "cka", "damage"]
CHEAP_CRITERIA: tuple[Criterion, ...] = ("angular", "influence", "cka")
"""Those that one forward pass gives; `damage` skips every block."""

DAMAGE_BATCH = 8
"""Utterances a damage map takes at once: every open block is a row for each of them in a layer's
batch, so a few fill it."""

LANGUAGE_NAMES = {
    "ar": "Arabic", "ca": "Catalan", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish",
    "fr": "French", "he": "Hebrew", "hi": "Hindi", "hu": "Hungarian", "id": "Indonesian",
    "it": "Italian", "ja": "Japanese", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian",
    "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian",
    "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sv": "Swedish", "th": "Thai",
    "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


class Settings(BaseModel):
    """Base of every settings model: frozen, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ProjectorConfig(Settings):
    """Maps encoder frames `[time, encoder_dim]` to decoder embeddings `[time', decoder_dim]`."""

    kind: Literal["linear", "mlp", "conv", "qformer"] = "mlp"
    """`linear` and `mlp` work on `stack` frames joined; `conv` strides by `stack`; `qformer` puts
    `queries` learnt queries on each window of `stack` frames."""
    stack: int = Field(5, ge=1)
    """Encoder frames per decoder embedding (per window for `qformer`)."""
    hidden: int = Field(2048, ge=1)
    """Width of the hidden layer of `mlp`, `conv` and `qformer`."""
    queries: int = Field(1, ge=1)
    """Embeddings per window (`qformer` only)."""
    heads: int = Field(4, ge=1)
    """Attention heads (`qformer` only)."""


class OwnProjectorConfig(Settings):
    """The projector that a released SpeechLLM brings with it."""

    kind: Literal["own"] = "own"
    model: dict[str, Any] = Field(repr=False)
    """The released model's configuration: it says how the projector is built."""


class LoraSettings(Settings):
    """LoRA on the decoder alone (peft)."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear", "attention"] | list[str] = "all-linear"
    """`all-linear` (all linear layers inside the decoder's layers), `attention`, or module names."""


class TrainSettings(Settings):
    """One training run: adapting the base or healing a pruned decoder."""

    steps: int = Field(1000, ge=1)
    batch_size: int = Field(32, ge=1)
    """Utterances per optimizer step (the effective batch)."""
    micro_batch: int | None = Field(None, ge=1)
    """Utterances per forward pass; None: the whole batch at once."""
    lr_decoder: float = Field(5e-4, gt=0)
    """Peak learning rate of the LoRA weights."""
    lr_projector: float = Field(1e-3, gt=0)
    """Peak learning rate of the projector."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1)
    """Fraction of the steps spent on linear warm-up."""
    final_lr: float = Field(0.02, ge=0, le=1)
    """Learning rate at the last step, as a fraction of the peak."""
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""


class AdaptSettings(TrainSettings):
    """Training projector and LoRA on the unpruned decoder: the base SpeechLLM."""

    lora: LoraSettings = LoraSettings()
    alignment_steps: int = Field(0, ge=0)
    """Steps that warm the projector up from word times against the frozen word embeddings, without
    running the decoder; needs a `words` column in the training data."""
    alignment_lr: float = Field(3e-3, gt=0)
    seed: int = 0


class HealSettings(TrainSettings):
    """Repair after pruning; continues the base's adapter on the layers that are left."""

    steps: int = Field(200, ge=1)


class MapSettings(Settings):
    """How redundancy maps are measured."""

    samples: int = Field(128, ge=2)
    """Utterances of the development set a map is measured on."""
    batch_size: int = Field(16, ge=1)
    pools: tuple[Pool, ...] = POOLS
    """Token pools measured (all in one pass)."""
    criteria: tuple[Literal["angular", "influence", "cka"], ...] = Field(("angular",), min_length=1)
    """Criteria measured (all in that pass)."""


class DamageSettings(Settings):
    """How damage maps are measured: the loss with each block skipped, before any healing."""

    samples: int = Field(32, ge=2)
    """Utterances of the development set. All blocks of L layers cost about L²/6 forward passes of
    these."""
    depths: tuple[int, ...] | None = None
    """Depths measured; None: all."""


class DecodeSettings(Settings):
    """Greedy decoding."""

    batch_size: int = Field(32, ge=1)
    tokens_per_second: float = Field(8.0, gt=0)
    """Cap on new tokens, per second of audio."""
    extra_tokens: int = Field(16, ge=1)
    """Added to the cap."""


class PromptSettings(Settings):
    """What the decoder reads around the audio.

    `{audio}` marks the audio's place (required); `{source}` and `{target}` are language names.
    """

    asr: str = "Transcribe {source}: {audio}\nText:"
    ast: str = "Translate {source} to {target}: {audio}\nText:"
    chat: bool = False
    """Put the text through the tokenizer's chat template as the user's turn."""
    target_prefix: str = " "
    """Stands between the prompt and the answer (a space for plain prompts, nothing for chat)."""


class RecordedPrompt(Settings):
    """One condition's prompt as a released SpeechLLM's processor renders it."""

    text: str
    """For people, with `{audio}` in the audio's place."""
    prefix_ids: tuple[int, ...]
    """Tokens before the audio."""
    suffix_ids: tuple[int, ...]
    """Tokens between the audio and the answer."""
    target_prefix: str = ""
    """Stands before the answer's text."""
    end_id: int | None = None
    """Token that ends an answer; None: the tokenizer's end of sequence."""


class RecordedPrompts(Settings):
    """The prompts of a released SpeechLLM, taken down once for training, maps and decoding."""

    conditions: dict[str, RecordedPrompt]
    """By the condition's label."""


class Condition(Settings):
    """What a model is asked to do: one task on one language or language pair."""

    task: Task
    source_language: str
    target_language: str | None = None
    """Only for `ast`."""

    @property
    def label(self) -> str:
        """Short name, such as `asr-de` or `ast-de-en`."""
        return "-".join(p for p in (self.task, self.source_language, self.target_language) if p)


class Block(Settings):
    """Layers `start … start+depth-1` of the unpruned decoder, removed together (numbered from 0)."""

    start: int = Field(ge=0)
    depth: int = Field(ge=1)

    @property
    def layers(self) -> tuple[int, ...]:
        """The removed layers."""
        return tuple(range(self.start, self.start + self.depth))
