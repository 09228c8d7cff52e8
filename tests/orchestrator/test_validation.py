"""Criteria judged against damage, on maps whose answers are known by hand."""

import math

import numpy as np
import pytest

from orchestrator.validation import VALIDATION, validate
from workers.maps.redundancy import Measure, RedundancyMap, Values, blocks_of

LAYERS = 5


def made_up(
    criterion: str, pool: str, by_block: dict, samples: int = 4, noise=0.0
) -> RedundancyMap:
    """A map with the given value at each (start, depth), 0.5 elsewhere; NaN where told."""
    row = [by_block.get(block, by_block.get("else", 0.5)) for block in blocks_of(LAYERS)]
    rows = np.tile(np.array(row, dtype=np.float32), (samples, 1))
    rows += noise * np.random.default_rng(0).normal(size=rows.shape).astype(np.float32)
    ids = tuple(f"u{i}" for i in range(samples))
    return RedundancyMap(LAYERS, {Measure(criterion, pool): Values(ids, rows)})


def depth_one(values) -> dict:
    return {(start, 1): value for start, value in enumerate(values)}


def test_ranks_starts_and_regret_by_hand():
    measured = made_up("angular", "all", depth_one([0.9, 0.1, 0.2, 0.3, 0.4]))
    damage = made_up("damage", "target", {"else": math.nan, **depth_one([5, 0.4, 0.1, 0.2, 0.3])})
    (row,) = validate(measured, damage).itertuples()
    assert (row.criterion, row.pool, row.depth, row.samples) == ("angular", "all", 1, 4)
    # Ranks 5 1 2 3 4 against 5 4 1 2 3: squared differences 0 + 9 + 1 + 1 + 1 = 12.
    assert row.spearman == pytest.approx(1 - 6 * 12 / (5 * 24))
    # Without layer 0: 1 2 3 4 against 4 1 2 3.
    assert row.spearman_without_layer_0 == pytest.approx(1 - 6 * 12 / (4 * 15))
    assert (row.start, row.best_start) == (1, 2)
    assert row.regret == pytest.approx(0.3, abs=1e-6)
    assert row.regret_ci_low == pytest.approx(0.3, abs=1e-6)
    assert row.regret_ci_high == pytest.approx(0.3, abs=1e-6)


def test_every_measure_at_every_depth_that_has_damage_and_a_layer_left():
    measured = made_up("angular", "all", {}, noise=0.1).joined(
        made_up("influence", "audio", {}, noise=0.1)
    )
    table = validate(measured, made_up("damage", "target", {}, noise=0.1))
    assert list(table.columns) == VALIDATION
    assert set(zip(table.criterion, table.pool, table.depth, strict=True)) == {
        (criterion, pool, depth)
        for criterion, pool in (("angular", "all"), ("influence", "audio"))
        for depth in range(1, LAYERS)
    }
    few = table[table.depth == 4]  # two starts have no rank correlation, one without layer 0
    assert few.spearman.isna().all()
    assert table[table.depth == 3].spearman_without_layer_0.isna().all()
    assert table[table.depth == 3].spearman.notna().all()


def test_the_interval_of_the_regret_is_as_wide_as_the_utterances_differ():
    measured = made_up("angular", "all", depth_one([0.9, 0.1, 0.2, 0.3, 0.4]))
    only = {"else": math.nan, **depth_one([5, 0.4, 0.1, 0.2, 0.3])}
    few, many = (made_up("damage", "target", only, samples, noise=0.05) for samples in (8, 512))
    wide, narrow = (validate(measured, one).iloc[0] for one in (few, many))
    assert wide.regret_ci_low < wide.regret < wide.regret_ci_high
    assert (narrow.regret_ci_high - narrow.regret_ci_low) < 0.3 * (
        wide.regret_ci_high - wide.regret_ci_low
    )
    # Normal noise of 0.05 on either block: 2 * 1.96 * 0.05 * sqrt(2) / sqrt(512).
    assert narrow.regret_ci_high - narrow.regret_ci_low == pytest.approx(0.01225, rel=0.15)


def test_a_criterion_that_is_damage_itself_is_perfect():
    damage = made_up("damage", "target", {}, noise=0.1)
    same = RedundancyMap(LAYERS, {Measure("angular", "all"): next(iter(damage.measures.values()))})
    table = validate(same, damage)
    assert (table.regret == 0).all()
    np.testing.assert_allclose(table.spearman.dropna(), 1)
