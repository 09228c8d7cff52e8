"""What cannot be pruned is refused with the reason, and nothing is left behind."""

import json
import shutil

import pytest
import torch
import transformers as hf
from model_folders import saved, tensors
from safetensors.torch import load_file, save_file
from tiny_decoders import built, tiny_lm
from tiny_speechllm import tiny_speechllm

from workers.config import ProjectorConfig
from workers.errors import InvalidInput
from workers.speechllm import SpeechLLMConfig
from workers.surgery import model_files
from workers.surgery.prune import PruneSettings, prune

STREAMED = PruneSettings(streamed=True)
IN_MEMORY = PruneSettings(streamed=False)


@pytest.fixture
def llama(tmp_path):
    return saved(tiny_lm("llama"), tmp_path / "model")


def refuse(source, match, layers=(1,), settings=None, out=None):
    """The reason is given, and nothing is left behind, not even a temporary folder."""
    out = out or source.parent / "out"
    with pytest.raises(InvalidInput, match=match) as caught:
        prune(str(source), list(layers), out, settings)
    assert not out.exists()
    assert not list(source.parent.glob(".out*"))
    return caught.value


@pytest.mark.parametrize("settings", [STREAMED, IN_MEMORY])
def test_impossible_layers(llama, settings):
    refuse(llama, "layer 6 does not exist: the decoder has 6 layers", [5, 6], settings)
    refuse(llama, "all 6 layers would be removed", range(6), settings)
    refuse(llama, "named twice", [2, 2], settings)
    refuse(llama, "no layer is named", [], settings)


def test_a_folder_in_use_stays_as_it_was(llama, tmp_path):
    out = tmp_path / "used"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="not empty"):
        prune(str(llama), [1], out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    with pytest.raises(InvalidInput, match="not empty"):
        prune(str(llama), [1], llama)


def test_no_such_model(tmp_path):
    with pytest.raises(InvalidInput, match="no folder"):
        prune(str(tmp_path / "nowhere"), [1], tmp_path / "out")
    (tmp_path / "bare").mkdir()
    refuse(tmp_path / "bare", "no model in it")


@pytest.mark.parametrize("settings", [STREAMED, IN_MEMORY])
def test_damaged_weights(llama, settings):
    file = llama / "model-00002-of-00006.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert str(file) in str(refuse(llama, "no valid safetensors file", settings=settings))
    file.write_bytes(whole)
    file.rename(llama / "elsewhere")
    refuse(llama, "the index names model-00002-of-00006.safetensors, which is not there")
    (llama / "elsewhere").rename(file)
    weights = load_file(file)
    lost = sorted(weights)[0]
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    refuse(llama, f"1 weights are missing, such as {lost}", settings=settings)


def test_damaged_settings(llama):
    (llama / "config.json").write_text("{")
    assert "config.json" in str(refuse(llama, "cannot be read"))


def test_pickled_weights_are_not_read(llama):
    for file in llama.glob("*.safetensors*"):
        file.unlink()
    (llama / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    refuse(llama, r"no weights in safetensors; it holds pytorch_model.bin, which is not read")


@pytest.mark.parametrize("settings", [STREAMED, IN_MEMORY])
def test_quantised_weights_are_refused_with_the_reason(llama, settings):
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (llama / "config.json").write_text(json.dumps(config))
    error = refuse(llama, r"quantised \(gptq\)", settings=settings)
    assert "prune the unquantised model" in error.remedy


@pytest.mark.parametrize("settings", [STREAMED, IN_MEMORY])
def test_entangled_layers_are_refused_with_the_reason(settings, tmp_path):
    shape = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    nano = hf.Gemma3nTextConfig(
        **shape, head_dim=8, vocab_size_per_layer_input=40, hidden_size_per_layer_input=4,
        laurel_rank=4, num_kv_shared_layers=2, activation_sparsity_pattern=[0.0] * 6,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )  # fmt: skip
    saved(built(nano), tmp_path / "nano")
    message = "Gemma3n.* cannot be cut: every layer has an input of its own"
    refuse(tmp_path / "nano", message, settings=settings)
    sharing = saved(tiny_lm("llama"), tmp_path / "sharing") / "config.json"
    sharing.write_text(json.dumps({**json.loads(sharing.read_text()), "num_kv_shared_layers": 2}))
    refuse(tmp_path / "sharing", "share the keys and values of an earlier", settings=settings)
    saved(built(hf.DiffLlamaConfig(**shape)), tmp_path / "diff")
    refuse(tmp_path / "diff", r"layer 2 would become layer 1.*lambda_init", settings=settings)


def test_layers_that_files_do_not_show_are_cut_in_memory(llama, tmp_path):
    """Weights beyond the last layer (some releases keep extra prediction layers there)."""
    weights = tensors(llama)
    for file in llama.glob("*.safetensors*"):
        file.unlink()
    weights["model.layers.6.extra.weight"] = torch.ones(3)
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    refuse(llama, "0 lists of tensors in the files could be", settings=STREAMED)
    report = prune(str(llama), [1], tmp_path / "cut")
    assert not report.streamed
    assert "0 lists of tensors" in report.in_memory_because
    assert "model.layers.5.input_layernorm.weight" not in tensors(tmp_path / "cut")


def test_a_failed_check_leaves_nothing(llama, monkeypatch):
    """A disk that changes a byte on its way."""
    copy = model_files.copy_companions

    def spoiling(source, out, **options):
        file = next(out.glob("model-*"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return copy(source, out, **options)

    monkeypatch.setattr("workers.surgery.prune.copy_companions", spoiling)
    error = refuse(llama, "logits differ", settings=PruneSettings(check="full"))
    assert error.where == str(llama.parent / "out")


def test_a_full_disk_is_noticed_before_writing(llama, monkeypatch):
    usage = shutil.disk_usage(llama)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    refuse(llama, "are free")


def test_half_a_speechllm_is_refused(tmp_path):
    model = tiny_speechllm(projector=ProjectorConfig(stack=2, hidden=16))
    (tmp_path / "model").mkdir()
    model.save_trained(tmp_path / "model")
    assert SpeechLLMConfig.read(tmp_path / "model")
    refuse(tmp_path / "model", "there is no decoder in this folder")


def test_an_interruption_leaves_nothing(llama, tmp_path):
    """Ctrl-C while bytes are copied."""
    out = tmp_path / "out"

    def interrupt(*step):
        if step[1]:
            assert list(tmp_path.glob(".out*"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(str(llama), [1], out, step=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
