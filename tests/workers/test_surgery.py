"""Cut decoders are the model with those layers skipped, in memory, on disk and after undoing."""

import copy

import pytest
import torch
import transformers as hf
from model_folders import logits, skipping
from peft import LoraConfig, get_peft_model
from tiny_decoders import FAMILIES, LAYERS, built, tiny_lm, tiny_text_config, token_ids
from tiny_multimodal import gemma3_multimodal, qwen2_audio
from torch import nn

from workers.errors import InvalidInput
from workers.surgery.cut import pruned, remove_layers
from workers.surgery.cut_config import refuse_uncuttable
from workers.surgery.decoder_parts import decoder_layers, decoder_parts, unique_parameters
from workers.surgery.gate import reload_gate, save_pruned

CUTS = {"first": [0, 1], "middle": [2, 3], "last": [4, 5], "scattered": [5, 0, 3]}


def photograph(model) -> dict:
    """Everything about a model that a cut may touch."""
    return {
        "config": copy.deepcopy(model.config.to_dict()),
        "weights": {name: p.clone() for name, p in model.named_parameters()},
        "places": {name: p.data_ptr() for name, p in model.named_parameters()},
        "attributes": {
            (name, key): value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, int | float | str)
        },
        "logits": logits(model),
    }


def assert_same(before: dict, after: dict) -> None:
    for part in ("config", "places", "attributes"):
        assert before[part] == after[part]
    assert before["weights"].keys() == after["weights"].keys()
    assert all(torch.equal(p, after["weights"][name]) for name, p in before["weights"].items())
    assert torch.equal(before["logits"], after["logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_cut_saved_reopened_and_undone(family, tmp_path):
    model = tiny_lm(family)
    before = photograph(model)
    for name, layers in CUTS.items():
        skipped = skipping(model, layers)
        count = unique_parameters(model)[0]
        gone = sum(p.numel() for i in layers for p in decoder_layers(model)[i].parameters())
        with pruned(model, layers):
            assert len(decoder_layers(model)) == LAYERS - len(layers)
            torch.testing.assert_close(logits(model), skipped, atol=1e-5, rtol=1e-5)
            assert unique_parameters(model)[0] == count - gone
            save_pruned(model, None, tmp_path / name)
            reload_gate(model, tmp_path / name, {"input_ids": token_ids()})
            cut = logits(model)
        assert_same(before, photograph(model))
        # The folder needs nothing of ours, and stays right after the undoing.
        reopened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(reopened), cut)


def test_layer_kinds_keep_to_their_layers():
    qwen = tiny_lm("qwen2")
    kinds = list(qwen.config.layer_types)
    remove_layers(qwen, [0, 4])
    assert qwen.config.layer_types == [kinds[i] for i in (1, 2, 3, 5)]
    assert qwen.config.max_window_layers == 2
    smol = tiny_lm("smollm3")
    assert smol.config.no_rope_layers == [1, 1, 0, 1, 1, 0]
    remove_layers(smol, [2])
    assert smol.config.no_rope_layers == [1, 1, 1, 1, 0]
    assert smol.config.num_hidden_layers == 5


def test_sparse_layers_keep_their_kind(tmp_path):
    config = hf.Qwen3MoeConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2, mlp_only_layers=[1],
    )  # fmt: skip
    model = built(config)
    skipped = skipping(model, [2, 4])
    remove_layers(model, [2, 4])
    assert (config.decoder_sparse_step, model.config.mlp_only_layers) == (1, [0, 1])
    torch.testing.assert_close(logits(model), skipped, atol=1e-5, rtol=1e-5)
    save_pruned(model, None, tmp_path / "cut")
    reload_gate(model, tmp_path / "cut", {"input_ids": token_ids()})


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_undone_after_an_exception_and_after_generating(family):
    model = tiny_lm(family)
    before = photograph(model)

    def broken_off() -> None:
        with pruned(model, [0, 3]):
            model.generate(token_ids(), max_new_tokens=4, do_sample=False, use_cache=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert_same(before, photograph(model))


def test_blocks_nest():
    model = tiny_lm("qwen3")
    before = photograph(model)
    once = skipping(model, [1, 2, 5])
    with pruned(model, [1, 2]), pruned(model, [3]), pruned(model, []):
        torch.testing.assert_close(logits(model), once, atol=1e-5, rtol=1e-5)
    assert_same(before, photograph(model))


def test_cutting_draws_no_random_numbers():
    model, state = tiny_lm("llama"), torch.get_rng_state()
    with pruned(model, [1]):
        pass
    assert torch.equal(state, torch.get_rng_state())


def test_adapter_goes_with_its_layers_and_comes_back():
    plain = tiny_lm("qwen2")
    model = get_peft_model(
        plain, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    assert decoder_layers(model) is decoder_layers(plain)
    assert dict(model.named_modules())[decoder_parts(model).path] is decoder_layers(plain)
    before, skipped = photograph(model), skipping(model, [0, 1])
    kept = [f".{i}." for i in range(2, LAYERS)]
    with pruned(model, [0, 1]):
        torch.testing.assert_close(logits(model), skipped, atol=1e-5, rtol=1e-5)
        names = [n for n, _ in model.named_parameters() if "lora_A" in n]
        assert len(names) == 2 * len(kept)
        cached = model.generate(input_ids=token_ids(), max_new_tokens=5, do_sample=False)
        again = model.generate(
            input_ids=token_ids(), max_new_tokens=5, do_sample=False, use_cache=False
        )
        assert torch.equal(cached, again)
        with torch.no_grad():  # training while pruned changes the adapter of the right layer
            first = decoder_layers(model)[0].self_attn.q_proj.lora_A["default"].weight
            first.zero_()
        with pytest.raises(InvalidInput, match="merge the adapter"):
            save_pruned(model, None, "unused")
    assert decoder_layers(model)[2].self_attn.q_proj.lora_A["default"].weight is first
    with torch.no_grad():
        first.copy_(
            before["weights"][
                next(n for n in before["weights"] if "2.self_attn.q_proj.lora_A" in n)
            ]
        )
    assert_same(before, photograph(model))


@pytest.mark.parametrize("build", [gemma3_multimodal, qwen2_audio])
def test_decoder_inside_a_multimodal_model(build, tmp_path):
    model = build()
    tower = {n: p for n, p in model.named_parameters() if "vision" in n or "audio" in n}
    assert "language_model" in decoder_parts(model).path
    before, skipped = photograph(model), skipping(model, [0, 4])
    with pruned(model, [0, 4]):
        assert model.config.get_text_config(decoder=True).num_hidden_layers == LAYERS - 2
        torch.testing.assert_close(logits(model), skipped, atol=1e-5, rtol=1e-5)
        assert all(dict(model.named_parameters())[n] is p for n, p in tower.items())
        save_pruned(model, None, tmp_path / "cut")
        reload_gate(model, tmp_path / "cut", {"input_ids": token_ids()})
    assert_same(before, photograph(model))


def test_tied_embeddings_count_once():
    tied, untied = tiny_lm("llama-tied"), tiny_lm("llama")
    embeddings = untied.get_input_embeddings().weight.numel()
    count, size = unique_parameters(tied)
    assert unique_parameters(untied) == (count + embeddings, 4 * (count + embeddings))
    assert size == 4 * count


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([6], r"layer 6 does not exist: the decoder has 6 layers \(choose layers 0 to 5\)"),
        ([-1], "layer -1 does not exist"),
        ([2, 2], "named twice"),
        (range(6), "all 6 layers would be removed"),
    ],
)
def test_impossible_cuts_are_refused_and_change_nothing(layers, message):
    model = tiny_lm("llama")
    before = photograph(model)
    with pytest.raises(InvalidInput, match=message):
        remove_layers(model, layers)
    assert_same(before, photograph(model))


def test_entangled_architectures_are_refused():
    shared = tiny_text_config("llama")
    model = built(shared)
    model.config.num_kv_shared_layers = 2
    with pytest.raises(InvalidInput, match="share the keys and values of an earlier layer"):
        remove_layers(model, [1])
    nano = hf.Gemma3nTextConfig(
        vocab_size=40, vocab_size_per_layer_input=40, hidden_size=32, intermediate_size=48,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        hidden_size_per_layer_input=4, laurel_rank=4, num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * 6,
    )  # fmt: skip
    with pytest.raises(InvalidInput, match="every layer has an input of its own"):
        refuse_uncuttable(built(nano))
    twins = tiny_lm("llama")
    twins.model.layers[3].mlp = twins.model.layers[1].mlp
    with pytest.raises(InvalidInput, match="layers 1 and 3 share weights"):
        remove_layers(twins, [1])


def test_what_only_the_position_decides_is_refused():
    config = hf.DiffLlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = built(config)
    before = photograph(model)
    with pytest.raises(InvalidInput, match=r"layer 3 would become layer 1.*lambda_init"):
        remove_layers(model, [1, 2])
    assert_same(before, photograph(model))
    remove_layers(model, [4, 5])  # nothing moves


def test_not_a_decoder():
    with pytest.raises(InvalidInput, match="num_hidden_layers"):
        decoder_layers(nn.Linear(2, 2))
