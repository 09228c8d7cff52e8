import pytest
import torch
from tiny_speechllm import shake, tiny_examples, tiny_speechllm
from transformers import GenerationConfig

from workers.batches import collate, encode
from workers.config import DecodeSettings
from workers.decoding import end_tokens, greedy, token_cap
from workers.errors import InvalidInput
from workers.surgery.cut import pruned

SETTINGS = DecodeSettings(batch_size=4, tokens_per_second=5, extra_tokens=8)


def wordy(family="llama", **changes):
    """A model whose end of sequence comes now and then, so that rows finish at different times."""
    model = tiny_speechllm(family, **changes)
    shake(model, size=0.3)
    with torch.no_grad():
        model.causal_lm.get_output_embeddings().weight[2] *= 0.7 if family == "llama" else 1.3
    return model


def generated(model, example, settings=SETTINGS):
    """transformers' own answer, one utterance at a time."""
    inputs = collate(model, encode(model, [example], with_target=False), "left")
    with torch.inference_mode():
        tokens = model.causal_lm.generate(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=token_cap(example.duration, settings),
                eos_token_id=2,
                pad_token_id=0,
            ),
        )[0].tolist()
    capped = 2 not in tokens
    return tuple(tokens[: tokens.index(2)] if not capped else tokens), capped


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_it_says_what_generate_says(family):
    model = wordy(family)
    examples = tiny_examples(10)
    found = greedy(model, examples, SETTINGS)
    expected = [generated(model, example) for example in examples]
    assert [(h.tokens, h.capped) for h in found] == expected
    assert [h.id for h in found] == [e.id for e in examples]
    assert len({capped for _, capped in expected}) == 2, "rows should end in both ways"
    assert len({len(tokens) for tokens, _ in expected}) > 3
    decode = model.tokenizer.decode
    assert [h.text for h in found] == [
        decode(list(tokens), skip_special_tokens=True).strip() for tokens, _ in expected
    ]


def test_batch_size_changes_nothing():
    model = wordy()
    examples = tiny_examples(11)
    one, three, all_at_once = (
        greedy(model, examples, SETTINGS.model_copy(update={"batch_size": size}))
        for size in (1, 3, 32)
    )
    assert one == three == all_at_once


def test_pruned_and_text_decoding_use_their_own_cache_and_prompt():
    model = wordy(layers=4)
    examples = tiny_examples(6)
    whole = greedy(model, examples, SETTINGS)
    with pruned(model.decoder, (0, 1)):
        cut = greedy(model, examples, SETTINGS)
        assert [(h.tokens, h.capped) for h in cut] == [generated(model, e) for e in examples]
    assert cut != whole
    assert greedy(model, examples, SETTINGS) == whole
    assert greedy(model, examples, SETTINGS, "text") != whole


def test_the_limit_follows_the_duration():
    model = tiny_speechllm()
    shake(model)
    with torch.no_grad():
        model.causal_lm.get_output_embeddings().weight[2] = 0
        model.causal_lm.get_input_embeddings().weight[2] = 0
    examples = tiny_examples(4)
    found = greedy(model, examples, SETTINGS)
    assert token_cap(1.01, SETTINGS) == 6 + 8
    for hypothesis, example in zip(found, examples, strict=True):
        if hypothesis.capped:
            assert len(hypothesis.tokens) == token_cap(example.duration, SETTINGS)
    assert any(hypothesis.capped for hypothesis in found)


def test_every_declared_end_token_ends():
    model = wordy()
    examples = tiny_examples(6)
    plain = greedy(model, examples, SETTINGS)
    extra = next(h.tokens[1] for h in plain if len(h.tokens) > 1)
    model.causal_lm.generation_config.eos_token_id = [2, extra]
    assert end_tokens(model) == {2, extra}
    for before, after in zip(plain, greedy(model, examples, SETTINGS), strict=True):
        cut = before.tokens.index(extra) if extra in before.tokens else len(before.tokens)
        assert after.tokens == before.tokens[:cut]
        assert after.capped == (before.capped and extra not in before.tokens)


def test_a_tokenizer_without_an_end_is_refused():
    model = tiny_speechllm()
    model.tokenizer.eos_token = None
    model.causal_lm.generation_config.eos_token_id = None
    with pytest.raises(InvalidInput, match="no end-of-sequence token"):
        greedy(model, tiny_examples(2), SETTINGS)


def test_no_examples_no_hypotheses():
    assert greedy(tiny_speechllm(), [], SETTINGS) == []
