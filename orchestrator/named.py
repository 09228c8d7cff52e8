"""What a sweep names, found: decoders, encoders, and the data of each condition.

Lab names become build stages, folders and hub ids fingerprinted sources. What is refused here is
refused with the path of the key in the sweep file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.graph import Node
from orchestrator.sources import (
    DigestCache,
    Source,
    brings_adapter,
    decoder_layers,
    manifest_source,
    model_config,
    model_source,
)
from orchestrator.sweep import EncoderEntry, ModelEntry, Sweep, TaskEntry, TestSet
from workers.config import Condition
from workers.errors import InvalidInput
from workers.lab.catalogue import SPEECH_LANGUAGES, LabItem, lab_item
from workers.manifest import Utterance
from workers.released import is_released

LAB_SEED = 0
LAB_SPLITS = ("train", "dev", "test", "ood")


@dataclass(frozen=True)
class Corpus:
    """One split of one language's data: a build stage's split or a manifest."""

    node: str | None
    source: Source | None
    split: str | None
    label: str


@dataclass(frozen=True)
class Decoder:
    """A sweep's decoder, found."""

    entry: ModelEntry
    node: str | None
    source: Source | None
    layers: int
    own_adapter: bool = False
    """A released SpeechLLM that brings an adapter for speech."""

    @property
    def released(self) -> bool:
        """Whether it is a released SpeechLLM's."""
        return self.entry.speechllm is not None


@dataclass(frozen=True)
class Cell:
    """One condition with its data."""

    condition: Condition
    train: Corpus
    dev: Corpus
    tests: tuple[tuple[TestSet, Corpus], ...]


class Names:
    """Finds what a sweep names.

    Args:
        sweep: the sweep.
        base: folder that relative paths in it start from.
        digests: remembered digests of local files.
        add: takes a build stage into the plan, and gives its id.
    """

    def __init__(
        self, sweep: Sweep, base: Path, digests: DigestCache, add: Callable[[Node], str]
    ) -> None:
        self.sweep, self.base, self.digests, self._add = sweep, base, digests, add
        self._manifests: dict[tuple[str, str], Source] = {}

    def all_cells(self) -> list[Cell]:
        """Every condition with its data."""
        return [
            cell
            for i, entry in enumerate(self.sweep.tasks)
            for cell in self._cells(entry, f"sweep.tasks[{i}]")
        ]

    def _build(self, item: LabItem, **params: Any) -> str:
        language = params.get("language")
        inputs = {}
        if item.role == "encoder":
            data = lab_item(
                "lab:speech" if item.size == "full" else "lab:speech-tiny", "data", item.name
            )
            inputs = {code: self._build(data, language=code) for code in SPEECH_LANGUAGES}
        name = item.name.removeprefix("lab:")
        return self._add(
            Node(
                id=f"build/{name}/{language}" if language else f"build/{name}",
                kind="build",
                params={"name": item.name, "seed": LAB_SEED, **params},
                inputs=inputs,
                cost=item.cost_seconds,
            )
        )

    def decoder(self, entry: ModelEntry, where: str) -> Decoder:
        """One entry of `models`."""
        where += ".speechllm" if entry.speechllm else ".decoder"
        reference = entry.reference
        if reference.startswith("lab:"):
            item = lab_item(reference, "decoder", where)
            if entry.speechllm:
                raise InvalidInput(
                    f"{reference} is a decoder on its own",
                    where,
                    f"write decoder: {reference}, and give encoders",
                )
            assert item.layers is not None
            found = Decoder(entry, self._build(item), None, item.layers)
        else:
            source = model_source(reference, entry.revision, self.base, where, self.digests)
            config = model_config(source, where)
            if is_released(config) != bool(entry.speechllm):
                raise _misnamed(reference, is_released(config), where)
            found = Decoder(
                entry,
                None,
                source,
                decoder_layers(source, config, where),
                own_adapter=entry.speechllm is not None and brings_adapter(source),
            )
        for i, depth in enumerate(self.sweep.depths):
            if depth >= found.layers:
                raise InvalidInput(
                    f"cannot remove {depth} layers: {entry.name} has {found.layers}",
                    f"sweep.depths[{i}]",
                    f"the largest depth is {found.layers - 1}",
                )
        for i, selector in enumerate(self.sweep.selectors):
            deepest = self.sweep.depths[-1]
            if selector.start is not None and selector.start + deepest > found.layers:
                raise InvalidInput(
                    f"{deepest} layers from layer {selector.start} reach past the last of "
                    f"{entry.name}'s {found.layers} layers",
                    f"sweep.selectors[{i}].start",
                    f"the largest start at depth {deepest} is {found.layers - deepest}",
                )
        return found

    def encoder(self, entry: EncoderEntry, where: str) -> tuple[str | None, Source | None]:
        """One entry of `encoders`: the stage that builds it, or where it comes from."""
        if entry.encoder.startswith("lab:"):
            return self._build(lab_item(entry.encoder, "encoder", f"{where}.encoder")), None
        return None, model_source(
            entry.encoder, entry.revision, self.base, f"{where}.encoder", self.digests
        )

    def _cells(self, entry: TaskEntry, where: str) -> list[Cell]:
        cells = []
        for code in entry.languages:
            condition = Condition(
                task=entry.task, source_language=code, target_language=entry.target_language
            )
            if entry.data is not None:
                name = entry.data
                train, dev = f"{name}/train", f"{name}/dev"
                tests = [
                    TestSet(name="test", data=f"{name}/test"),
                    TestSet(name="ood", data=f"{name}/ood", in_domain=False),
                ]
                places = [f"{where}.data"] * 4
            else:
                assert entry.train is not None
                assert entry.dev is not None
                assert entry.test is not None
                train, dev, tests = entry.train, entry.dev, entry.test
                places = [f"{where}.train", f"{where}.dev"]
                places += [f"{where}.test[{i}].data" for i in range(len(tests))]
            corpora = [
                self._corpus(reference.replace("{language}", code), condition, place)
                for reference, place in zip(
                    [train, dev, *(t.data for t in tests)], places, strict=True
                )
            ]
            cells.append(
                Cell(
                    condition,
                    corpora[0],
                    corpora[1],
                    tuple(zip(tests, corpora[2:], strict=True)),
                )
            )
        return cells

    def _corpus(self, reference: str, condition: Condition, where: str) -> Corpus:
        language, target = condition.source_language, condition.target_language
        if reference.startswith("lab:"):
            name, _, split = reference.partition("/")
            item = lab_item(name, "data", where)
            if split not in LAB_SPLITS:
                raise InvalidInput(
                    f"{name} has no split {split or '(none given)'}",
                    where,
                    f"one of: {', '.join(LAB_SPLITS)}",
                )
            for code in (language, target):
                if code is not None and code not in SPEECH_LANGUAGES:
                    raise InvalidInput(
                        f"{name} does not have language {code}",
                        f"{where.rpartition('.')[0]}.language",
                        f"it has: {', '.join(SPEECH_LANGUAGES)}",
                    )
            node = self._build(item, language=language)
            return Corpus(node, None, split, f"{name.removeprefix('lab:')}.{language}.{split}")
        known = self._manifests.get((reference, condition.label))
        if known is None:

            def check(utterance: Utterance) -> None:
                if target is not None and utterance.translation(target) is None:
                    raise InvalidInput(
                        f"utterance {utterance.id!r} of {reference} has no translation",
                        where,
                        f"add a field translation or text_{target} to every line",
                    )

            known = manifest_source(reference, self.base, where, self.digests, check)
            self._manifests[reference, condition.label] = known
        digest = known.fingerprint.partition(":")[2][:8]
        return Corpus(None, known, None, f"{Path(reference).stem}.{digest}")


def _misnamed(reference: str, released: bool, where: str) -> InvalidInput:
    if released:
        return InvalidInput(
            f"{reference} is a whole SpeechLLM, with encoder and projector of its own",
            where,
            f"write speechllm: {reference}",
        )
    return InvalidInput(
        f"{reference} is no SpeechLLM that transformers supports: its config.json does not describe "
        "an audio encoder and a text decoder",
        where,
        f"if it is a language model, write decoder: {reference}, and give encoders",
    )
