import math

import pytest
import torch
from tiny_speechllm import shake, tiny_examples, tiny_speechllm

from workers.alignment import align_projector
from workers.batches import Example, batches, collate, encode, sorted_batches
from workers.config import LoraSettings, ProjectorConfig, TrainSettings
from workers.errors import InvalidInput, NotFinite
from workers.lora import fused_lora
from workers.surgery.cut import pruned
from workers.training import learning_rate_factor, logits_at, train

SETTINGS = TrainSettings(steps=6, batch_size=4, lr_decoder=1e-2, lr_projector=1e-2)


def everything(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ({"projector"}, {"projector"}),
        ({"decoder"}, {"lora"}),
        ({"projector", "decoder"}, {"projector", "lora"}),
    ],
)
def test_only_what_is_trainable_changes(trainable, expected):
    model = tiny_speechllm()
    shake(model)
    before = everything(model)
    train(model, tiny_examples(), SETTINGS, seed=0, trainable=trainable)
    names = changed(before, model)
    kinds = {
        "lora" if "lora_" in n else "projector" if n.startswith("projector.") else n for n in names
    }
    assert kinds == expected
    if "decoder" in trainable:
        assert len([n for n in names if "lora_" in n]) == len(model.adapter_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_layers_cut_out_are_untouched_and_come_back():
    model = tiny_speechllm(layers=4)
    shake(model)
    before = everything(model)
    with pruned(model.decoder, (1, 2)):
        train(model, tiny_examples(), SETTINGS, seed=0, trainable={"decoder"})
    names = changed(before, model)
    assert {n.split("layers.")[1][0] for n in names} == {"0", "3"}


def test_loss_falls_and_the_report_counts():
    examples = tiny_examples(8)
    model = tiny_speechllm()
    settings = SETTINGS.model_copy(update={"steps": 40})
    calls = []
    report = train(
        model,
        examples,
        settings,
        seed=0,
        trainable={"projector", "decoder"},
        progress=lambda *call: calls.append(call),
        log_every=15,
    )
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert report.steps == len(report.grad_norms) == 40
    assert [(done, steps) for done, steps, _ in calls] == [(15, 40), (30, 40), (40, 40)]
    # Each epoch is two batches of four: every target token and end of sequence twenty times.
    targets = sum(len(e.target_text.split()) + 1 for e in examples)
    assert report.target_tokens == 20 * targets


def test_same_seed_same_bytes_and_another_seed_differs():
    def run(seed, dropout=0.0):
        model = tiny_speechllm(lora=LoraSettings(rank=4, alpha=8.0, dropout=dropout))
        report = train(
            model, tiny_examples(12), SETTINGS, seed=seed, trainable={"decoder", "projector"}
        )
        return report.losses, model.trained_state()

    for dropout in (0.0, 0.5):
        torch.manual_seed(11)
        losses, state = run(0, dropout)
        torch.manual_seed(12)
        again, state_again = run(0, dropout)
        assert losses == again
        assert all(torch.equal(value, state_again[key]) for key, value in state.items())
    assert run(1)[0] != run(0)[0]
    assert run(0, 0.5)[0] != run(0)[0]


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_are_the_same_effective_batch(micro_batch):
    def run(size):
        model = tiny_speechllm()
        shake(model)
        settings = SETTINGS.model_copy(update={"micro_batch": size, "steps": 3})
        report = train(model, tiny_examples(), settings, seed=0, trainable={"decoder", "projector"})
        return report, model.trained_state()

    whole, state = run(None)
    split, split_state = run(micro_batch)
    assert split.losses == pytest.approx(whole.losses, rel=1e-4)
    assert split.grad_norms == pytest.approx(whole.grad_norms, rel=1e-3)
    for key, value in state.items():
        torch.testing.assert_close(split_state[key], value, rtol=1e-2, atol=1e-3)


def test_first_loss_is_the_mean_over_the_target_tokens():
    model = tiny_speechllm()
    shake(model)
    examples = tiny_examples(4)
    # One row at a time through the whole decoder, labels worked out by hand.
    total, count = 0.0, 0
    for example in examples:
        item = encode(model, [example])[0]
        inputs = collate(model, [item], "right")
        logits = model.causal_lm(inputs_embeds=inputs.inputs_embeds).logits[0].double()
        targets = model.tokenizer.convert_tokens_to_ids([*example.target_text.split(), "</s>"])
        for offset, token in enumerate(targets):
            total -= logits[item.prompt_length - 1 + offset].log_softmax(-1)[token].item()
            count += 1
    report = train(model, examples, SETTINGS, seed=0, trainable={"decoder"})
    assert report.losses[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_fused_lora_has_pefts_values_and_gradients(family):
    model = tiny_speechllm(family)
    shake(model)
    inputs = collate(model, encode(model, tiny_examples(4)), "right")
    mask = inputs.pools["all"]
    parameters = model.adapter_parameters()

    def run():
        embeds = inputs.inputs_embeds.detach().clone().requires_grad_()
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        output = model.causal_lm(inputs_embeds=embeds, attention_mask=inputs.attention_mask)
        output.logits[mask].square().mean().backward()
        return [output.logits[mask].detach(), embeds.grad, *(p.grad for p in parameters)]

    expected = run()
    with fused_lora(model.decoder):
        layer = next(m for m in model.modules() if hasattr(m, "lora_A") and len(m.lora_A))
        assert "forward" in vars(layer)
        found = run()
        with torch.no_grad(), model.adapter_disabled():
            off = model.causal_lm(inputs_embeds=inputs.inputs_embeds).logits
    assert "forward" not in vars(layer)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), model.adapter_disabled():
        assert torch.equal(model.causal_lm(inputs_embeds=inputs.inputs_embeds).logits, off)


def test_logits_are_those_of_the_whole_forward_pass():
    model = tiny_speechllm()
    inputs = collate(model, encode(model, tiny_examples(4)), "right")
    mask = inputs.pools["target"]
    with torch.no_grad():
        whole = model.causal_lm(
            inputs_embeds=inputs.inputs_embeds, attention_mask=inputs.attention_mask
        ).logits
        torch.testing.assert_close(logits_at(model, inputs, mask), whole[mask])


def test_a_broken_utterance_is_named_with_its_step():
    examples = tiny_examples(8)
    bad = examples[3]
    frames = bad.frames.clone()
    frames[0, 0] = float("nan")
    examples[3] = Example(
        bad.id, bad.condition, frames, bad.source_text, bad.target_text, bad.duration
    )
    model = tiny_speechllm()
    with pytest.raises(NotFinite, match=r"the loss is nan at step [12] \(utterances u3\)"):
        train(model, examples, SETTINGS, seed=0, trainable={"decoder"})
    assert not any(p.requires_grad for p in model.parameters())


def test_training_on_text_needs_no_frames():
    examples = [
        Example(e.id, e.condition, None, e.source_text, e.target_text, e.duration)
        for e in tiny_examples()
    ]
    model = tiny_speechllm()
    train(model, examples, SETTINGS, seed=0, trainable={"decoder"}, modality="text")
    with pytest.raises(InvalidInput, match="'u0' has no encoder frames"):
        train(model, examples, SETTINGS, seed=0, trainable={"decoder"})
    with pytest.raises(InvalidInput, match="there are no training examples"):
        train(model, [], SETTINGS, seed=0, trainable={"decoder"})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule_warms_up_and_ends_where_it_says(schedule):
    settings = TrainSettings(steps=100, warmup=0.1, final_lr=0.1, schedule=schedule)
    factors = [learning_rate_factor(settings, step) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1.0
    assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    once = TrainSettings(steps=1)
    assert learning_rate_factor(once, 0) == 1.0


def test_batches_are_seeded_full_and_of_like_lengths():
    lengths = [(i * 37) % 101 for i in range(1000)]
    first = batches(lengths, 16, seed=3, epoch=0)
    assert first == batches(lengths, 16, seed=3, epoch=0)
    assert first != batches(lengths, 16, seed=3, epoch=1)
    assert first != batches(lengths, 16, seed=4, epoch=0)
    assert all(len(batch) == 16 for batch in first)
    flat = [i for batch in first for i in batch]
    assert len(flat) == len(set(flat)) == 992
    longest = sum(16 * max(lengths[i] for i in batch) for batch in first)
    assert longest < 1.15 * sum(lengths[i] for i in flat)
    assert [max(lengths[i] for i in b) for b in first] != sorted(
        max(lengths[i] for i in b) for b in first
    )
    assert sorted(batches([5, 3, 4], 8, 0, 0)[0]) == [0, 1, 2]
    assert sorted_batches([1, 3, 2], 2) == [[1, 2], [0]]


@pytest.mark.parametrize("kind", ["mlp", "conv", "qformer"])
def test_alignment_brings_speech_to_the_words_embeddings(kind):
    model = tiny_speechllm(projector=ProjectorConfig(kind=kind, stack=2, hidden=32))
    examples = tiny_examples(40)
    before = everything(model)
    losses = align_projector(model, examples, steps=150, lr=1e-2, batch_size=8, seed=0)
    assert {name.split(".")[0] for name in changed(before, model)} == {"projector"}
    assert losses[-1] < 0.3 * losses[0]
    # Held-out audio: the nearest word embedding is the word that was said.
    table = model.causal_lm.get_input_embeddings().weight
    right = heard = 0
    for example in tiny_examples(45)[40:]:
        with torch.no_grad():
            embeddings, _ = model.projector(
                example.frames[None], torch.tensor([len(example.frames)])
            )
        nearest = torch.cdist(embeddings[0], table.detach()).argmin(-1).tolist()
        said = model.tokenizer.convert_tokens_to_ids(example.source_text.split())
        right += sum(
            n == s for n, s in zip(nearest, [w for w in said for _ in (0, 1)], strict=True)
        )
        heard += len(nearest)
    assert right / heard > 0.8


def test_alignment_is_repeatable_and_needs_words():
    def run():
        model = tiny_speechllm()
        losses = align_projector(model, tiny_examples(), steps=5, lr=1e-2, batch_size=4, seed=0)
        return losses, model.trained_state()

    losses, state = run()
    again, state_again = run()
    assert losses == again
    assert all(torch.equal(value, state_again[key]) for key, value in state.items())
    silent = [
        Example(e.id, e.condition, e.frames, e.source_text, e.target_text, e.duration)
        for e in tiny_examples()
    ]
    with pytest.raises(InvalidInput, match="word times") as caught:
        align_projector(tiny_speechllm(), silent, steps=5, lr=1e-2, batch_size=4, seed=0)
    assert caught.value.where == "adapt.alignment_steps"
    assert all(math.isfinite(loss) for loss in losses)
