"""Cutting the model of one folder into another, in one of two ways.

*Streamed*: the cut is made on a model without weights, and of the weight files the byte ranges of
the layers that stay are copied. *In memory*: the model is opened, cut and saved. The folders hold
the same tensors and the same configuration; the first needs the memory of one buffer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from workers.errors import InvalidInput, first_line
from workers.surgery.cut import remove_layers
from workers.surgery.decoder_parts import decoder_parts, unique_parameters
from workers.surgery.gate import fit_gate, save_pruned, stored_gate
from workers.surgery.model_files import ADAPTER, ADAPTER_CONFIG, weight_files
from workers.surgery.shards import (
    Progress,
    StoredTensor,
    layer_prefixes,
    read_headers,
    renumbered,
    write_shards,
)
from workers.surgery.skeleton import (
    Fit,
    ModelClass,
    fit,
    model_class,
    opener,
    quiet_transformers,
    read_config,
    skeleton,
)

Step = Callable[[str, int, int], None]
"""Called with what is being done, and bytes done of bytes in all (0 of 0: not measured)."""


_FITTING = "names and shapes are what the configuration asks for"


class NotStreamable(InvalidInput):
    """This cut needs the model in memory."""


@dataclass(frozen=True)
class CutModel:
    """What a cut did to a model."""

    layers: tuple[int, int]
    """Of the decoder, before and after."""
    parameters: tuple[int, int]
    """Of the whole model, before and after, shared storage counted once."""
    checks: tuple[str, ...]
    """What was found to hold."""


@dataclass(frozen=True)
class _Checkpoint:
    """A folder's model before the cut: class, configuration, and what its headers say."""

    folder: Path
    config: PreTrainedConfig
    model: ModelClass
    tensors: tuple[StoredTensor, ...]
    trust_remote_code: bool

    @classmethod
    def read(cls, folder: Path, trust_remote_code: bool) -> "_Checkpoint":
        config = read_config(folder, trust_remote_code=trust_remote_code)
        model = model_class(config, folder, trust_remote_code=trust_remote_code)
        tensors = tuple(read_headers(weight_files(folder)))
        return cls(folder, config, model, tensors, trust_remote_code)


def kept_layers(count: int, removed: Sequence[int]) -> tuple[int, ...]:
    """Numbers of the layers that stay, lowest first."""
    return tuple(i for i in range(count) if i not in removed)


def cut_streamed(
    source: Path,
    removed: Sequence[int],
    out: Path,
    *,
    trust_remote_code: bool = False,
    step: Step | None = None,
) -> CutModel:
    """Copies a model folder's weights and configuration without some layers, file by file.

    Args:
        source: a folder with `config.json` and safetensors.
        removed: layers to leave out.
        out: receives weights, `config.json` and, where the source has none, `generation_config.json`.
        trust_remote_code: let the folder's own code run.
        step: told what is done.

    Raises:
        NotStreamable: it can't be told safely which tensors belong to which layer.
        InvalidInput: the folder is damaged, or the architecture can't be cut.
    """
    before = _Checkpoint.read(source, trust_remote_code)
    try:
        model = skeleton(before.model, before.config)
    except InvalidInput as error:
        raise NotStreamable(error.problem, str(source)) from error
    count = len(decoder_parts(model).layers)
    kept = kept_layers(count, removed)
    parameters = unique_parameters(model)[0]
    remove_layers(model, removed)
    after = unique_parameters(model)[0]
    names = {tensor.name: tensor for tensor in before.tensors}
    whole = _fit_of(before, names)
    _refuse_incomplete(whole, source)
    prefix = _layers_in_files(before, model.config, names, count, kept, whole)
    plan = {
        new: tensor
        for name, tensor in names.items()
        if (new := renumbered(name, prefix, kept)) is not None
    }
    digests = write_shards(
        plan, out, parameters=after, progress=_progress(step, "copying the layers that stay")
    )
    _write_configuration(before, model.config, out)
    if step:
        step("comparing every tensor with its source", 0, 0)
    reread = read_config(out, trust_remote_code=trust_remote_code)
    written = {tensor.name: tensor for tensor in read_headers(weight_files(out))}
    stored_gate(before.model, reread, written, plan, digests, str(out))
    return CutModel(
        (count, len(kept)),
        (parameters, after),
        (
            f"all {len(plan)} stored tensors are byte for byte their sources",
            _FITTING,
            _fewer(parameters - after),
        ),
    )


def open_for_cutting(
    source: Path, *, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a folder in memory, in evaluation mode; an adapter beside it is left alone.

    Raises:
        InvalidInput: it cannot be opened, or weights are missing.
    """
    before = _Checkpoint.read(source, trust_remote_code)
    try:
        with _without_adapter(source) as place, quiet_transformers():
            model, report = opener(before.model, before.config).from_pretrained(
                place,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # a damaged folder fails in any way it likes
        raise InvalidInput(f"it cannot be opened: {first_line(error)}", str(source)) from error
    _refuse_incomplete(Fit(tuple(sorted(report["missing_keys"])), (), ()), source)
    model.eval().requires_grad_(False)
    return model


def cut_in_memory(
    source: Path,
    removed: Sequence[int],
    out: Path,
    *,
    dtype: str | torch.dtype = "auto",
    merge: Path | None = None,
    trust_remote_code: bool = False,
    step: Step | None = None,
) -> tuple[CutModel, PreTrainedModel]:
    """Opens a model folder, merges an adapter where one is given, cuts and saves.

    Args:
        source: as for `cut_streamed`.
        removed: layers to leave out.
        out: as for `cut_streamed`.
        dtype: of the weights; `auto`: as stored.
        merge: folder of an adapter that belongs to the uncut model.
        trust_remote_code: let the folder's own code run.
        step: told what is done.

    Returns:
        What was done, and the cut model, for the gate.

    Raises:
        InvalidInput: the folder is damaged, or the architecture can't be cut.
    """
    say = step or _silent
    say("opening the model", 0, 0)
    model = open_for_cutting(source, dtype=dtype, trust_remote_code=trust_remote_code)
    if merge is not None:
        say("merging the adapter", 0, 0)
        try:
            model = PeftModel.from_pretrained(model, str(merge)).merge_and_unload(safe_merge=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InvalidInput(
                f"the adapter cannot be merged: {first_line(error)}", str(merge)
            ) from error
        model.eval().requires_grad_(False)
    parts = decoder_parts(model)
    count, parameters = len(parts.layers), unique_parameters(model)[0]
    say("cutting and saving", 0, 0)
    remove_layers(model, removed)
    after = unique_parameters(model)[0]
    if not trust_remote_code:
        vars(model.config).pop("auto_map", None)
    if (source / "generation_config.json").is_file():
        # The source's own is taken along as it is; some released ones would be refused on saving.
        model.generation_config = GenerationConfig()
    with quiet_transformers():
        save_pruned(model, None, out)
    reread = read_config(out, trust_remote_code=trust_remote_code)
    written = {tensor.name: tensor for tensor in read_headers(weight_files(out))}
    fit_gate(type(model), reread, written, str(out))
    checks = (_FITTING, _fewer(parameters - after))
    return CutModel((count, len(parts.layers)), (parameters, after), checks), model


def _fewer(count: int) -> str:
    return f"{count:,} parameters fewer: exactly those of the removed layers"


def _fit_of(before: _Checkpoint, names: Mapping[str, StoredTensor]) -> Fit:
    try:
        return fit(before.model, before.config, {n: t.on_meta() for n, t in names.items()})
    except InvalidInput as error:
        raise NotStreamable(error.problem, str(before.folder)) from error


def _refuse_incomplete(found: Fit, source: Path) -> None:
    for kind, names in (("missing", found.missing), ("of another shape", found.mismatched)):
        if names:
            raise InvalidInput(
                f"{len(names)} weights are {kind}, such as {names[0]}",
                str(source),
                "copy or download the model again",
            )


def _layers_in_files(
    before: _Checkpoint,
    config: PreTrainedConfig,
    names: Mapping[str, StoredTensor],
    count: int,
    kept: Sequence[int],
    whole: Fit,
) -> str:
    """What the decoder's layers are called in the files: the one name whose cut fits the cut model."""
    fitting = []
    for prefix in layer_prefixes(names, count):
        tensors = {
            new: tensor.on_meta()
            for name, tensor in names.items()
            if (new := renumbered(name, prefix, kept)) is not None
        }
        try:
            found = fit(before.model, config, tensors)
        except InvalidInput:
            continue
        if (
            not found.missing
            and not found.mismatched
            and len(found.unexpected) <= len(whole.unexpected)
        ):
            fitting.append(prefix)
    if len(fitting) != 1:
        raise NotStreamable(
            f"{len(fitting)} lists of tensors in the files could be the decoder's {count} layers",
            str(before.folder),
        )
    return fitting[0]


def _write_configuration(before: _Checkpoint, config: PreTrainedConfig, out: Path) -> None:
    config.architectures = [before.model.__name__]
    if not before.trust_remote_code:
        vars(config).pop("auto_map", None)
    try:
        config.save_pretrained(out)
        if not (before.folder / "generation_config.json").is_file():
            # Older folders keep generation settings in config.json, and transformers reads them there.
            GenerationConfig.from_pretrained(
                before.folder, config_file_name="config.json", _from_model_config=True
            ).save_pretrained(out)
    except Exception as error:  # configurations check themselves, each in its own way
        raise InvalidInput(
            f"the cut configuration cannot be saved: {first_line(error)}", str(before.folder)
        ) from error


@contextmanager
def _without_adapter(source: Path) -> Iterator[Path]:
    """A view of a folder in which transformers finds no adapter to load with the model."""
    if not (source / ADAPTER_CONFIG).is_file():
        yield source
        return
    with TemporaryDirectory() as view:
        for path in source.iterdir():
            if path.name not in (ADAPTER_CONFIG, ADAPTER):
                (Path(view) / path.name).symlink_to(path.absolute())
        yield Path(view)


def _progress(step: Step | None, what: str) -> Progress | None:
    return None if step is None else lambda done, total: step(what, done, total)


def _silent(*_: Any) -> None:
    pass
