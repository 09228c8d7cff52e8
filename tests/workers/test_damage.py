"""Damage is the loss with a block really removed, for every family, batch and memory budget."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_decoders import FAMILIES, LAYERS, built, tiny_lm, tiny_text_config, token_ids
from torch.nn import functional

from workers.batches import IGNORED
from workers.errors import InvalidInput, NotFinite
from workers.maps import damage as damage_module
from workers.maps.damage import damage_map
from workers.maps.measure import MapBatch
from workers.maps.redundancy import Measure, RedundancyMap, blocks_of
from workers.surgery.cut import pruned
from workers.surgery.decoder_parts import decoder_layers

LENGTHS = (12, 9, 6)
FIRST_TARGET = 3


def batch_of(model, rows=(0, 1, 2), side: str = "right") -> MapBatch:
    """Token ids as utterances whose targets begin at `FIRST_TARGET`."""
    ids = token_ids(len(LENGTHS), max(LENGTHS))[list(rows)]
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, number in enumerate(rows):
        length, time = LENGTHS[number], ids.shape[1]
        begin = time - length if side == "left" else 0
        if side == "left":
            ids[row] = ids[row].roll(begin)
        mask[row, begin : begin + length] = 1
        here = slice(begin + FIRST_TARGET - 1, begin + length - 1)
        labels[row, here] = ids[row, begin + FIRST_TARGET : begin + length]
    embeds = model.get_input_embeddings()(ids).detach()
    pools = {"all": mask.bool(), "target": (labels != IGNORED).roll(1, 1)}
    return MapBatch([f"u{number}" for number in rows], embeds, mask, pools, labels)


def losses(model, batch: MapBatch) -> np.ndarray:
    """Mean target loss of each utterance, from the model's own logits."""
    with torch.no_grad():
        logits = model(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits
    each = functional.cross_entropy(logits.mT, batch.labels, ignore_index=IGNORED, reduction="none")
    return (each.sum(1) / (batch.labels != IGNORED).sum(1)).numpy()


def rows_of(measured: RedundancyMap) -> np.ndarray:
    return measured.measures[Measure("damage", "target")].rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_removing_each_block_for_real(family):
    model = tiny_lm(family)
    batch = batch_of(model)
    measured = damage_map(model, [batch])
    whole = losses(model, batch)
    np.testing.assert_allclose(measured.unpruned_loss, whole, rtol=1e-5)
    for column, (start, depth) in enumerate(blocks_of(LAYERS)):
        if depth == LAYERS:
            continue  # nothing would be left to run for real
        with pruned(model, range(start, start + depth)):
            expected = losses(model, batch) - whole
        np.testing.assert_allclose(rows_of(measured)[:, column], expected, rtol=0, atol=1e-5)


def test_neither_batch_nor_padding_nor_memory_matters(monkeypatch):
    model = tiny_lm("gemma3")
    whole = rows_of(damage_map(model, [batch_of(model)]))
    alone = damage_map(model, (batch_of(model, [number]) for number in (2, 0, 1)))
    np.testing.assert_allclose(rows_of(alone), whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        rows_of(damage_map(model, [batch_of(model, side="left")])), whole, rtol=0, atol=1e-5
    )
    monkeypatch.setattr(damage_module, "_RUN_BYTES", 5 * 3 * 12 * 32 * 4)  # five open runs
    monkeypatch.setattr(damage_module, "_CALL_TOKENS", (2 * 3 * 12, 1))  # two in a call
    monkeypatch.setattr(damage_module, "_LOGIT_BYTES", (7 * 40 * 4, 1))  # seven tokens a head
    again = damage_map(model, [batch_of(model)])
    np.testing.assert_allclose(rows_of(again), whole, rtol=0, atol=1e-5)


def test_only_the_depths_asked_for(tmp_path):
    model = tiny_lm("llama")
    whole, some = (damage_map(model, [batch_of(model)], depths) for depths in (None, (2, 4)))
    table = some.table()
    assert set(table.depth) == {2, 4}
    assert len(table) == (LAYERS - 1) + (LAYERS - 3)
    for depth in (2, 4):
        expected = whole.distances(depth, "target", "damage")
        np.testing.assert_allclose(some.distances(depth, "target", "damage"), expected, atol=1e-6)
        assert some.best(depth, "target", "damage") == int(expected.argmin())
    with pytest.raises(InvalidInput, match="blocks of depth 3 was not measured"):
        some.best(3, "target", "damage")
    some.save(tmp_path)
    opened = RedundancyMap.load(tmp_path)
    np.testing.assert_array_equal(rows_of(opened), rows_of(some))
    np.testing.assert_array_equal(opened.unpruned_loss, some.unpruned_loss)


def test_a_layer_that_does_nothing_does_no_damage():
    model = tiny_lm("qwen2")
    with torch.no_grad():
        decoder_layers(model)[3].self_attn.o_proj.weight.zero_()
        decoder_layers(model)[3].mlp.down_proj.weight.zero_()
    measured = damage_map(model, [batch_of(model)], [1])
    assert abs(measured.distances(1, "target", "damage")[3]) < 1e-6
    assert abs(measured.distances(1, "target", "damage")[2]) > 1e-3


def test_the_adapter_counts_unless_it_is_disabled():
    plain = tiny_lm("llama")
    batch = batch_of(plain)
    before = rows_of(damage_map(plain, [batch]))
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert np.abs(rows_of(damage_map(model, [batch])) - before).max() > 1e-3
    with model.disable_adapter():
        np.testing.assert_array_equal(rows_of(damage_map(model, [batch])), before)


def test_the_model_is_left_as_it_was():
    model = tiny_lm("llama").train()
    batch = batch_of(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    damage_map(model, [batch])
    assert model.training
    assert all("forward" not in vars(layer) for layer in decoder_layers(model))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_layers_that_cannot_be_called_by_themselves_are_refused():
    """A layer that remembers its last call is another layer when it is called again."""
    model = tiny_lm("llama")
    layer = decoder_layers(model)[2]
    memory = []

    def remember(module, args, output):
        del module, args
        memory.append(1)
        return output + len(memory)

    layer.register_forward_hook(remember)
    with pytest.raises(InvalidInput, match="layer 2 of LlamaModel does something else"):
        damage_map(model, [batch_of(model)])
    with pytest.raises(InvalidInput, match="cannot be called by itself"):
        damage_map(stubborn(), [batch_of(stubborn())])


def stubborn():
    """A decoder with a layer that only takes the batch it has just seen."""
    model = tiny_lm("llama")

    def refuse(module, args):
        del module
        if len(args[0]) > len(LENGTHS):
            raise ValueError("too many rows for me")

    decoder_layers(model)[1].register_forward_pre_hook(refuse)
    return model


def test_bad_input():
    model = tiny_lm("llama")
    batch = batch_of(model)
    for depths in ([0], [LAYERS + 1], []):
        with pytest.raises(InvalidInput, match=f"no blocks of depth.*choose 1 to {LAYERS}"):
            damage_map(model, [batch], depths)
    with pytest.raises(InvalidInput, match="'u0' comes twice"):
        damage_map(model, [batch, batch])
    with pytest.raises(InvalidInput, match="no utterances to measure damage on"):
        damage_map(model, [])
    without = MapBatch(batch.ids, batch.inputs_embeds, batch.attention_mask, batch.pools)
    with pytest.raises(InvalidInput, match=r"an utterance of u0, u1, u2 … has no target token"):
        damage_map(model, [without])
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(NotFinite, match=r"loss of the unpruned decoder is nan for sample 'u0'"):
        damage_map(model, [batch])


def test_progress_counts_utterances_and_ends_at_one():
    model, told = tiny_lm("llama"), []
    damage_map(
        model,
        (batch_of(model, [number]) for number in range(3)),
        progress=lambda *news: told.append(news),
        samples=3,
    )
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert told[-1][1] == f"2 utterances, {len(blocks_of(LAYERS))} blocks"


def test_half_precision():
    config = tiny_text_config("llama")
    model = built(config).bfloat16()
    batch = batch_of(model)
    measured = damage_map(model, [batch], [1])
    exact = damage_map(model.float(), [batch_of(model)], [1])
    np.testing.assert_allclose(rows_of(measured), rows_of(exact), rtol=0, atol=0.2)
