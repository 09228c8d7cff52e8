"""A base that serves stage after stage is never changed by them: not a bit, not a place in memory."""

import copy

import pytest
import torch
from tiny_speechllm import shake, tiny_examples, tiny_speechllm

from workers.config import DecodeSettings, TrainSettings
from workers.decoding import greedy
from workers.errors import InvalidInput
from workers.surgery.cut import pruned
from workers.training import train

ROUNDS = [
    ((0,), {"decoder"}),
    ((1, 2), {"projector"}),
    ((5, 0, 3), {"decoder", "projector"}),
    ((2, 3, 4, 5), {"decoder"}),
    ((), {"decoder", "projector"}),
]
"""Layers removed, and what is healed: every healing mode, and both ends of the decoder."""
SETTINGS = TrainSettings(steps=3, batch_size=4, lr_decoder=1e-2, lr_projector=1e-2)


def tensors(model) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the base: all but what healing is there to change."""
    return {
        name: tensor
        for name, tensor in (*model.decoder.named_parameters(), *model.decoder.named_buffers())
        if "lora_" not in name
    }


def attributes(model) -> dict:
    return {
        (name, key): value
        for name, module in model.decoder.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple | None)
    }


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ],
)
def test_the_base_is_bit_identical_after_rounds_of_pruning_healing_and_decoding(family, changes):
    model = tiny_speechllm(family, layers=6, decoder=changes)
    shake(model)
    examples = tiny_examples(8)
    trained = model.trained_state()
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    places = {name: tensor.data_ptr() for name, tensor in tensors(model).items()}
    modules = [(name, id(module)) for name, module in model.decoder.named_modules()]
    config, settings = copy.deepcopy(model.causal_lm.config.to_dict()), attributes(model)
    said = greedy(model, examples, DecodeSettings())

    for layers, trainable in ROUNDS:
        with pruned(model.decoder, layers):
            assert model.layer_count == 6 - len(layers)
            shared = {name: tensor.data_ptr() for name, tensor in tensors(model).items()}
            assert set(shared.values()) <= set(places.values())
            train(model, examples, SETTINGS, seed=0, trainable=trainable)
            greedy(model, examples[:3], DecodeSettings(batch_size=2))
            with pruned(model.decoder, (0,)):  # a stage within a stage
                greedy(model, examples[:2], DecodeSettings())
        with pytest.raises(InvalidInput), pruned(model.decoder, (6,)):
            pass
        model.load_trained_state(trained)

    assert tensors(model).keys() == before.keys()
    for name, tensor in tensors(model).items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.data_ptr() == places[name], name
        assert not tensor.requires_grad
    assert [(name, id(module)) for name, module in model.decoder.named_modules()] == modules
    assert model.causal_lm.config.to_dict() == config
    assert attributes(model) == settings
    assert greedy(model, examples, DecodeSettings()) == said
