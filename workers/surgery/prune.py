"""`prune`: leave layers out of whatever a model reference names, into a folder that opens as before.

A plain model is cut as it is. Around it there may be an adapter, which is renumbered (or merged
first), or the folder of a SpeechLLM, whose encoder and projector are copied. All is written to a
temporary sibling of the output, checked there, and renamed.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from workers.errors import InvalidInput
from workers.model_folder import ModelKind, model_kind
from workers.speechllm import SpeechLLM
from workers.surgery.adapters import Adapter, adapter_tensors
from workers.surgery.cut import remove_layers
from workers.surgery.gate import probe_inputs, reload_gate, same_model
from workers.surgery.model_cut import (
    CutModel,
    NotStreamable,
    Step,
    cut_in_memory,
    cut_streamed,
    open_for_cutting,
)
from workers.surgery.model_files import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    WEIGHTS,
    ModelFiles,
    copy_companions,
    fetch,
    new_folder,
    read_json,
    refuse_in_use,
    refuse_quantised,
    weight_files,
    write_json,
)
from workers.surgery.provenance import write_provenance
from workers.surgery.shards import read_headers
from workers.surgery.skeleton import model_class, opener, quiet_transformers, read_config

Check = Literal["stored", "full"]
DTYPES = ("auto", "float32", "bfloat16", "float16")
PROJECTOR = "projector.safetensors"
DESCRIPTION = "speechllm.json"


@dataclass(frozen=True)
class PruneSettings:
    """How to prune, where there is a choice."""

    revision: str | None = None
    """Of a hub repository."""
    dtype: str = "auto"
    """Of the written weights; `auto`: as stored."""
    streamed: bool | None = None
    """Copy byte ranges of the weight files (True), or open the model (False); None: the first,
    unless it is impossible."""
    merge_adapter: bool = False
    """Merge an adapter into the model before cutting."""
    check: Check | None = None
    """`stored`: compare what was written without loading it; `full`: run it as well. None: `full`
    if the model is in memory anyway."""
    trust_remote_code: bool = False
    """Let the model's own code run, and take it along."""


@dataclass(frozen=True)
class PruneReport:
    """What was done. Pairs are before and after."""

    source: str
    commit: str | None
    kind: ModelKind
    out: str
    removed: list[int]
    layers: tuple[int, int]
    parameters: tuple[int, int]
    """Of all weights in the folder, tied ones counted once."""
    weight_bytes: tuple[int, int]
    """Of all tensors in safetensors files."""
    streamed: bool
    in_memory_because: str | None
    """Why the model had to be in memory, where it was not asked for."""
    adapter: str | None
    """Where the renumbered adapter lies."""
    checks: list[str]
    left_out: list[str]
    """Files beside the source's weights that were not taken along."""


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a model lie, and where those of the cut one go."""

    kind: ModelKind
    root: Path
    base: Path
    """Folder of the model that holds the decoder."""
    adapter: Path | None = None
    base_place: str = "."
    """Of the cut model, below the output folder."""
    adapter_place: str = "."
    base_name: str = "."
    """Of the cut model, as seen from its adapter."""


def prune(
    reference: str,
    removed: Sequence[int],
    out: Path,
    settings: PruneSettings | None = None,
    step: Step | None = None,
) -> PruneReport:
    """Writes a model without some of its decoder's layers.

    Args:
        reference: a folder or a hub id.
        removed: numbers of the layers, from 0, in any order.
        out: new or empty; its parents are made.
        settings: how.
        step: told what is done, with bytes done and in all.

    Raises:
        InvalidInput: there is no such model, it can't be cut there, or a check fails. Nothing is
            left in `out` then.
    """
    settings = settings or PruneSettings()
    if settings.dtype not in DTYPES:
        raise InvalidInput(
            f"{settings.dtype!r} is none of the types", "--dtype", f"use {', '.join(DTYPES)}"
        )
    if settings.check not in (None, "stored", "full"):
        raise InvalidInput(f"{settings.check!r} is no check", "--check", "use stored or full")
    if not removed:
        raise InvalidInput("no layer is named", "--layers", "name at least one")
    refuse_in_use(out)
    trust = settings.trust_remote_code
    kind = model_kind(reference, settings.revision)
    files = fetch(reference, settings.revision, trust_remote_code=trust)
    layout = _layout(kind, files, trust)
    _refuse_settings(layout, settings)
    refuse_quantised(layout.base)
    before = _Weights.read(layout.root, layout.base, layout.adapter)
    adapter = None
    if layout.adapter:
        # Before anything is written: does it belong to this model?
        adapter = Adapter(layout.adapter, layout.base, trust_remote_code=trust)
    with new_folder(out) as place:
        base, beside = place / layout.base_place, None
        _refuse_full_disk(place, before.size)
        cut, because, model = _cut(layout, removed, base, settings, step)
        checks = list(cut.checks)
        if adapter and not settings.merge_adapter:
            beside = place / layout.adapter_place
            adapter.remap(removed, base, beside, layout.base_name)
            checks.append("the adapter changes the same modules, with the same rank and scaling")
        left_out = _copy_the_rest(layout, place, settings)
        if kind == "speechllm":
            _describe(layout, place, cut.layers[1])
        source = {"reference": reference, "revision": files.commit, "kind": kind}
        write_provenance(place, source, cut.layers[0], sorted(removed), layout.root)
        if (settings.check or ("full" if model else "stored")) == "full":
            if step:
                step("running the pruned model beside the original", 0, 0)
            checks += _run(layout, removed, place, settings, model)
        after = _Weights.read(place, base, beside)
    return PruneReport(
        source=reference,
        commit=files.commit,
        kind=kind,
        out=str(out),
        removed=sorted(removed),
        layers=cut.layers,
        parameters=(cut.parameters[0] + before.beside, cut.parameters[1] + after.beside),
        weight_bytes=(before.size, after.size),
        streamed=model is None,
        in_memory_because=because,
        adapter=str(out / layout.adapter_place) if beside else None,
        checks=checks,
        left_out=left_out,
    )


@dataclass(frozen=True)
class _Weights:
    """What lies in the safetensors files of a model folder."""

    size: int
    """Bytes of all tensors."""
    beside: int
    """Numbers in tensors that are not the model's own: adapter, projector, encoder."""

    @classmethod
    def read(cls, root: Path, base: Path, adapter: Path | None) -> "_Weights":
        own = read_headers(weight_files(base))
        beside = adapter_tensors(adapter) if adapter else []
        if (root / PROJECTOR).is_file():
            beside += read_headers([root / PROJECTOR])
        if (root / "encoder").is_dir():
            beside += read_headers(weight_files(root / "encoder"))
        return cls(
            sum(tensor.size for tensor in (*own, *beside)),
            sum(tensor.elements for tensor in beside),
        )


def _layout(kind: ModelKind, files: ModelFiles, trust: bool) -> _Layout:
    root = files.folder
    if kind == "speechllm":
        base = root / "decoder"
        if not (base / CONFIG).is_file():
            raise InvalidInput(
                "there is no decoder in this folder",
                str(base),
                "name a folder that holds a whole SpeechLLM",
            )
        return _Layout(kind, root, base, root / "adapter", "decoder", "adapter", "../decoder")
    whole = (root / WEIGHTS).is_file() or (root / INDEX).is_file()
    if (root / ADAPTER_CONFIG).is_file() and (root / CONFIG).is_file() and whole:
        # transformers loads both from one folder; Granite-Speech is released so.
        return _Layout(kind, root, root, root)
    if kind == "adapter":
        settings = read_json(root / ADAPTER_CONFIG)
        name = str(settings.get("base_model_name_or_path") or "")
        if not name:
            raise InvalidInput(
                "the adapter does not say which model it belongs to",
                str(root / ADAPTER_CONFIG),
                "set base_model_name_or_path to a folder or a hub id",
            )
        beside = root / name
        reference = str(beside) if beside.is_dir() else name
        model_kind(reference, settings.get("revision"))
        base = fetch(reference, settings.get("revision"), trust_remote_code=trust).folder
        return _Layout(kind, root, base, root, adapter_place="adapter", base_name="..")
    return _Layout(kind, root, root)


def _refuse_settings(layout: _Layout, settings: PruneSettings) -> None:
    if settings.streamed and (settings.merge_adapter or settings.dtype != "auto"):
        option = "--merge-adapter" if settings.merge_adapter else "--dtype"
        raise InvalidInput(
            f"the model must be in memory for {option}", "--streamed", "leave one of the two out"
        )
    if not settings.merge_adapter:
        return
    if layout.kind in ("speechllm", "released"):
        raise InvalidInput(
            "the adapter of a SpeechLLM is a part of it and stays one",
            "--merge-adapter",
            "leave it out: the adapter goes with its layers",
        )
    if layout.adapter is None:
        raise InvalidInput("the model has no adapter", "--merge-adapter", "leave it out")


def _refuse_full_disk(place: Path, size: int) -> None:
    free = shutil.disk_usage(place).free
    if free < size:
        raise InvalidInput(
            f"{size / 1e9:.1f} GB may be needed, {free / 1e9:.1f} GB are free",
            str(place.parent),
            "name a folder on another disk",
        )


def _cut(
    layout: _Layout, removed: Sequence[int], out: Path, settings: PruneSettings, step: Step | None
) -> tuple[CutModel, str | None, PreTrainedModel | None]:
    """Cuts the model itself; also why it had to be in memory, and the model if it is there."""
    trust = settings.trust_remote_code
    out.mkdir(exist_ok=True)
    needed = settings.merge_adapter or settings.dtype != "auto"
    because = None
    if settings.streamed or (settings.streamed is None and not needed):
        try:
            streamed = cut_streamed(layout.base, removed, out, trust_remote_code=trust, step=step)
        except NotStreamable as error:
            if settings.streamed:
                raise
            because = error.problem
            for path in out.iterdir():
                path.unlink()
        else:
            return streamed, None, None
    merge = layout.adapter if settings.merge_adapter else None
    cut, model = cut_in_memory(
        layout.base,
        removed,
        out,
        dtype=_dtype(settings),
        merge=merge,
        trust_remote_code=trust,
        step=step,
    )
    return cut, because, model


def _copy_the_rest(layout: _Layout, place: Path, settings: PruneSettings) -> list[str]:
    trust = settings.trust_remote_code
    left = copy_companions(layout.base, place / layout.base_place, trust_remote_code=trust)
    if layout.root != layout.base:
        # What lies beside an adapter (its tokenizer) was used with it, and stays with it.
        apart = layout.kind == "adapter" and not settings.merge_adapter
        beside = place / layout.adapter_place if apart else place
        left += copy_companions(layout.root, beside, trust_remote_code=trust)
    if layout.kind == "speechllm":
        shutil.copyfile(layout.root / PROJECTOR, place / PROJECTOR)
        encoder = layout.root / "encoder"
        if encoder.is_dir():
            (place / "encoder").mkdir()
            for file in weight_files(encoder):
                shutil.copyfile(file, place / "encoder" / file.name)
            left += copy_companions(encoder, place / "encoder", trust_remote_code=trust)
            for name in (CONFIG, INDEX):
                if (encoder / name).is_file():
                    shutil.copyfile(encoder / name, place / "encoder" / name)
    return left


def _describe(layout: _Layout, place: Path, layers: int) -> None:
    description = read_json(layout.root / DESCRIPTION)
    description["decoder"] = {**description.get("decoder", {}), "layers": layers}
    write_json(place / DESCRIPTION, description)


def _run(
    layout: _Layout,
    removed: Sequence[int],
    place: Path,
    settings: PruneSettings,
    model: PreTrainedModel | None,
) -> list[str]:
    """The gate that runs both models; returns what was found to hold."""
    trust, base = settings.trust_remote_code, place / layout.base_place
    if model is None:
        model = open_for_cutting(layout.base, trust_remote_code=trust)
        remove_layers(model, removed)
    inputs = probe_inputs(model)
    if layout.adapter != layout.base:
        reload_gate(model, base, inputs, trust_remote_code=trust)
    del model
    if layout.adapter and not settings.merge_adapter:
        adapted, reloaded = _open_adapted(layout, place, settings)
        remove_layers(adapted, removed)
        same_model(adapted, reloaded, inputs, 8, str(place))
    return ["reopened, it gives the same logits bit for bit", "it decodes the same with the cache"]


def _open_adapted(
    layout: _Layout, place: Path, settings: PruneSettings
) -> tuple[nn.Module, nn.Module]:
    """The original and the pruned model, each with its adapter on."""
    trust, dtype = settings.trust_remote_code, _dtype(settings)
    if layout.kind == "speechllm":
        whole = SpeechLLM.from_pretrained(layout.root, dtype=dtype)
        return whole.decoder, SpeechLLM.from_pretrained(place, dtype=dtype).decoder
    opened = []
    for base, adapter in (
        (layout.base, layout.adapter),
        (place / layout.base_place, place / layout.adapter_place),
    ):
        if base == adapter:
            config = read_config(base, trust_remote_code=trust)
            kind = opener(model_class(config, base, trust_remote_code=trust), config)
            with quiet_transformers():
                model = kind.from_pretrained(
                    base, dtype=dtype, local_files_only=True, trust_remote_code=trust
                )
        else:
            plain = open_for_cutting(base, dtype=dtype, trust_remote_code=trust)
            model = PeftModel.from_pretrained(plain, str(adapter))
        opened.append(model.eval().requires_grad_(False))
    return opened[0], opened[1]


def _dtype(settings: PruneSettings) -> str | torch.dtype:
    return "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
