"""The map of one model outside a sweep: from a text file or a manifest to a redundancy map."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from workers.batches import Encoded, Modality, encode
from workers.config import POOLS, Condition, Criterion, Pool
from workers.data import spread, utterance_audio
from workers.errors import InvalidInput
from workers.examples import example_of
from workers.features import Encoder
from workers.manifest import Utterance, read_manifest
from workers.maps.damage import damage_map
from workers.maps.inputs import TextSample, check_length, example_batches, text_batches, text_tokens
from workers.maps.measure import MapBatch, redundancy_map
from workers.maps.redundancy import RedundancyMap
from workers.model_folder import OpenedModel
from workers.speechllm import SpeechLLM, SpeechLLMConfig
from workers.surgery.decoder_parts import decoder_parts

WINDOW = 8
"""Batches' worth of audio encoded and sorted by length at a time: memory stays flat."""


@dataclass(frozen=True, kw_only=True)
class MapRequest:
    """What to measure, and on what."""

    text: Path | None = None
    """UTF-8, a sample a line, or JSONL with `text`."""
    manifest: Path | None = None
    """JSONL that names audio and its text."""
    modality: Modality | None = None
    """With a manifest; None: speech where the model has an encoder, else its transcripts."""
    language: str | None = None
    """Of the speech; None: as each line's `lang` says."""
    target_language: str | None = None
    """Language of the translation; None: the transcript is the target."""
    samples: int = 128
    """At most, evenly spaced over the file."""
    batch_size: int = 16
    pools: tuple[Pool, ...] = POOLS
    criteria: tuple[Criterion, ...] = ("angular",)
    """Of those that one pass gives; none: damage alone."""
    damage: bool = False
    """Measure damage too."""
    depths: tuple[int, ...] = ()
    """Depths that damage is measured at; none: all."""
    adapter: bool = True
    """False: with the adapter switched off."""
    skip_bad: bool = False
    """Leave bad samples out in place of stopping."""


@dataclass(frozen=True, eq=False)
class ModelMap:
    """What was measured."""

    measured: RedundancyMap | None
    """By the cheap criteria; None where only damage was asked for."""
    damage: RedundancyMap | None
    modality: Modality
    skipped: tuple[str, ...]
    """What was wrong with each sample left out."""

    @cached_property
    def whole(self) -> RedundancyMap:
        """Every measure in one map."""
        maps = [one for one in (self.measured, self.damage) if one is not None]
        return maps[0] if len(maps) == 1 else maps[0].joined(maps[1])

    @property
    def samples(self) -> int:
        """Samples measured."""
        return max(len(values.ids) for values in self.whole.measures.values())


def conditions_of(request: MapRequest) -> list[Condition]:
    """What a request asks of a model, for the prompts of one that records them when it is opened.

    Raises:
        InvalidInput: the manifest cannot be read.
    """
    if request.manifest is None:
        return []
    named = [request.language]
    if request.language is None:
        named = [utterance.lang for utterance in read_manifest(request.manifest, [])]
    return [_condition(name, request) for name in dict.fromkeys(named) if name is not None]


def _condition(language: str, request: MapRequest) -> Condition:
    target = request.target_language
    return Condition(
        task="ast" if target else "asr", source_language=language, target_language=target
    )


Progress = Callable[[str, float, str], None]
"""Called with what is measured, the fraction done and a few words."""


def map_model(
    opened: OpenedModel, request: MapRequest, progress: Progress | None = None
) -> ModelMap:
    """Measure a model's map.

    Args:
        opened: the model.
        request: on what, and how.
        progress: called as it goes.

    Raises:
        InvalidInput: bad input; names file and line.
        NotFinite: a state or a loss is NaN, infinite or zero; names layer and sample.
    """
    _check(opened, request)
    samples = _samples(opened, request)
    measured = damage = None
    with nullcontext() if request.adapter else _adapter_off(samples.decoder):
        if request.criteria:
            measured = redundancy_map(
                samples.decoder,
                samples.batches(),
                request.pools,
                _told(progress, "map"),
                samples=samples.count,
                criteria=request.criteria,
            )
        if request.damage:
            damage = damage_map(
                samples.decoder,
                samples.batches(),
                request.depths or None,
                _told(progress, "damage"),
                samples=samples.count,
            )
    return ModelMap(measured, damage, samples.modality, samples.skipped)


def _told(progress: Progress | None, what: str) -> Callable[[float, str], None] | None:
    return None if progress is None else lambda done, words: progress(what, done, words)


def _check(opened: OpenedModel, request: MapRequest) -> None:
    layers = len(decoder_parts(opened.decoder).layers)
    for depth in request.depths:
        if not 1 <= depth < layers:
            raise InvalidInput(
                f"no block of {depth} layers can be removed: the decoder has {layers}",
                "--depth",
                f"choose 1 to {layers - 1}",
            )
    if getattr(opened.decoder.config, "quantization_config", None) is not None:
        raise InvalidInput(
            "the weights are quantised, which distorts the small angles a map is made of",
            "MODEL",
            "map the model in its original precision",
        )
    if request.target_language and request.manifest is None:
        raise InvalidInput("a text file has no translations", "--target-language", "use --manifest")
    if request.modality == "speech" and (opened.speechllm is None or request.manifest is None):
        raise InvalidInput(
            "there is no speech to map: "
            + ("a text file has none" if request.manifest is None else "the model has no encoder"),
            "--modality",
            "name a SpeechLLM and a manifest, or leave it out",
        )
    if not request.adapter and opened.kind in ("causal-lm", "released"):
        raise InvalidInput("the model has no adapter to switch off", "--no-adapter")


class _Samples:
    """What a request names, as batches that can be gone through more than once."""

    modality: Modality = "text"
    count: int
    """Samples there are before bad ones are left out while reading."""

    def __init__(self, decoder: PreTrainedModel | PeftModel, request: MapRequest) -> None:
        self.decoder, self.request = decoder, request
        self._bad: dict[int, str] = {}

    @property
    def skipped(self) -> tuple[str, ...]:
        """What was wrong with the samples left out."""
        return tuple(self._bad[number] for number in sorted(self._bad))

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The decoder as transformers knows it."""
        decoder = self.decoder
        return cast(
            PreTrainedModel,
            decoder.get_base_model() if isinstance(decoder, PeftModel) else decoder,
        )

    def batches(self) -> Iterator[MapBatch]:
        """All samples.

        Raises:
            InvalidInput: a bad sample (unless they are skipped), or none that is good.
        """
        given = False
        for batch in self._batches():
            given = True
            yield batch
        if not given:
            first = next(iter(self.skipped), "there are none")
            raise InvalidInput(
                f"none of the samples can be used: {first}",
                str(self.request.text or self.request.manifest),
            )

    def _batches(self) -> Iterator[MapBatch]:
        raise NotImplementedError

    def skip(self, error: InvalidInput) -> None:
        """Leaves a bad sample out, or raises if that was not asked for."""
        if not self.request.skip_bad:
            raise error
        self._bad[int(error.where.rpartition(":")[2])] = str(error)


class _TextLines(_Samples):
    """Lines of a text file, as the decoder reads them without a prompt."""

    def __init__(self, opened: OpenedModel, request: MapRequest, file: Path) -> None:
        super().__init__(opened.decoder, request)
        self._tokenized: list[tuple[TextSample, list[int]]] = []
        for sample in spread(read_text(file, self.skip), request.samples):
            try:
                tokens = text_tokens(self.causal_lm, opened.tokenizer, sample)
            except InvalidInput as error:
                self.skip(error)
            else:
                self._tokenized.append((sample, tokens))
        self.count = len(self._tokenized)

    def _batches(self) -> Iterator[MapBatch]:
        return text_batches(self.causal_lm, self._tokenized, self.request.batch_size)


class _ManifestLines(_Samples):
    """Lines of a manifest, with the model's prompt around audio or transcript."""

    def __init__(self, model: SpeechLLM, request: MapRequest, file: Path) -> None:
        super().__init__(model.decoder, request)
        self.model, self.encoder = model, model.encoder
        if request.modality == "text":
            self.encoder = None
        self.modality = "text" if self.encoder is None else "speech"
        problems: list[InvalidInput] | None = [] if request.skip_bad else None
        self._utterances = spread(read_manifest(file, problems), request.samples)
        for problem in problems or ():
            self.skip(problem)
        self.count = len(self._utterances)

    def _batches(self) -> Iterator[MapBatch]:
        step = WINDOW * self.request.batch_size
        for start in range(0, len(self._utterances), step):
            window = self._utterances[start : start + step]
            if self.encoder is None:
                heard: Iterable[tuple[Utterance, Tensor | None]] = ((u, None) for u in window)
            else:
                heard = self._heard(self.encoder, window)
            encoded = []
            for utterance, frames in heard:
                try:
                    encoded.append(self._encoded(utterance, frames))
                except InvalidInput as error:
                    self.skip(_placed(error, utterance))
            if encoded:
                yield from example_batches(self.model, encoded, self.request.batch_size)

    def _heard(
        self, encoder: Encoder, window: Sequence[Utterance]
    ) -> Iterator[tuple[Utterance, Tensor]]:
        """Utterances with the encoder's frames, all encoded together where none is bad."""
        read = []
        for utterance in window:
            try:
                read.append((utterance, utterance_audio(utterance, encoder.sampling_rate)))
            except InvalidInput as error:
                self.skip(_placed(error, utterance))
        try:
            frames = encoder.encode([wave for _, wave in read], [u.id for u, _ in read])
            yield from zip([u for u, _ in read], frames, strict=True)
        except InvalidInput:
            for utterance, wave in read:
                try:
                    alone = encoder.encode([wave], [utterance.id])[0]
                except InvalidInput as error:
                    self.skip(_placed(error, utterance))
                else:
                    yield utterance, alone

    def _encoded(self, utterance: Utterance, frames: Tensor | None) -> Encoded:
        language = self.request.language or utterance.lang
        if language is None:
            raise InvalidInput(
                "no language is named", utterance.where, "add lang to the line, or give --language"
            )
        example = example_of(utterance, _condition(language, self.request), frames)
        item = encode(self.model, [example], self.modality)[0]
        check_length(self.causal_lm, item.length, utterance.where)
        return item


def _samples(opened: OpenedModel, request: MapRequest) -> _Samples:
    if request.text is not None:
        return _TextLines(opened, request, request.text)
    assert request.manifest is not None
    return _ManifestLines(opened.speechllm or _reader(opened, request), request, request.manifest)


def _reader(opened: OpenedModel, request: MapRequest) -> SpeechLLM:
    """A SpeechLLM that only reads transcripts, for the prompts: a new adapter changes nothing."""
    plain: Any = opened.decoder
    if isinstance(plain, PeftModel):
        plain = plain.merge_and_unload() if request.adapter else plain.unload()
    return SpeechLLM.create(plain, opened.tokenizer, SpeechLLMConfig(encoder_dim=1), seed=0)


def _adapter_off(decoder: PreTrainedModel | PeftModel) -> AbstractContextManager[None]:
    return decoder.disable_adapter() if isinstance(decoder, PeftModel) else nullcontext()


def _placed(error: InvalidInput, utterance: Utterance) -> InvalidInput:
    """The error, with the manifest's line in front."""
    if error.where.startswith(utterance.where):
        return error
    problem = f"{error.where}: {error.problem}" if error.where else error.problem
    return InvalidInput(problem, utterance.where, error.remedy)


def read_text(path: Path, skip: Callable[[InvalidInput], None]) -> list[TextSample]:
    """The samples of a text file: its lines that are not blank, or the `text` of JSONL.

    Args:
        path: UTF-8; JSONL if its name ends in `.jsonl` or `.json`.
        skip: called with what is wrong with a bad line, which is left out unless it raises.

    Raises:
        InvalidInput: not readable, a bad line, or nothing in it; names file and line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InvalidInput(f"cannot be read: {error.strerror}", str(path)) from None
    samples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            samples.append(_text_sample(line, path, number))
        except InvalidInput as error:
            skip(error)
    if not samples:
        raise InvalidInput("there is no text in it", str(path), "a sample a line")
    return samples


def _text_sample(line: bytes, path: Path, number: int) -> TextSample:
    where = f"{path}:{number}"
    try:
        text: Any = line.decode("utf-8").strip().lstrip("\ufeff")
        if path.suffix in (".jsonl", ".json"):
            row = json.loads(text)
            text = row.get("text") if isinstance(row, dict) else None
    except UnicodeDecodeError:
        raise InvalidInput("not UTF-8", where, "save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"not valid JSON: {error}", where) from None
    if not isinstance(text, str) or not text.strip():
        raise InvalidInput("no text", where, 'e.g. {"text": "…"}')
    return TextSample(f"line {number}", text, where)
