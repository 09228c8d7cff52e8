import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_speechllm import (
    shake,
    tiny_config,
    tiny_decoder,
    tiny_examples,
    tiny_speechllm,
    tiny_tokenizer,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from workers.batches import collate, encode
from workers.config import DecodeSettings, LoraSettings, ProjectorConfig, PromptSettings
from workers.decoding import greedy
from workers.encoder import SpeechEncoder
from workers.errors import InvalidInput
from workers.speechllm import SpeechLLM, SpeechLLMConfig
from workers.surgery.cut import pruned
from workers.tokenizer import open_tokenizer

SETTINGS = DecodeSettings(tokens_per_second=2, extra_tokens=6)


def logits(model, examples):
    inputs = collate(model, encode(model, examples), "right")
    with torch.inference_mode():
        output = model.causal_lm(
            inputs_embeds=inputs.inputs_embeds, attention_mask=inputs.attention_mask
        )
    return output.logits[inputs.pools["all"]]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_saved_and_read_again_it_says_the_same(family, tmp_path):
    examples = tiny_examples(4)
    model = tiny_speechllm(family)
    shake(model)
    model.save_pretrained(tmp_path)
    again = SpeechLLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model, examples), logits(again, examples))
    assert greedy(model, examples, SETTINGS) == greedy(again, examples, SETTINGS)
    assert again.config == model.config


def test_the_encoder_goes_with_it(tmp_path):
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, num_mel_bins=80,
    )  # fmt: skip
    encoder = SpeechEncoder(WhisperModel(config), WhisperFeatureExtractor())
    model = SpeechLLM.create(
        tiny_decoder(), tiny_tokenizer(), SpeechLLMConfig(encoder_dim=8), 0, encoder
    )
    model.save_pretrained(tmp_path)
    again = SpeechLLM.from_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path / "encoder")
    sound = np.sin(np.arange(8000) / 7, dtype=np.float32)
    assert again.encoder is not None
    assert torch.equal(again.encoder.encode([sound])[0], encoder.encode([sound])[0])


def test_decoder_folder_is_the_plain_model(tmp_path):
    model = tiny_speechllm()
    shake(model)
    model.save_pretrained(tmp_path)
    plain, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "decoder", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    original = tiny_decoder().state_dict()
    assert all(torch.equal(value, original[key]) for key, value in plain.state_dict().items())


def test_a_pruned_model_is_saved_as_it_is_now(tmp_path):
    examples = tiny_examples(3)
    model = tiny_speechllm(layers=4)
    shake(model)
    whole = logits(model, examples)
    with pruned(model.decoder, (1, 2)):
        cut = logits(model, examples)
        model.save_pretrained(tmp_path)
    assert not torch.equal(whole, cut)
    again = SpeechLLM.from_pretrained(tmp_path)
    assert again.layer_count == 2
    assert torch.equal(logits(again, examples), cut)
    assert torch.equal(logits(model, examples), whole)


def test_trained_weights_move_into_another_model_of_the_same_shape(tmp_path):
    examples = tiny_examples(3)
    model, other = tiny_speechllm(), tiny_speechllm()
    shake(model)
    model.save_trained(tmp_path)
    assert not torch.equal(logits(model, examples), logits(other, examples))
    other.load_trained(tmp_path)
    assert torch.equal(logits(model, examples), logits(other, examples))
    plain = PeftModel.from_pretrained(tiny_decoder(), tmp_path / "adapter")
    ids = torch.tensor([[1, 14, 15, 16]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model.causal_lm(ids).logits)
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (adapter["peft_type"], adapter["r"]) == ("LORA", 4)


def test_no_path_of_this_machine_is_written_down(tmp_path):
    tiny_decoder().save_pretrained(tmp_path / "home")
    tiny_tokenizer().save_pretrained(tmp_path / "home")
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "home")
    tokenizer = open_tokenizer(tmp_path / "home")
    model = SpeechLLM.create(decoder, tokenizer, tiny_config(), seed=0)
    model.save_pretrained(tmp_path / "out")
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_adapter_of_a_pruned_model_fits_only_a_decoder_cut_alike(tmp_path):
    model = tiny_speechllm(layers=4)
    shake(model)
    with pruned(model.decoder, (1,)):
        state = model.trained_state()
        model.save_trained(tmp_path)
    assert {key.split("layers.")[1][0] for key in state if "layers." in key and "lora" in key} == {
        "0", "1", "2",
    }  # fmt: skip
    before = model.trained_state()
    with pytest.raises(InvalidInput, match="the decoder has 4 layers now"):
        model.load_trained(tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.trained_state().items())
    other = tiny_speechllm(layers=4)
    with pruned(other.decoder, (2,)):
        other.load_trained(tmp_path)
        assert all(torch.equal(v, state[k]) for k, v in other.trained_state().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": LoraSettings(rank=2, alpha=8.0)},
        {"lora": LoraSettings(rank=4, alpha=16.0)},
        {"projector": ProjectorConfig(stack=2, hidden=8)},
        {"prompts": PromptSettings(asr="{audio}\nText:")},
    ],
)
def test_weights_of_other_settings_are_refused(changes, tmp_path):
    tiny_speechllm(**changes).save_trained(tmp_path)
    with pytest.raises(InvalidInput, match="trained with another") as caught:
        tiny_speechllm().load_trained(tmp_path)
    assert next(iter(changes)) in caught.value.problem


def test_weights_missing_or_misshapen_are_refused():
    model = tiny_speechllm()
    state = model.trained_state()
    key = next(k for k in state if "lora_A" in k)
    with pytest.raises(InvalidInput, match=r"lora_A.*is missing"):
        model.load_trained_state({k: v for k, v in state.items() if k != key})
    with pytest.raises(InvalidInput, match=r"is \[2, 2\], not \[4, 32\]"):
        model.load_trained_state({**state, key: torch.zeros(2, 2)})
    with pytest.raises(InvalidInput, match="does not belong here"):
        model.load_trained_state({**state, "decoder.extra": torch.zeros(1)})


def test_foreign_and_damaged_folders_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="this is no SpeechLLM"):
        SpeechLLM.from_pretrained(tmp_path)
    model = tiny_speechllm()
    model.save_trained(tmp_path)
    with pytest.raises(InvalidInput, match="no decoder in this folder"):
        SpeechLLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    for damaged in (
        "projector.safetensors",
        "adapter/adapter_model.safetensors",
        "decoder/model.safetensors",
        "speechllm.json",
    ):
        file = tmp_path / damaged
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(InvalidInput, match="cannot be read"):
            SpeechLLM.from_pretrained(tmp_path)
        file.write_bytes(content)
    SpeechLLM.from_pretrained(tmp_path)
    described = json.loads((tmp_path / "speechllm.json").read_text())
    (tmp_path / "speechllm.json").write_text(json.dumps({**described, "format": 99}))
    with pytest.raises(InvalidInput, match="layout 99 is not known"):
        SpeechLLMConfig.read(tmp_path)


def test_same_seed_same_weights_whatever_the_global_generator():
    torch.manual_seed(1)
    first = tiny_speechllm().trained_state()
    torch.manual_seed(2)
    marker = torch.random.get_rng_state()
    second = tiny_speechllm().trained_state()
    assert torch.equal(torch.random.get_rng_state(), marker)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_new_adapter_changes_nothing_and_a_shaken_one_can_be_switched_off():
    examples = tiny_examples(3)
    model = tiny_speechllm()
    fresh = logits(model, examples)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.adapter_parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)
    assert not torch.equal(logits(model, examples), fresh)
    with model.adapter_disabled():
        assert torch.equal(logits(model, examples), fresh)
    assert not torch.equal(logits(model, examples), fresh)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (
            "all-linear",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (["q_proj", "mlp.up_proj"], {"q_proj", "up_proj"}),
    ],
)
def test_lora_sits_on_the_decoders_layers_alone(targets, modules):
    model = tiny_speechllm(lora=LoraSettings(rank=4, targets=targets))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert {name.rpartition(".")[2] for name in adapted} == modules
    assert all(".layers." in name for name in adapted)
    assert len(adapted) == 3 * len(modules)


def test_unknown_lora_targets_are_refused():
    with pytest.raises(InvalidInput, match="no linear module 'c_attn'") as caught:
        tiny_speechllm(lora=LoraSettings(targets=["c_attn"]))
    assert caught.value.where == "lora.targets"
    assert "q_proj" in caught.value.remedy


def test_adapter_and_projector_stay_in_float32_on_a_bfloat16_decoder():
    decoder = tiny_decoder().to(torch.bfloat16)
    model = SpeechLLM.create(decoder, tiny_tokenizer(), tiny_config(), seed=0)
    assert {p.dtype for p in model.adapter_parameters()} == {torch.float32}
    assert {p.dtype for p in model.projector.parameters()} == {torch.float32}
    assert logits(model, tiny_examples(2)).dtype == torch.bfloat16


def test_text_and_speech_differ_in_what_stands_for_the_audio():
    model = tiny_speechllm()
    examples = tiny_examples(3)
    speech = collate(model, encode(model, examples), "right")
    text = collate(model, encode(model, examples, "text"), "right")
    assert "audio" not in text.pools
    for row, example in enumerate(examples):
        words = len(example.source_text.split())
        assert speech.pools["audio"][row].sum() == model.projector.output_length(
            len(example.frames)
        )
        prompt = speech.pools["prompt"][row].sum()
        assert text.pools["prompt"][row].sum() == prompt + words


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("modality", ["speech", "text"])
def test_pools_and_labels_cover_what_they_say(padding, modality):
    model = tiny_speechllm()
    encoded = encode(model, tiny_examples(5), modality)
    inputs = collate(model, encoded, padding)
    pools = inputs.pools
    parts = [pools[name] for name in ("prompt", "audio", "target") if name in pools]
    assert torch.equal(sum(p.int() for p in parts), pools["all"].int())
    assert torch.equal(pools["all"].long(), inputs.attention_mask)
    assert (pools["last"].sum(1) == 1).all()
    eos = model.tokenizer.eos_token_id
    for row, item in enumerate(encoded):
        target = model.tokenizer.convert_tokens_to_ids(item.example.target_text.split())
        first = int(pools["last"][row].nonzero())
        learnt = inputs.labels[row]
        assert learnt[learnt != -100].tolist() == [*target, eos]
        assert (learnt != -100).nonzero()[0] == first
        assert pools["target"][row].nonzero()[:, 0].tolist() == list(
            range(first + 1, first + 1 + len(target))
        )
        real = pools["all"][row]
        assert inputs.position_ids[row][real].tolist() == list(range(item.length))
        assert inputs.inputs_embeds[row][~real].abs().sum() == 0


def test_audio_embeddings_land_in_their_own_rows():
    model = tiny_speechllm()
    encoded = encode(model, tiny_examples(4))
    together = collate(model, encoded, "left")
    for row, item in enumerate(encoded):
        alone = collate(model, [item], "left")
        torch.testing.assert_close(
            together.inputs_embeds[row, -item.length :], alone.inputs_embeds[0]
        )
