"""Maps agree with a plain float64 computation, whatever the family, the batch or the padding."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_decoders import FAMILIES, tiny_lm
from torch import nn

from workers.config import CHEAP_CRITERIA, POOLS
from workers.errors import InvalidInput, NotFinite
from workers.maps.measure import MapBatch, _hsic, redundancy_map
from workers.maps.redundancy import Measure, RedundancyMap, Values, blocks_of
from workers.surgery.decoder_parts import decoder_layers, decoder_parts

LENGTHS = (9, 4, 12, 6, 7)
DEPTH = 4


def utterances(dim: int = 32, seed: int = 3) -> list[tuple[str, torch.Tensor, dict]]:
    """Embeddings `[time, dim]` and pools; u1 has no audio."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, length in enumerate(LENGTHS):
        embeds = torch.randn(length, dim, generator=generator)
        place = torch.arange(length)
        pools = {
            "last": place == 2,
            "prompt": (place == 0) | (place == 2),
            "audio": (place == 1) & (number != 1),
            "target": place > 2,
            "all": place >= 0,
        }
        found.append((f"u{number}", embeds, pools))
    return found


def batched(items, size: int, side: str = "right") -> list[MapBatch]:
    batches = []
    for start in range(0, len(items), size):
        part = items[start : start + size]
        time = max(len(embeds) for _, embeds, _ in part)
        # Padding holds rubbish: it must never count.
        inputs = torch.full((len(part), time, part[0][1].shape[1]), 7.0)
        mask = torch.zeros(len(part), time, dtype=torch.long)
        pools = {pool: torch.ones(len(part), time, dtype=torch.bool) for pool in POOLS}
        for row, (_, embeds, own) in enumerate(part):
            begin = time - len(embeds) if side == "left" else 0
            here = slice(begin, begin + len(embeds))
            inputs[row, here], mask[row, here] = embeds, 1
            for pool in POOLS:
                pools[pool][row, here] = own[pool]
        batches.append(MapBatch([name for name, _, _ in part], inputs, mask, pools))
    return batches


def reference_states(model, items):
    """All states `[tokens, dim]` of each utterance in float64, by cutting the decoder off."""
    model = copy.deepcopy(model).double()
    body, layers = decoder_parts(model).body, list(decoder_layers(model))
    final = next(n for n in ("norm", "final_layernorm") if hasattr(body, n))
    setattr(body, final, nn.Identity())
    for _, embeds, pools in items:
        states = []
        for count in range(len(layers) + 1):
            body.layers = nn.ModuleList(layers[:count])
            with torch.no_grad():
                out = body(inputs_embeds=embeds.double()[None], use_cache=False)
            states.append(out.last_hidden_state[0])
        yield states, pools


def reference(model, items) -> dict[tuple[str, int, int], list[float]]:
    """Angular distances per utterance in float64."""
    values: dict[tuple[str, int, int], list[float]] = {}
    for states, pools in reference_states(model, items):
        for start, depth in blocks_of(len(states) - 1):
            angles = []
            for a, b in zip(states[start], states[start + depth], strict=True):
                u, v = a / a.norm(), b / b.norm()
                angles.append(2 * math.atan2(float((u - v).norm()), float((u + v).norm())))
            for pool, mask in pools.items():
                inside = [x / math.pi for x, yes in zip(angles, mask.tolist(), strict=True) if yes]
                if inside:
                    mean = math.fsum(inside) / len(inside)
                    values.setdefault((pool, start, depth), []).append(mean)
    return values


def rows_of(measured: RedundancyMap, pool: str, criterion: str = "angular") -> np.ndarray:
    return measured.measures[Measure(criterion, pool)].rows


def assert_maps_agree(one: RedundancyMap, other: RedundancyMap, tolerance: float) -> None:
    assert set(one.measures) == set(other.measures)
    for measure, values in one.measures.items():
        assert values.ids == other.measures[measure].ids
        np.testing.assert_allclose(
            values.rows, other.measures[measure].rows, rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_float64_on_every_family_batch_and_side(family):
    model, items = tiny_lm(family, DEPTH), utterances()
    measured = redundancy_map(model, batched(items, 2))
    table = measured.table().set_index(["pool", "start", "depth"])
    expected = reference(model, items)
    assert set(table.index) == set(expected)  # layer 0 and blocks up to the top included
    for cell, values in expected.items():
        assert table.loc[cell, "samples"] == len(values)
        assert table.loc[cell, "distance"] == pytest.approx(np.mean(values), abs=2e-6)
        error = np.std(values, ddof=1) / math.sqrt(len(values))
        assert table.loc[cell, "std_error"] == pytest.approx(error, abs=2e-6)
    for size, side in ((1, "right"), (5, "right"), (3, "left")):
        assert_maps_agree(measured, redundancy_map(model, batched(items, size, side)), 1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_influence_and_cka_agree_with_float64_in_every_batching(family):
    model, items = tiny_lm(family, DEPTH), utterances()
    criteria = ("angular", "influence", "cka")
    measured = redundancy_map(model, batched(items, 2), criteria=criteria)
    assert measured.criteria == criteria
    table = measured.table().set_index(["criterion", "pool", "start", "depth"])
    away: dict[tuple, list[float]] = {}
    hsic: dict[tuple, list[np.ndarray]] = {}
    for states, pools in reference_states(model, items):
        for pool, mask in pools.items():
            inside = [state[mask].numpy() for state in states]
            count = len(inside[0])
            for start, depth in blocks_of(DEPTH) if count else ():
                a, b = inside[start], inside[start + depth]
                norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
                mean = (1 - (a * b).sum(1) / norms).mean()
                away.setdefault((pool, start, depth), []).append(mean)
            if count >= 4:
                for start, depth in blocks_of(DEPTH):
                    pair = [u_centred(inside[i] @ inside[i].T) for i in (start, start + depth)]
                    products = [(pair[i] * pair[j]).sum() for i, j in ((0, 1), (0, 0), (1, 1))]
                    scaled = np.array(products) / (count * (count - 3))
                    hsic.setdefault((pool, start, depth), []).append(scaled)
    for (pool, start, depth), values in away.items():
        cell = table.loc[("influence", pool, start, depth)]
        assert cell.distance == pytest.approx(np.mean(values), abs=1e-6)
        assert cell.samples == len(values)
    assert {(pool, s, d) for c, pool, s, d in table.index if c == "cka"} == set(hsic)
    for (pool, start, depth), values in hsic.items():
        both, one, other = np.mean(values, axis=0)
        cell = table.loc[("cka", pool, start, depth)]
        assert cell.distance == pytest.approx(1 - both / math.sqrt(one * other), abs=1e-5)
    # Utterances with fewer than four tokens of a pool do not count, and `last` has one each.
    assert measured.measures[Measure("cka", "target")].ids == ("u0", "u2", "u4")
    assert Measure("cka", "last") not in measured.measures
    for size, side in ((1, "right"), (5, "left")):
        again = redundancy_map(model, batched(items, size, side), criteria=criteria).table()
        np.testing.assert_allclose(again.distance, measured.table().distance, rtol=0, atol=1e-5)


def u_centred(gram: np.ndarray) -> np.ndarray:
    """Székely and Rizzo's U-centring: its inner products are the unbiased HSIC."""
    gram = gram - np.diag(np.diag(gram))
    n = len(gram)
    rows = gram.sum(0) / (n - 2)
    centred = gram - rows - rows[:, None] + gram.sum() / ((n - 1) * (n - 2))
    return centred - np.diag(np.diag(centred))


def test_cka_does_not_see_turns_and_sizes_that_cosines_see():
    """CKA compares the geometry of the tokens: a state scaled and turned as a whole is the same."""
    rng = np.random.default_rng(0)
    states = torch.from_numpy(rng.normal(size=(2, 9, 8)))
    turn = torch.linalg.qr(torch.from_numpy(rng.normal(size=(8, 8))))[0]
    states[1] = 3 * states[0] @ turn
    pairs = _hsic(list(states), torch.float64)
    value = RedundancyMap(1, {Measure("cka", "all"): Values(("u",), pairs[None])})
    assert value.distances(1, "all", "cka")[0] == pytest.approx(0, abs=1e-6)


def test_cka_of_states_that_do_not_vary_is_an_error():
    model = tiny_lm("llama", DEPTH)
    same = torch.ones(1, 6, 32)
    pools = {"all": torch.ones(1, 6, dtype=torch.bool)}
    batch = MapBatch(["flat"], same, torch.ones(1, 6, dtype=torch.long), pools)
    with pytest.raises(
        NotFinite, match=r"entering layer 0 is the same at every token.*leave cka out"
    ):
        redundancy_map(model, [batch], criteria=("cka",))


@pytest.mark.parametrize("criteria", [(), ("damage",), ("angular", "beauty")])
def test_only_what_states_can_tell_is_measured(criteria):
    with pytest.raises(InvalidInput, match="choose among angular, influence, cka"):
        redundancy_map(tiny_lm("llama", DEPTH), batched(utterances(), 5), criteria=criteria)


def silence(model, layers) -> None:
    """Makes layers add next to nothing."""
    with torch.no_grad():
        for i in layers:
            layer = decoder_layers(model)[i]
            if not hasattr(layer, "post_feedforward_layernorm"):
                layer.self_attn.o_proj.weight.mul_(1e-5)
                layer.mlp.down_proj.weight.mul_(1e-5)
                continue
            # A norm behind the projection would blow it up again: its own gain is what counts.
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                from_one = "gemma" in type(norm).__name__.lower()  # theirs is 1 + weight
                norm.weight.copy_(1e-6 * torch.ones_like(norm.weight) - float(from_one))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [0, 2, 3])
def test_planted_redundancy_is_found(family, start):
    model, items = tiny_lm(family, 6), utterances()
    silence(model, range(start, start + 3))
    measured = redundancy_map(model, batched(items, 5), criteria=CHEAP_CRITERIA)
    for measure in measured.measures:
        assert measured.best(3, measure.pool, measure.criterion) == start, measure
    for pool in POOLS:
        assert measured.near_ties(3, pool) == ()
        assert measured.stability(3, pool)[start] == 1.0
    # The angle is small and still right: float32 cosines would give 0 or 1e-4 here.
    column = measured.blocks.index((start, 3))
    truth = np.mean(reference(model, items)["all", start, 3])
    assert rows_of(measured, "all")[:, column].mean() == pytest.approx(truth, rel=0.02)
    assert 0 < truth < 1e-4


def test_layers_that_do_nothing_have_no_distance():
    model = tiny_lm("llama", DEPTH)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            decoder_layers(model)[1].get_submodule(name).weight.zero_()
    table = redundancy_map(model, batched(utterances(), 5)).table()
    assert (table.distance == 0).equals((table.start == 1) & (table.depth == 1))


def test_half_precision_states_are_measured_in_full():
    model = tiny_lm("llama", DEPTH).bfloat16()
    items = [(name, embeds.bfloat16(), pools) for name, embeds, pools in utterances()]
    batches = [
        MapBatch(b.ids, b.inputs_embeds.bfloat16(), b.attention_mask, b.pools)
        for b in batched(items, 1)
    ]
    values = rows_of(redundancy_map(model, batches), "last")
    assert len(np.unique(values)) == values.size


def test_pools():
    model, items = tiny_lm("llama", DEPTH), utterances()
    measured = redundancy_map(model, batched(items, 5), pools=("audio", "all"))
    assert measured.pools == ("audio", "all")
    assert measured.measures[Measure("angular", "audio")].ids == (
        "u0",
        "u2",
        "u3",
        "u4",
    )  # u1 has none
    assert measured.measures[Measure("angular", "all")].ids == ("u0", "u1", "u2", "u3", "u4")
    text = batched(items, 5)
    for batch in text:
        del batch.pools["audio"]
    assert redundancy_map(model, text).pools == ("last", "prompt", "target", "all")
    with pytest.raises(InvalidInput, match="no utterance has a token in audio"):
        redundancy_map(model, text, pools=("audio",))


def test_adapter_counts_unless_it_is_disabled():
    plain, items = tiny_lm("qwen2", DEPTH), utterances()
    before = redundancy_map(plain, batched(items, 5))
    model = get_peft_model(
        plain, LoraConfig(r=4, target_modules=["v_proj", "up_proj"], init_lora_weights=False)
    )
    adapted = redundancy_map(model, batched(items, 5))
    assert np.abs(rows_of(adapted, "all") - rows_of(before, "all")).max() > 1e-3
    with model.disable_adapter():
        assert_maps_agree(before, redundancy_map(model, batched(items, 5)), 0)
    merged = redundancy_map(copy.deepcopy(model).merge_and_unload(), batched(items, 5))
    assert_maps_agree(adapted, merged, 1e-5)


def test_the_decoder_is_left_as_it_was():
    model = tiny_lm("llama", DEPTH, attention_dropout=0.5).train()
    model.model.norm.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    first = redundancy_map(model, batched(utterances(), 5))
    assert_maps_agree(first, redundancy_map(model, batched(utterances(), 5)), 0)  # no dropout
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("layer", "value"), [(0, math.nan), (2, math.inf), (3, math.nan)])
def test_not_finite_names_layer_and_sample(layer, value):
    model = tiny_lm("llama", DEPTH)

    def spoil(module, args, output):
        del module, args
        # Utterance u3 alone has 6 positions.
        return output * value if output.shape[1] == 6 else output

    decoder_layers(model)[layer].register_forward_hook(spoil)
    with pytest.raises(NotFinite, match=f"output of layer {layer} is not finite.*'u3'") as caught:
        redundancy_map(model, batched(utterances(), 1))
    assert caught.value.where == f"layer {layer}"


def test_not_finite_embedding_and_all_zero_state():
    model = tiny_lm("llama", DEPTH)
    for value, fault in ((math.nan, "not finite"), (0.0, "all zero")):
        batches = batched(utterances(), 5)
        batches[0].inputs_embeds[2, 4] = value
        with pytest.raises(NotFinite, match=f"embedding entering layer 0 is {fault}.*'u2'"):
            redundancy_map(model, batches, pools=("target",))


def test_an_exception_names_layer_and_sample():
    model = tiny_lm("llama", DEPTH)

    def fail(module, args):
        del module, args
        raise torch.OutOfMemoryError("no memory")

    decoder_layers(model)[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        redundancy_map(model, batched(utterances(), 2))
    assert caught.value.__notes__ == ["in layer 2 on sample 'u0' and 1 more"]


def test_bad_batches():
    model = tiny_lm("llama", DEPTH)
    with pytest.raises(InvalidInput, match="no utterance has a token"):
        redundancy_map(model, [])
    twice = [*batched(utterances(), 5), *batched(utterances()[:1], 1)]
    with pytest.raises(InvalidInput, match="'u0' comes twice"):
        redundancy_map(model, twice)


def test_large_batches_are_split(monkeypatch):
    model = tiny_lm("llama", DEPTH)
    whole = redundancy_map(model, batched(utterances(), 5))
    monkeypatch.setattr("workers.maps.measure._STATE_BYTES", 2 * 12 * 32 * 4 * (DEPTH + 1))
    monkeypatch.setattr("workers.maps.measure._CHUNK_TOKENS", 3)
    monkeypatch.setattr("workers.maps.measure._CHUNK_BYTES", (1, 1))
    sizes = []

    def count(module, args):
        del module
        sizes.append(len(args[0]))

    model.model.layers[0].register_forward_pre_hook(count)
    assert_maps_agree(whole, redundancy_map(model, batched(utterances(), 5)), 1e-6)
    assert sizes == [2, 2, 1]


def test_progress():
    model, told = tiny_lm("llama", DEPTH), []
    batches = batched(utterances(), 2)
    redundancy_map(model, batches, progress=lambda *news: told.append(news))
    assert told == [(1 / 3, "2 utterances"), (2 / 3, "4 utterances"), (1.0, "5 utterances")]
    told.clear()
    redundancy_map(model, iter(batches), progress=lambda *news: told.append(news[0]), samples=5)
    assert told == [0.4, 0.8, 1.0]


def made_up(values) -> RedundancyMap:
    """A map of 2 layers, whose cells are (0, 1), (0, 2), (1, 1)."""
    array = np.asarray(values, dtype=np.float32)
    ids = tuple(f"u{i:03}" for i in range(len(array)))
    return RedundancyMap(2, {Measure("angular", "all"): Values(ids, array)})


def test_stability_and_near_ties():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, 200)
    close = made_up(np.stack([0.2 + noise, 0.4 + 0 * noise, 0.2 - noise], axis=1))
    assert close.near_ties(1, "all") == (1 - close.best(1, "all"),)
    shares = close.stability(1, "all", resamples=500, seed=1)
    assert list(shares) == [0, 1]
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0.02
    assert shares == close.stability(1, "all", resamples=500, seed=1)
    assert shares != close.stability(1, "all", resamples=500, seed=2)
    # The same spread between utterances, but paired: every utterance prefers start 1.
    spread = rng.uniform(0.1, 0.9, 200)
    paired = made_up(np.stack([spread + 0.001, spread, spread], axis=1))
    assert paired.best(1, "all") == 1
    assert paired.near_ties(1, "all") == ()
    assert paired.stability(1, "all") == {0: 0.0, 1: 1.0}
    assert paired.stability(2, "all") == {0: 1.0}


def test_equal_blocks_give_the_lowest_start_and_a_tie():
    same = made_up([[0.5, 0.1, 0.5]] * 3)
    assert same.best(1, "all") == 0
    assert same.near_ties(1, "all") == (1,)


def test_depth_and_pool_must_exist():
    small = made_up([[0.1, 0.2, 0.3]])
    for depth in (0, 3):
        with pytest.raises(InvalidInput, match=f"no blocks of depth {depth}.*choose 1 to 2"):
            small.best(depth, "all")
    with pytest.raises(InvalidInput, match=r"no pool 'audio' \(choose among all\)"):
        small.best(1, "audio")
    assert small.table().std_error.isna().all()


def test_saved_map_is_the_map(tmp_path):
    model = tiny_lm("llama", DEPTH)
    measured = redundancy_map(model, batched(utterances(), 5))
    measured.save(tmp_path / "map")
    opened = RedundancyMap.load(tmp_path / "map")
    assert (opened.layers, opened.pools) == (DEPTH, POOLS)
    assert_maps_agree(measured, opened, 0)
    pd.testing.assert_frame_equal(measured.table(), opened.table())
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "map/map.parquet"), opened.table())
    # The order of batches leaves no trace.
    redundancy_map(model, batched(utterances(), 1)[::-1]).save(tmp_path / "again")
    assert (tmp_path / "again/map.json").read_bytes() == (tmp_path / "map/map.json").read_bytes()
    opened.save(tmp_path / "copy")
    for file in ("map.json", "map.parquet", "map.safetensors"):
        assert (tmp_path / "copy" / file).read_bytes() == (tmp_path / "map" / file).read_bytes()


def test_damaged_maps_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"no redundancy map: there is no map\.json"):
        RedundancyMap.load(tmp_path)
    made_up([[0.1, 0.2, 0.3]]).save(tmp_path)
    (tmp_path / "map.safetensors").write_bytes(b"rubbish")
    with pytest.raises(InvalidInput, match="cannot be read"):
        RedundancyMap.load(tmp_path)
    made_up([[0.1, 0.2, 0.3]]).save(tmp_path)
    text = (tmp_path / "map.json").read_text()
    (tmp_path / "map.json").write_text(text.replace('"layers": 2', '"layers": 3'))
    with pytest.raises(InvalidInput, match="for 1 utterances and 3 layers"):
        RedundancyMap.load(tmp_path)


def test_errors_and_stability_of_a_quotient_come_from_its_resamples():
    """CKA is no mean over utterances: its error is the jackknife's, its choice the bootstrap's."""
    model, items = tiny_lm("llama", DEPTH), utterances()
    measured = redundancy_map(model, batched(items, 5), pools=("all",), criteria=("cka",))
    values = measured.measures[Measure("cka", "all")]

    def without(name: str | None) -> pd.Series:
        keep = [i for i, other in enumerate(values.ids) if other != name]
        part = Values(tuple(values.ids[i] for i in keep), values.rows[keep])
        return RedundancyMap(DEPTH, {Measure("cka", "all"): part}).table().distance

    left = np.stack([without(name) for name in values.ids])
    count = len(left)
    expected = np.sqrt((count - 1) / count * ((left - left.mean(0)) ** 2).sum(0))
    np.testing.assert_allclose(measured.table().std_error, expected, rtol=1e-9)
    shares = measured.stability(1, "all", "cka")
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.get) == measured.best(1, "all", "cka")


def test_two_maps_of_one_decoder_are_joined():
    model = tiny_lm("llama", DEPTH)
    one = redundancy_map(model, batched(utterances(), 5), pools=("all",))
    two = redundancy_map(model, batched(utterances(), 5), pools=("all",), criteria=("influence",))
    both = one.joined(two)
    assert both.criteria == ("angular", "influence")
    assert len(both.table()) == len(one.table()) + len(two.table())
    with pytest.raises(
        InvalidInput, match=r"no criterion 'cka' \(choose among angular, influence\)"
    ):
        both.best(1, "all", "cka")
