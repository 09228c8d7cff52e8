"""Adapters of a cut model: their weights and settings renumbered by layer, and proven to fit.

peft loads an adapter onto a model with other layers without a word, and every layer then gets
another one's weights. So the adapter is put onto the model without weights before and after the
cut: what it changes there, with which rank and scaling, must be what its file holds.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from workers.errors import InvalidInput, first_line
from workers.surgery.cut import remove_layers
from workers.surgery.decoder_parts import decoder_layers, decoder_parts
from workers.surgery.model_cut import kept_layers
from workers.surgery.model_files import ADAPTER, ADAPTER_CONFIG, read_json, write_json
from workers.surgery.shards import StoredTensor, copy_tensors, digest_of, read_headers, renumbered
from workers.surgery.skeleton import model_class, read_config, skeleton

_OUTER = "base_model.model."
"""What peft puts before a module's name in files."""


@dataclass(frozen=True)
class Placed:
    """What an adapter is on a model."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of its weights inside the decoder's layers, names relative to the layers."""
    strengths: Mapping[str, tuple[int, float, float]]
    """Rank, alpha and scaling of each LoRA module, by the module's name."""
    modules: tuple[str, ...]
    """Every module it changes."""


def adapter_tensors(folder: Path) -> list[StoredTensor]:
    """The weights of an adapter folder, from its header.

    Raises:
        InvalidInput: there are none in safetensors, or they are damaged.
    """
    if not (folder / ADAPTER).is_file():
        raise InvalidInput(
            f"the adapter has no {ADAPTER}",
            str(folder),
            "save it as safetensors; pickled weights are not read",
        )
    return read_headers([folder / ADAPTER])


class Adapter:
    """An adapter folder beside the uncut model it belongs to."""

    def __init__(self, folder: Path, base: Path, *, trust_remote_code: bool = False) -> None:
        """Reads the adapter, and makes sure that it belongs to this model.

        Args:
            folder: the adapter's.
            base: folder of the uncut model.
            trust_remote_code: let the model folder's own code run.

        Raises:
            InvalidInput: it is damaged, of a kind that has no layers, or of another model.
        """
        self.folder, self.base, self.trust = folder, base, trust_remote_code
        self.settings = read_json(folder / ADAPTER_CONFIG)
        self.config = _peft_config(folder)
        self._refuse_what_has_no_layers()
        self.tensors = adapter_tensors(folder)
        self._whole = self._skeleton(base, self.config)
        self.path = decoder_parts(self._whole).path.removeprefix(_OUTER)
        self.prefix = self._prefix_in_file(_placed(self._whole, self.path))

    def remap(self, removed: Sequence[int], cut: Path, out: Path, base_name: str) -> None:
        """Writes the adapter of the cut model: weights byte for byte, in their new places.

        Args:
            removed: layers that were removed.
            cut: folder of the cut model.
            out: receives weights and settings.
            base_name: where the settings say the model is, as seen from `out`.

        Raises:
            InvalidInput: nothing would be left of it, or its settings cannot express the cut.
        """
        kept = kept_layers(len(decoder_layers(self._whole)), removed)
        remove_layers(self._whole, removed)
        wanted = _placed(self._whole, self.path)
        if not wanted.modules:
            raise InvalidInput(
                "every layer the adapter changes would be removed",
                str(self.folder),
                "prune the model without it, or choose other layers",
            )
        out.mkdir(parents=True, exist_ok=True)
        self._write_settings(kept, wanted, cut, out, base_name)
        plan = {
            new: tensor
            for tensor in self.tensors
            if (new := renumbered(tensor.name, self.prefix, kept)) is not None
        }
        digests = copy_tensors(plan, out / ADAPTER)
        for tensor in read_headers([out / ADAPTER]):
            if digest_of(tensor) != digests.pop(tensor.name, None):
                raise InvalidInput(
                    f"{tensor.name} differs from its source", str(out), "is the disk in order?"
                )

    def _write_settings(
        self, kept: Sequence[int], wanted: Placed, cut: Path, out: Path, base_name: str
    ) -> None:
        common = {"base_model_name_or_path": base_name, "revision": None}
        for changes in (self._renumbered_settings(kept), self._named_one_by_one(wanted)):
            if changes is None:
                continue
            write_json(out / ADAPTER_CONFIG, self.settings | common | changes)
            try:
                got = _placed(self._skeleton(cut, _peft_config(out)), self.path)
            except InvalidInput:
                continue
            if got == wanted:
                return
        raise InvalidInput(
            "the adapter's settings cannot be renumbered: on the cut model they would change other "
            "modules",
            str(self.folder / ADAPTER_CONFIG),
            "merge it first (--merge-adapter)",
        )

    def _renumbered_settings(self, kept: Sequence[int]) -> dict[str, Any] | None:
        """The smallest change: enough wherever layers are not named one by one."""
        layers = self.settings.get("layers_to_transform")
        if layers is None or layers == []:
            return {}
        chosen = [layers] if isinstance(layers, int) else layers
        new = [kept.index(i) for i in chosen if i in kept]
        return {"layers_to_transform": new} if new else None

    def _named_one_by_one(self, wanted: Placed) -> dict[str, Any] | None:
        """Settings that name every module with its rank: for patterns that speak of layers."""
        if self.config.peft_type != "LORA":
            return None
        ranks = {n: r for n, (r, _, _) in wanted.strengths.items() if r != self.config.r}
        alphas = {n: a for n, (_, a, _) in wanted.strengths.items() if a != self.config.lora_alpha}
        return {
            "target_modules": sorted(wanted.modules),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "rank_pattern": {re.escape(name): rank for name, rank in ranks.items()},
            "alpha_pattern": {re.escape(name): alpha for name, alpha in alphas.items()},
        }

    def _refuse_what_has_no_layers(self) -> None:
        kind = str(getattr(self.config.peft_type, "value", self.config.peft_type))
        if self.config.is_prompt_learning or not hasattr(self.config, "target_modules"):
            raise InvalidInput(
                f"an adapter of the kind {kind} does not sit inside the layers and cannot be cut "
                "with them",
                str(self.folder),
                "prune the model without it, and train it anew",
            )
        if getattr(self.config, "layer_replication", None):
            raise InvalidInput(
                "the adapter runs layers several times (layer_replication): they share weights and "
                "cannot be cut",
                str(self.folder / ADAPTER_CONFIG),
                "prune the model without it",
            )

    def _prefix_in_file(self, placed: Placed) -> str:
        """What the file calls the decoder's layers: under one name only lies what the model asks for.

        Older releases of transformers named the modules of multimodal models otherwise.
        """
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        usual = _OUTER + self.path
        numbered = {m[1] for name in shapes if (m := re.match(r"(.+?)\.\d+\.", name))}
        found = [p for p in {usual, *numbered} if _inside(shapes, p) == placed.shapes]
        if usual in found or len(found) == 1:
            return usual if usual in found else found[0]
        stored = _inside(shapes, usual)
        count = len(decoder_layers(self._whole))
        highest = max((int(name.partition(".")[0]) for name in stored), default=0)
        if highest >= count:
            problem = f"it has weights for layer {highest}, the decoder has {count} layers"
        else:
            name = min(
                n
                for n in stored.keys() | placed.shapes.keys()
                if stored.get(n) != placed.shapes.get(n)
            )
            ours, theirs = stored.get(name), placed.shapes.get(name)
            problem = f"layer {name} " + (
                "is missing in its file"
                if ours is None
                else "has no place in the model"
                if theirs is None
                else f"is {list(ours)}, not {list(theirs)}"
            )
        raise InvalidInput(
            f"the adapter does not belong to this model: {problem}",
            str(self.folder),
            "use the model it was trained on",
        )

    def _skeleton(self, folder: Path, config: PeftConfig) -> PeftModel:
        own = read_config(folder, trust_remote_code=self.trust)
        kind = model_class(own, folder, trust_remote_code=self.trust)
        model = skeleton(kind, own)
        settings = deepcopy(config)
        if hasattr(settings, "init_lora_weights"):
            # Some ways to begin decompose the weights, of which there are none here.
            settings.init_lora_weights = False
        try:
            # A setting that no longer matches is for the comparison to judge, not for a warning.
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                return PeftModel(model, settings, low_cpu_mem_usage=True)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise InvalidInput(
                f"the adapter does not fit the model: {first_line(error)}", str(self.folder)
            ) from error


def _peft_config(folder: Path) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"the adapter's settings cannot be used: {first_line(error)}",
            str(folder / ADAPTER_CONFIG),
        ) from error


def _placed(model: PeftModel, path: str) -> Placed:
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    changed = {
        name: module
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    strengths = {
        name: (module.r["default"], module.lora_alpha["default"], module.scaling["default"])
        for name, module in changed.items()
        if isinstance(module, LoraLayer)
    }
    shapes = _inside({name: tuple(t.shape) for name, t in state.items()}, _OUTER + path)
    return Placed(shapes, strengths, tuple(changed))


def _inside(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    head = f"{prefix}."
    return {n.removeprefix(head): shape for n, shape in shapes.items() if n.startswith(head)}
