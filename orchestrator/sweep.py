"""The sweep file: what a user asks for, checked before anything runs.

Lives here: the shape of the YAML, its defaults, and errors that name the key and the remedy. What
the sweep means in stages is `plan`'s business; whether its folders exist is `sources`'.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from workers.config import (
    LANGUAGE_NAMES,
    AdaptSettings,
    Condition,
    Criterion,
    DamageSettings,
    DecodeSettings,
    HealMode,
    HealSettings,
    MapSettings,
    Pool,
    ProjectorConfig,
    PromptSettings,
    Settings,
    Task,
)
from workers.errors import InvalidInput

DType = Literal["float32", "bfloat16", "float16"]
SelectorName = Literal["own", "consensus", "last", "random", "fixed"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ModelEntry(Settings):
    """One decoder, or one released SpeechLLM with the decoder in it."""

    decoder: str | None = Field(None, min_length=1)
    """`lab:NAME`, a local folder (relative to the sweep file) or a hub id: a language model, to be
    joined with each of `encoders`."""
    speechllm: str | None = Field(None, min_length=1)
    """In place of `decoder`: a local folder or a hub id of a SpeechLLM that transformers supports
    (Qwen2-Audio, Voxtral, Granite-Speech, …). Encoder and projector are its own."""
    name: str = ""
    """What tables and reports call it; by default the last part of `decoder` or `speechllm`."""
    revision: str | None = None
    """Hub revision; None: the newest, pinned to its commit when planned."""
    dtype: DType = "float32"
    trust_remote_code: bool = False
    """Let the hub repository's own Python code run. Shown in the plan."""

    @model_validator(mode="after")
    def _one(self) -> "ModelEntry":
        if (self.decoder is None) == (self.speechllm is None):
            given = "both are given" if self.decoder is not None else "neither is given"
            raise ValueError(
                "a model is either a decoder (decoder: …) or a whole SpeechLLM (speechllm: …); "
                f"{given}"
            )
        return self

    @property
    def reference(self) -> str:
        """What it names: `lab:NAME`, a folder or a hub id."""
        found = self.decoder or self.speechllm
        assert found is not None
        return found


class EncoderEntry(Settings):
    """One speech encoder and the projector put behind it."""

    encoder: str = Field(min_length=1)
    """`lab:NAME`, a local folder (relative to the sweep file) or a hub id."""
    name: str = ""
    revision: str | None = None
    dtype: DType = "float32"
    trust_remote_code: bool = False
    projector: ProjectorConfig = ProjectorConfig()


class TestSet(Settings):
    """One test set of a task."""

    name: str
    data: str
    """A manifest (JSONL) or `lab:NAME/SPLIT`."""
    in_domain: bool = True


class TaskEntry(Settings):
    """One task on one language or several, with its data."""

    task: Task
    language: str | list[str]
    """Code of the spoken language, or a list of them (one condition each)."""
    target_language: str | None = None
    """Language of the translation (`ast` only)."""
    data: str | None = None
    """`lab:NAME`: brings train, dev, test and out-of-domain test sets with it."""
    train: str | None = None
    """Training manifest (JSONL), or `lab:NAME/SPLIT`. `{language}` is filled in."""
    dev: str | None = None
    """Held-out data the maps are measured on."""
    test: list[TestSet] | None = None

    @field_validator("language")
    @classmethod
    def _known(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("no language given")
        for code in [value] if isinstance(value, str) else value:
            _language(code)
        return value

    @field_validator("target_language")
    @classmethod
    def _known_target(cls, value: str | None) -> str | None:
        if value is not None:
            _language(value)
        return value

    @model_validator(mode="after")
    def _whole(self) -> "TaskEntry":
        if self.task == "ast" and self.target_language is None:
            raise ValueError("task ast needs target_language, the language to translate into")
        if self.task == "asr" and self.target_language is not None:
            raise ValueError("task asr has no target_language: remove it, or use task: ast")
        if self.task == "ast" and self.target_language in self.languages:
            raise ValueError("target_language must differ from language")
        parts = [self.train, self.dev, self.test]
        if self.data is not None:
            if any(part is not None for part in parts):
                raise ValueError("give either data, or train, dev and test; not both")
            if not self.data.startswith("lab:"):
                raise ValueError("data takes lab:NAME; for your own files give train, dev and test")
        elif not all(part for part in parts):
            raise ValueError("give data: lab:speech, or all three of train, dev and test")
        return self

    @property
    def languages(self) -> list[str]:
        """The spoken languages as a list."""
        return [self.language] if isinstance(self.language, str) else self.language


class SelectorEntry(Settings):
    """How the block to remove is chosen."""

    selector: SelectorName
    start: int | None = Field(None, ge=0)
    """First removed layer (`fixed` only)."""
    criterion: Criterion = "angular"
    """What `own` and `consensus` read from the maps: one of `maps.criteria`, or `damage` (with
    `maps.damage`)."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"selector": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _whole(self) -> "SelectorEntry":
        if (self.selector == "fixed") != (self.start is not None):
            raise ValueError("selector fixed needs start, and only fixed takes one")
        if self.criterion != "angular" and self.selector not in ("own", "consensus"):
            raise ValueError(f"selector {self.selector} reads no map: leave criterion out")
        return self

    @property
    def label(self) -> str:
        """`own`, `consensus-damage`, …, `fixed-5`."""
        if self.criterion != "angular":
            return f"{self.selector}-{self.criterion}"
        return self.selector if self.start is None else f"{self.selector}-{self.start}"


class HealEntry(HealSettings):
    """Healing: which modes, at one matched budget."""

    modes: list[HealMode] = Field(default=["none", "decoder", "joint"], min_length=1)


class MapEntry(MapSettings):
    """Maps, and which of them the selectors read."""

    pool: Pool = "all"
    """Token pool the selectors and the consensus read."""
    text: bool = True
    """Also map the decoder on transcripts in place of speech, before and after adaptation."""
    damage: DamageSettings | None = None
    """Also measure the damage of skipping each block on speech, and hold the other criteria against
    it; `true` for the defaults."""

    @field_validator("damage", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    def pool_of(self, criterion: Criterion) -> Pool:
        """The token pool a selector reads for a criterion."""
        return "target" if criterion == "damage" else self.pool


class Sharing(Settings):
    """What is trained once for several conditions."""

    base: bool = True
    """One multi-task base for all tasks and languages of a (model, encoder)."""
    heal: bool = False
    """One multi-task heal, scored per condition; needs selectors that give all conditions one
    block (any but `own`)."""


class ReportSettings(Settings):
    """What the report calls good enough."""

    tolerance: float = Field(1.0, ge=0)
    """Points of WER or BLEU a pruned model may lose against the equally healed control."""


class Resources(Settings):
    """What one job takes."""

    cpus: float = Field(1.0, gt=0)
    """CPU cores (and threads) a job."""
    gpus: float | None = Field(None, ge=0)
    """GPUs a job; None: one where the cluster has GPUs, else none."""
    gpu_memory_gib: float | None = Field(None, gt=0)
    """Memory of one GPU in GiB, which `plan` holds every job against. Changes no result."""
    checkpoint_minutes: float | None = Field(5.0, ge=0)
    """A job that is killed while it trains or decodes goes on from what it kept this often; 0: after
    each step, null: never. Changes no result."""


class Sweep(Settings):
    """A whole sweep file."""

    name: str
    """Names the run folder `runs/<name>/`."""
    models: list[ModelEntry] = Field(min_length=1)
    encoders: list[EncoderEntry] = Field(default=[])
    tasks: list[TaskEntry] = Field(min_length=1)
    depths: list[int] = Field(min_length=1)
    """Numbers of layers to remove; 0 is the unpruned control and always part of a sweep."""
    selectors: list[SelectorEntry] = Field(
        default=[SelectorEntry(selector="consensus")], min_length=1
    )
    seeds: list[int] = Field(default=[0], min_length=1)
    """Seeds of healing (and of the `random` selector)."""
    heal: HealEntry = HealEntry()
    adapt: AdaptSettings = AdaptSettings()
    maps: MapEntry = MapEntry()
    evaluate: DecodeSettings = DecodeSettings()
    prompts: PromptSettings = PromptSettings()
    share: Sharing = Sharing()
    report: ReportSettings = ReportSettings()
    resources: Resources = Resources()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("use letters, digits, '.', '_' and '-' (it names a folder)")
        return value

    @field_validator("models", "encoders", mode="after")
    @classmethod
    def _named(cls, entries: list[Any]) -> list[Any]:
        named = []
        for entry in entries:
            reference = entry.reference if isinstance(entry, ModelEntry) else entry.encoder
            name = entry.name or reference.rstrip("/").split("/")[-1].removeprefix("lab:")
            if not NAME.fullmatch(name):
                raise ValueError(f"name {name!r}: use letters, digits, '.', '_' and '-'")
            named.append(entry.model_copy(update={"name": name}))
        names = [entry.name for entry in named]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two entries are called {twice[0]}: give each its own name")
        return named

    @field_validator("depths")
    @classmethod
    def _ordered(cls, value: list[int]) -> list[int]:
        if any(depth < 0 for depth in value):
            raise ValueError("a depth is a number of layers: 0 or more")
        return sorted({0, *value})

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError("the same seed stands twice")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Sweep":
        decoders = any(entry.decoder is not None for entry in self.models)
        if decoders and not self.encoders:
            raise ValueError("encoders is required: each decoder is joined with each of them")
        if self.encoders and not decoders:
            raise ValueError(
                "encoders are for models given as decoder, but every model here is a speechllm, "
                "which has its own: remove encoders"
            )
        if self.share.heal and any(entry.selector == "own" for entry in self.selectors):
            raise ValueError(
                "share.heal heals all conditions on one block, but selector own gives each its own:"
                " use consensus, last, random or fixed, or set share.heal: false"
            )
        if self.share.heal and not self.share.base:
            raise ValueError("share.heal: true needs share.base: true (there is one base to heal)")
        labels = [condition.label for condition in self.conditions()]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"condition {twice[0]} stands twice under tasks")
        if self.maps.pool not in self.maps.pools:
            raise ValueError(f"maps.pool {self.maps.pool} is not among maps.pools")
        for entry in self.selectors:
            self._check_criterion(entry)
        return self

    def _check_criterion(self, entry: SelectorEntry) -> None:
        maps, name = self.maps, f"selector {entry.label}"
        if entry.selector not in ("own", "consensus"):
            return
        if entry.criterion == "damage":
            if maps.damage is None:
                raise ValueError(f"{name} needs damage maps: set maps.damage: true")
            missing = [d for d in self.depths if d and d not in (maps.damage.depths or self.depths)]
            if missing:
                raise ValueError(f"{name} needs depth {missing[0]} among maps.damage.depths")
        elif entry.criterion not in maps.criteria:
            raise ValueError(f"{name} needs {entry.criterion} among maps.criteria")
        elif entry.criterion == "cka" and maps.pool == "last":
            raise ValueError(
                f"{name}: cka needs several tokens, and pool last has one: set maps.pool"
            )

    def conditions(self) -> list[Condition]:
        """Every (task, language) the sweep names, in file order."""
        return [
            Condition(task=entry.task, source_language=code, target_language=entry.target_language)
            for entry in self.tasks
            for code in entry.languages
        ]


def _language(code: str) -> None:
    if code not in LANGUAGE_NAMES:
        near = difflib.get_close_matches(code.lower(), LANGUAGE_NAMES, n=1) or [
            key for key, name in LANGUAGE_NAMES.items() if name.lower() == code.lower()
        ]
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(LANGUAGE_NAMES)}"
        raise ValueError(f"unknown language {code!r} (two-letter codes){hint}")


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read and check a sweep file.

    Args:
        path: the YAML file.
        overrides: `a.b=c` settings (`--set`); `c` is read as YAML, list items are `a.0.b`.

    Raises:
        InvalidInput: anything wrong, each problem on its own line with its dotted path.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidInput(
            "no such sweep file", str(path), "see configs/ for examples to start from"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot be read: {error}", str(path)) from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise InvalidInput(f"not valid YAML: {problem}", line) from None
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"not valid YAML: {error}", str(path)) from None
    if not isinstance(raw, dict):
        raise InvalidInput("a sweep file is a mapping of settings (name: …, models: …)", str(path))
    for override in overrides:
        _override(raw, override)
    raw.setdefault("name", path.stem)
    return parse_sweep(raw)


def parse_sweep(raw: dict[str, Any]) -> Sweep:
    """Check a sweep given as plain data.

    Raises:
        InvalidInput: every problem found, a line each.
    """
    try:
        return Sweep.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors(include_url=False)]
        raise InvalidInput("\n".join(dict.fromkeys(lines))) from None


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise InvalidInput(f"--set {override}: write it as a.b=value", remedy="e.g. heal.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InvalidInput(f"--set {override}: the value is not valid YAML") from None
    place: Any = raw
    *parents, last = path.split(".")
    for part in parents:
        place = _step(place, part, override)
    if isinstance(place, list):
        if not (last.isdigit() and int(last) < len(place)):
            raise InvalidInput(f"--set {override}: no item {last} in that list of {len(place)}")
        place[int(last)] = value
    else:
        place[last] = value


def _step(place: Any, part: str, override: str) -> Any:
    if isinstance(place, list):
        if not (part.isdigit() and int(part) < len(place)):
            raise InvalidInput(f"--set {override}: no item {part} in that list of {len(place)}")
        inner = place[int(part)]
    else:
        inner = place.setdefault(part, {})
        if inner is None:
            inner = place[part] = {}
    if not isinstance(inner, (dict, list)):
        raise InvalidInput(f"--set {override}: {part} is a value, not a group of settings")
    return inner


def dotted(location: Sequence[int | str]) -> str:
    """`("tasks", 2, "language")` as `sweep.tasks[2].language`."""
    path = "sweep"
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path


def _explain(item: Any) -> str:
    location: tuple[int | str, ...] = item["loc"]
    # Union branches put the branch's type name into the path; a user's file has no such key.
    location = tuple(p for p in location if p not in ("str", "list[str]") and "[" not in str(p))
    where, kind = dotted(location), item["type"]
    if kind == "extra_forbidden":
        names = _fields_at(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(names)}"
        return f"{where}: unknown key ({hint})"
    if kind == "missing":
        return f"{where}: required, but not given"
    message = item["msg"].removeprefix("Value error, ")
    given = item.get("input")
    if kind != "value_error" and isinstance(given, (str, int, float, bool)):
        message += f" (got {given!r})"
    return f"{where}: {message}"


def _fields_at(location: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] | None = Sweep
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model is not None else None
        model = _settings_in(field.annotation) if field is not None else None
    return list(model.model_fields) if model is not None else []


def _settings_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _settings_in(inner)
        if found is not None:
            return found
    return None
