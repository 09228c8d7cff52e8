"""What `prune` writes opens without us, is the model with those layers skipped, and is all there."""

import json

import pytest
import torch
import transformers as hf
from model_folders import logits, saved, skipping, tensors
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_decoders import FAMILIES, LAYERS, built, tiny_lm, token_ids
from tiny_multimodal import RELEASED, gemma3_multimodal
from tiny_speechllm import shake, tiny_speechllm

from workers.encoder import SpeechEncoder
from workers.errors import InvalidInput
from workers.speechllm import SpeechLLM
from workers.surgery.cut import pruned
from workers.surgery.decoder_parts import decoder_layers
from workers.surgery.provenance import original_layers, read_provenance
from workers.surgery.prune import PruneSettings, prune
from workers.tokenizer import open_tokenizer

STREAMED = PruneSettings(streamed=True)
IN_MEMORY = PruneSettings(streamed=False)


def without_dtypes(config: dict) -> dict:
    return {
        key: without_dtypes(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "dtype"
    }


def assert_same_folder(one, other) -> None:
    """The same tensors under the same names, and the same configuration."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    configs = [json.loads((f / "config.json").read_text()) for f in (one, other)]
    # What is loaded gets the type it was loaded as written into nested configurations.
    assert without_dtypes(configs[0]) == without_dtypes(configs[1])


# --- plain models --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [[0, 1], [5, 0, 3]], ids=["bottom", "scattered"])
def test_every_family_is_pruned_file_by_file_as_in_memory(family, layers, tmp_path):
    model = tiny_lm(family)
    source = saved(model, tmp_path / "model")
    report = prune(str(source), layers, tmp_path / "cut", STREAMED)
    prune(str(source), layers, tmp_path / "same", IN_MEMORY)
    assert_same_folder(tmp_path / "cut", tmp_path / "same")
    opened, info = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "cut", output_loading_info=True
    )
    assert not any(info.values())
    torch.testing.assert_close(logits(opened), skipping(model, layers), atol=1e-5, rtol=1e-5)
    assert report.layers == (LAYERS, LAYERS - len(layers))
    fewer = sum(p.numel() for i in layers for p in decoder_layers(model)[i].parameters())
    assert report.parameters == (model.num_parameters(), opened.num_parameters())
    assert report.parameters[0] - report.parameters[1] == fewer
    assert report.weight_bytes[0] - report.weight_bytes[1] == 4 * fewer
    assert open_tokenizer(tmp_path / "cut")("the red dog").input_ids


def test_pruning_twice_tells_the_whole_story(tmp_path):
    source = saved(tiny_lm("llama"), tmp_path / "model")
    assert read_provenance(source) is None
    prune(str(source), [1, 2], tmp_path / "once")
    prune(str(tmp_path / "once"), [0], tmp_path / "twice")
    noted = read_provenance(tmp_path / "twice")
    assert noted["source"]["reference"] == str(tmp_path / "once")
    assert (noted["layers"], noted["removed"], noted["kept"]) == (4, [0], [1, 2, 3])
    assert noted["before"]["removed"] == [1, 2]
    assert original_layers(noted) == [3, 4, 5]
    assert "transformers" in noted["versions"]


def test_a_type_for_the_weights(tmp_path):
    source = saved(tiny_lm("llama"), tmp_path / "model")
    report = prune(str(source), [3], tmp_path / "cut", PruneSettings(dtype="bfloat16"))
    assert not report.streamed
    assert {t.dtype for t in tensors(tmp_path / "cut").values()} == {torch.bfloat16}
    with pytest.raises(InvalidInput, match=r"--streamed: the model must be in memory for --dtype"):
        prune(str(source), [3], tmp_path / "not", PruneSettings(dtype="float16", streamed=True))
    with pytest.raises(InvalidInput, match="int4"):
        prune(str(source), [3], tmp_path / "not", PruneSettings(dtype="int4"))


@pytest.mark.parametrize("streamed", [True, False])
def test_both_checks_run_either_way(streamed, tmp_path):
    source = saved(tiny_lm("qwen2"), tmp_path / "model")
    lists = {}
    for check in ("stored", "full"):
        settings = PruneSettings(streamed=streamed, check=check)
        lists[check] = prune(str(source), [0], tmp_path / check, settings).checks
    added = [line for line in lists["full"] if line not in lists["stored"]]
    assert added == [
        "reopened, it gives the same logits bit for bit",
        "it decodes the same with the cache",
    ]
    assert "names and shapes are what the configuration asks for" in lists["stored"]
    assert any("byte for byte" in line for line in lists["stored"]) is streamed


@pytest.fixture
def llama(tmp_path):
    return saved(tiny_lm("llama"), tmp_path / "model")


@pytest.mark.parametrize("settings", [STREAMED, IN_MEMORY])
def test_alternating_sparse_layers_keep_their_kind(settings, tmp_path):
    config = hf.Qwen3MoeConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2,
    )  # fmt: skip
    model = built(config)
    saved(model, tmp_path / "model")
    prune(str(tmp_path / "model"), [0, 3], tmp_path / "cut", settings)
    opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert opened.config.mlp_only_layers == [1, 2]
    torch.testing.assert_close(logits(opened), skipping(model, [0, 3]), atol=1e-5, rtol=1e-5)


def test_old_checkpoints_with_buffers_in_their_files_are_streamed(llama, tmp_path):
    """Releases of 2023 have the rotary frequencies of every layer in their files."""
    weights = tensors(llama)
    for file in llama.glob("*.safetensors*"):
        file.unlink()
    for i in range(LAYERS):
        weights[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    prune(str(llama), [0, 4], tmp_path / "cut", STREAMED)
    opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    expected = skipping(tiny_lm("llama"), [0, 4])
    torch.testing.assert_close(logits(opened), expected, atol=1e-5, rtol=1e-5)


# --- multimodal models ---------------------------------------------------------------------


@pytest.mark.parametrize("name", RELEASED)
def test_released_speechllms_reopen_as_their_own_class(name, tmp_path):
    model = RELEASED[name]()
    source = saved(model, tmp_path / "model")
    (source / "preprocessor_config.json").write_text('{"feature_size": 8}')
    report = prune(
        str(source), [0, 4], tmp_path / "cut", PruneSettings(streamed=True, check="full")
    )
    assert report.kind == "released"
    prune(str(source), [0, 4], tmp_path / "same", IN_MEMORY)
    assert_same_folder(tmp_path / "cut", tmp_path / "same")
    opened, info = hf.AutoModelForMultimodalLM.from_pretrained(
        tmp_path / "cut", output_loading_info=True
    )
    assert type(opened) is type(model)
    assert not any(info.values())
    torch.testing.assert_close(logits(opened), skipping(model, [0, 4]), atol=1e-5, rtol=1e-5)
    assert (tmp_path / "cut" / "preprocessor_config.json").is_file()
    kept = opened.state_dict()
    for key, value in model.state_dict().items():
        if "language_model.layers" not in key:
            assert torch.equal(kept[key], value), key


def test_layers_of_an_equally_deep_vision_tower_stay(tmp_path):
    model = gemma3_multimodal()
    source = saved(model, tmp_path / "model")
    prune(str(source), [1, 2], tmp_path / "cut", STREAMED)
    opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert opened.config.vision_config.num_hidden_layers == LAYERS
    torch.testing.assert_close(logits(opened), skipping(model, [1, 2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("streamed", [True, False])
def test_an_adapter_in_the_models_own_folder_goes_with_its_layers(streamed, tmp_path):
    """As Granite-Speech is released: transformers puts the adapter on when it opens the folder."""
    model = RELEASED["granite_speech"]()
    source = saved(model, tmp_path / "model")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(str(source))
    whole = hf.AutoModelForMultimodalLM.from_pretrained(source)
    expected = skipping(whole, [0, 3])
    plain = skipping(RELEASED["granite_speech"](), [0, 3])
    assert (expected - plain).abs().max() > 1e-3
    settings = PruneSettings(streamed=streamed, check="full")
    report = prune(str(source), [0, 3], tmp_path / "cut", settings)
    assert report.kind == "released"
    opened = hf.AutoModelForMultimodalLM.from_pretrained(tmp_path / "cut")
    torch.testing.assert_close(logits(opened), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InvalidInput, match="a part of it and stays one"):
        prune(str(source), [0], tmp_path / "no", PruneSettings(merge_adapter=True))


# --- Layersweep SpeechLLMs -----------------------------------------------------------------


def speech_encoder() -> SpeechEncoder:
    config = hf.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        conv_dim=[8, 8], conv_kernel=[10, 3], conv_stride=[5, 2], num_feat_extract_layers=2,
        feat_extract_norm="layer", num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return SpeechEncoder(hf.Wav2Vec2Model(config), hf.Wav2Vec2FeatureExtractor())


@pytest.mark.parametrize("streamed", [True, False])
def test_a_speechllm_keeps_encoder_and_projector_and_its_adapters_layers(streamed, tmp_path):
    model = tiny_speechllm(layers=5)
    model.encoder = speech_encoder()
    shake(model)
    model.save_pretrained(tmp_path / "model")
    ids = token_ids().remainder(20) + 3
    with pruned(model.decoder, [0, 3]), torch.no_grad():
        expected = model.decoder(input_ids=ids).logits
    settings = PruneSettings(streamed=streamed, check="full")
    report = prune(str(tmp_path / "model"), [0, 3], tmp_path / "cut", settings)
    opened = SpeechLLM.from_pretrained(tmp_path / "cut")
    assert opened.layer_count == 3
    with torch.no_grad():
        assert torch.equal(opened.decoder(input_ids=ids).logits, expected)
    for key, value in model.projector.state_dict().items():
        assert torch.equal(opened.projector.state_dict()[key], value)
    theirs = opened.encoder.model.state_dict()
    for key, value in model.encoder.model.state_dict().items():
        assert torch.equal(theirs[key], value)
    hf.AutoModelForCausalLM.from_pretrained(tmp_path / "cut" / "decoder")
    written = sum(p.stat().st_size for p in (tmp_path / "cut").rglob("*.safetensors"))
    assert report.weight_bytes[1] < written < report.weight_bytes[1] + 40_000  # headers
    prune(str(tmp_path / "cut"), [1], tmp_path / "again")
    assert SpeechLLM.from_pretrained(tmp_path / "again").layer_count == 2


# --- what lies beside the weights ----------------------------------------------------------


def test_what_lies_beside_the_weights_goes_along_but_no_code(tmp_path):
    source = saved(tiny_lm("llama"), tmp_path / "model", shards="1GB")
    keep = ["chat_template.jinja", "LICENSE", "additional_chat_templates/tool_use.jinja"]
    leave = ["pytorch_model.bin", "training_args.bin", "modeling_ours.py", "params.json"]
    (source / "additional_chat_templates").mkdir()
    (source / "checkpoint-10").mkdir()
    (source / "checkpoint-10" / "optimizer.pt").write_text("x")
    for name in (*keep, *leave):
        (source / name).write_text("{}")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoConfig": "modeling_ours.Ours"}})
    )
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps({**settings, "auto_map": {"AutoTokenizer": [None, "modeling_ours.Tok"]}})
    )
    generation = (source / "generation_config.json").read_bytes()
    for name, streamed in (("one", True), ("two", False)):
        out = tmp_path / name
        report = prune(str(source), [0], out, PruneSettings(streamed=streamed))
        assert all((out / file).is_file() for file in keep)
        assert not any((out / file).exists() for file in (*leave, "checkpoint-10"))
        assert set(report.left_out) == set(leave)
        assert (out / "generation_config.json").read_bytes() == generation
        for file in ("config.json", "tokenizer_config.json"):
            assert "auto_map" not in json.loads((out / file).read_text())


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OursConfig(LlamaConfig):
    model_type = "ours"
class OursForCausalLM(LlamaForCausalLM):
    config_class = OursConfig
"""


@pytest.mark.parametrize("streamed", [True, False])
def test_a_models_own_code_runs_and_goes_along_only_when_trusted(streamed, tmp_path, monkeypatch):
    for module in ("dynamic_module_utils", "utils.hub"):
        monkeypatch.setattr(f"transformers.{module}.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    source = saved(tiny_lm("llama"), tmp_path / "model")
    (source / "modeling_ours.py").write_text(REMOTE)
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "ours", "architectures": ["OursForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "modeling_ours.OursConfig",
        "AutoModelForCausalLM": "modeling_ours.OursForCausalLM",
    }
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="--trust-remote-code"):
        prune(str(source), [1], tmp_path / "no", PruneSettings(streamed=streamed))
    settings = PruneSettings(streamed=streamed, trust_remote_code=True, check="full")
    prune(str(source), [1], tmp_path / "cut", settings)
    opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    assert type(opened).__name__ == "OursForCausalLM"
    expected = skipping(tiny_lm("llama"), [1])
    torch.testing.assert_close(logits(opened), expected, atol=1e-5, rtol=1e-5)


def test_a_hub_repository_is_read_from_the_cache_and_its_commit_noted(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--org--name"
    saved(tiny_lm("llama"), repository / "snapshots" / commit)
    (repository / "snapshots" / commit / "extra.py").write_text("raise SystemExit")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    report = prune("org/name", [1], tmp_path / "cut")
    assert report.commit == commit
    assert report.streamed
    assert read_provenance(tmp_path / "cut")["source"]["revision"] == commit
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "cut").config.num_hidden_layers == 5
    with pytest.raises(InvalidInput, match="hub cannot be asked"):
        prune("org/other", [1], tmp_path / "no")
