"""A pruned adapter does to the pruned model what it did to the whole one with those layers skipped."""

import copy
import json

import pytest
import torch
import transformers as hf
from model_folders import logits, skipping
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from tiny_decoders import tiny_lm
from tiny_speechllm import tiny_tokenizer

from workers.errors import InvalidInput
from workers.model_folder import open_model
from workers.surgery.prune import PruneSettings, prune

REMOVED = [0, 2]
ADAPTERS = {
    "names of modules": LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "some layers": LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1, 2, 5]),
    "one layer": LoraConfig(
        r=2, target_modules=["q_proj"], layers_to_transform=5, layers_pattern="layers"
    ),
    "ranks by layer": LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"],
        rank_pattern={r"model.layers.[34].self_attn.q_proj": 4, "v_proj": 3},
        alpha_pattern={"layers.4.self_attn.v_proj": 16}, use_rslora=True,
    ),
    "a pattern with layers": LoraConfig(
        r=2, target_modules=r"model\.layers\.(1|3|4)\.self_attn\.(q|k)_proj"
    ),
    "modules one by one": LoraConfig(
        r=2, target_modules=["model.layers.3.mlp.up_proj", "4.self_attn.q_proj"]
    ),
    "all but one": LoraConfig(
        r=2, target_modules="all-linear", exclude_modules=["model.layers.3.mlp.up_proj"],
        use_dora=True,
    ),
    "a whole head": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "no LoRA": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_lm("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def adapted(base, folder, config):
    """A trained adapter in `folder`, and the model that carries it."""
    torch.manual_seed(0)
    plain = hf.AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(plain, copy.deepcopy(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_way_to_place_an_adapter_is_renumbered(kind, base, tmp_path):
    model = adapted(base, tmp_path / "adapter", ADAPTERS[kind])
    expected = skipping(model, REMOVED)
    assert not torch.equal(expected, skipping(tiny_lm("llama"), REMOVED))
    report = prune(str(tmp_path / "adapter"), REMOVED, tmp_path / "cut")
    assert (report.kind, report.layers, report.streamed) == ("adapter", (6, 4), True)
    # Plain transformers and peft, and our own commands.
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    reopened = PeftModel.from_pretrained(plain, tmp_path / "cut" / "adapter")
    assert torch.equal(logits(reopened), expected)
    assert torch.equal(logits(open_model(report.adapter).decoder), expected)
    fewer = report.parameters[0] - report.parameters[1]
    assert fewer == sum(
        p.numel()
        for name, p in model.named_parameters()
        if any(f".layers.{i}." in name for i in REMOVED)
    )


def test_settings_stay_as_they_are_where_no_layer_is_named(base, tmp_path):
    adapted(base, tmp_path / "adapter", ADAPTERS["names of modules"])
    prune(str(tmp_path / "adapter"), [1], tmp_path / "cut")
    before, after = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path / "adapter", tmp_path / "cut" / "adapter")
    )
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"base_model_name_or_path"}
    assert after["base_model_name_or_path"] == ".."


def test_an_adapter_is_merged_on_request(base, tmp_path):
    model = adapted(base, tmp_path / "adapter", ADAPTERS["ranks by layer"])
    expected = skipping(model, REMOVED)
    settings = PruneSettings(merge_adapter=True)
    report = prune(str(tmp_path / "adapter"), REMOVED, tmp_path / "cut", settings)
    assert (report.adapter, report.streamed) == (None, False)
    assert not (tmp_path / "cut" / "adapter").exists()
    opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    torch.testing.assert_close(logits(opened), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(InvalidInput, match="has no adapter"):
        prune(str(base), [1], tmp_path / "no", settings)


def test_the_full_check_runs_the_adapter(base, tmp_path):
    adapted(base, tmp_path / "adapter", ADAPTERS["all but one"])
    report = prune(str(tmp_path / "adapter"), [4], tmp_path / "cut", PruneSettings(check="full"))
    assert "reopened, it gives the same logits bit for bit" in report.checks


class TestRefused:
    def refuse(self, folder, match, removed=REMOVED, settings=None):
        out = folder.parent / "out"
        with pytest.raises(InvalidInput, match=match) as caught:
            prune(str(folder), removed, out, settings)
        assert not out.exists()
        return caught.value

    @pytest.mark.parametrize("settings", [None, PruneSettings(merge_adapter=True)])
    def test_an_adapter_of_a_deeper_or_shallower_model(self, settings, base, tmp_path):
        """peft would load it without a word."""
        for layers, message in ((8, "weights for layer 7, the decoder has 6"), (4, "is missing")):
            tiny_lm("llama", layers).save_pretrained(tmp_path / f"other{layers}")
            folder = tmp_path / f"adapter{layers}"
            adapted(tmp_path / f"other{layers}", folder, ADAPTERS["names of modules"])
            config = json.loads((folder / "adapter_config.json").read_text())
            config["base_model_name_or_path"] = str(base)
            (folder / "adapter_config.json").write_text(json.dumps(config))
            error = self.refuse(folder, message, settings=settings)
            assert error.remedy == "use the model it was trained on"

    def test_layers_that_are_run_twice(self, base, tmp_path):
        config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 4], [2, 6]])
        adapted(base, tmp_path / "adapter", config)
        self.refuse(tmp_path / "adapter", "layer_replication")

    def test_adapters_outside_the_layers(self, base, tmp_path):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        adapted(base, tmp_path / "adapter", config)
        self.refuse(tmp_path / "adapter", "PREFIX_TUNING does not sit inside the layers")

    def test_settings_that_cannot_say_it(self, base, tmp_path):
        config = AdaLoraConfig(
            init_r=2, target_r=2, total_step=10, target_modules=r".*layers\.[45]\.mlp\.up_proj"
        )
        adapted(base, tmp_path / "adapter", config)
        error = self.refuse(tmp_path / "adapter", "settings cannot be renumbered")
        assert "--merge-adapter" in error.remedy

    def test_nothing_would_be_left(self, base, tmp_path):
        config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 2])
        adapted(base, tmp_path / "adapter", config)
        self.refuse(tmp_path / "adapter", "every layer the adapter changes would be removed")

    def test_pickled_weights(self, base, tmp_path):
        adapted(base, tmp_path / "adapter", ADAPTERS["names of modules"])
        (tmp_path / "adapter" / "adapter_model.safetensors").rename(
            tmp_path / "adapter" / "adapter_model.bin"
        )
        self.refuse(tmp_path / "adapter", "no adapter_model.safetensors")

    def test_a_base_that_is_not_there(self, base, tmp_path):
        adapted(base, tmp_path / "adapter", ADAPTERS["names of modules"])
        file = tmp_path / "adapter" / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
        self.refuse(tmp_path / "adapter", "no folder .*gone")
        file.write_text(json.dumps({**config, "base_model_name_or_path": None}))
        self.refuse(tmp_path / "adapter", "does not say which model it belongs to")


def test_weights_outside_the_layers_stay(base, tmp_path):
    adapted(base, tmp_path / "adapter", ADAPTERS["a whole head"])
    prune(str(tmp_path / "adapter"), REMOVED, tmp_path / "cut")
    name = "base_model.model.lm_head.weight"
    before, after = (
        load_file(folder / "adapter_model.safetensors")[name]
        for folder in (tmp_path / "adapter", tmp_path / "cut" / "adapter")
    )
    assert torch.equal(before, after)
