from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest

from orchestrator.consensus import (
    agreement_between_models,
    best_start,
    block_regret,
    chance_frequency,
    chance_jaccard,
    chosen_blocks,
    consensus_table,
    expected_conditions,
    layer_frequency,
    model_maps,
    shared_start,
)
from workers.errors import InvalidInput

Condition = tuple[str | None, str, str, str | None, str, bool]


def one_map(
    rows: Mapping[int, Sequence[float]],
    *,
    model: str = "m",
    encoder: str | None = "e",
    task: str = "asr",
    source: str = "en",
    target: str | None = None,
    modality: str = "speech",
    adapted: bool = True,
    std_error: float = 0.0,
) -> pd.DataFrame:
    """A map with the given distances by depth (one a start)."""
    return pd.DataFrame(
        [
            {
                "model": model, "encoder": encoder, "task": task, "source_language": source,
                "target_language": target, "modality": modality, "adapted": adapted, "pool": "all",
                "start": start, "depth": depth, "distance": distance, "std_error": std_error,
                "samples": 8, "stage_key": "k",
            }
            for depth, distances in rows.items()
            for start, distance in enumerate(distances)
        ]
    )  # fmt: skip


def joined(*maps: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(maps, ignore_index=True)


def row(table: pd.DataFrame, scope: str, depth: int = 2) -> pd.Series:
    (found,) = [r for _, r in table[(table.scope == scope) & (table.depth == depth)].iterrows()]
    return found


def random_maps(seed: int, models: int, conditions: int, layers: int) -> pd.DataFrame:
    """Maps of depth 2 in which nothing agrees but by chance."""
    shape = (models, conditions, layers - 1)
    model, condition, start = (axis.ravel() for axis in np.indices(shape))
    frame = pd.DataFrame(
        {
            "model": np.char.add("m", model.astype(str)),
            "encoder": np.char.add("e", condition.astype(str)),
            "start": start,
            "distance": np.random.default_rng(seed).random(shape).ravel(),
        }
    )
    fixed = {"task": "asr", "source_language": "en", "target_language": None}
    kind = {"modality": "speech", "adapted": True, "pool": "all", "depth": 2, "std_error": 0.0}
    return frame.assign(**fixed, **kind)


def test_best_start_takes_the_smallest_distance_and_of_equals_the_first() -> None:
    assert best_start({0: 0.3, 1: 0.1, 2: 0.2}) == 1
    assert best_start({3: 0.1, 1: 0.1, 2: 0.1}) == 1


@pytest.mark.parametrize("distances", [{}, {0: float("nan"), 1: 0.2}])
def test_best_start_refuses_what_it_cannot_compare(distances: dict[int, float]) -> None:
    with pytest.raises(InvalidInput):
        best_start(distances)


def test_shared_start_minimises_the_largest_regret_not_the_mean() -> None:
    # Regrets of a: 0, .10, .30; of b: .25, .10, 0; of c: 0, .10, .30. Means: .083, .10, .20.
    tables = [one_map({2: d}) for d in ([0.1, 0.2, 0.4], [0.35, 0.2, 0.1], [0.1, 0.2, 0.4])]
    assert shared_start(tables, 2, "all") == 1


def test_shared_start_breaks_ties_by_mean_regret_then_by_position() -> None:
    # Largest regret .1 at starts 0 and 1; the mean is smaller at 1.
    tables = [one_map({2: d}) for d in ([0.2, 0.1, 0.9], [0.2, 0.1, 0.9], [0.1, 0.2, 0.9])]
    assert shared_start(tables, 2, "all") == 1
    assert shared_start([one_map({2: [0.5, 0.3, 0.3]})], 2, "all") == 1


def test_shared_start_is_not_moved_by_rounding_or_by_order() -> None:
    a, b = [0.1 + 0.2, 0.3, 0.5], [0.3, 0.1 + 0.2, 0.5]
    tables = [one_map({2: a}), one_map({2: b})]
    assert shared_start(tables, 2, "all") == shared_start(tables[::-1], 2, "all") == 0


def test_shared_start_refuses_incomplete_and_foreign_maps() -> None:
    whole = one_map({2: [0.1, 0.2, 0.3]})
    with pytest.raises(InvalidInput, match="lacks blocks of depth 2"):
        shared_start([whole, whole[whole.start != 1]], 2, "all")
    with pytest.raises(InvalidInput, match="lacks blocks of depth 2 in pool last"):
        shared_start([whole], 2, "last")
    with pytest.raises(InvalidInput, match="different numbers of layers"):
        shared_start([whole, one_map({2: [0.1, 0.2]})], 2, "all")
    with pytest.raises(InvalidInput, match="no maps"):
        shared_start([], 2, "all")


def test_table_by_hand() -> None:
    # Four layers; best blocks of two layers: {1,2} and {2,3}: one layer of three is common.
    maps = joined(
        one_map({2: [0.9, 0.1, 0.3]}, source="en"), one_map({2: [0.9, 0.2, 0.1]}, source="de")
    )
    table = consensus_table(maps, [2], "all")
    found = row(table, "all")
    assert found.jaccard == pytest.approx(1 / 3)
    assert found.block_start == 1  # regrets: (0, .1) at 1; (.2, 0) at 2
    assert (found.regret_max, found.regret_mean) == pytest.approx((0.1, 0.05))
    # Ranks 3 1 2 and 3 2 1: rho = 1 - 6 * 2 / (3 * 8).
    assert found.spearman == pytest.approx(0.5)
    assert (found.conditions, found.coverage) == (2, 1.0)
    assert set(table.scope) == {
        "all", "all/without-layer-0", "languages", "languages/without-layer-0",
    }  # fmt: skip


def test_without_layer_0_the_trivial_agreement_is_gone() -> None:
    # Layer 0 makes every block from it the farthest; the rest runs in opposite order.
    maps = joined(
        one_map({2: [0.9, 0.1, 0.2, 0.3]}, source="en"),
        one_map({2: [0.9, 0.3, 0.2, 0.1]}, source="de"),
    )
    table = consensus_table(maps, [2], "all")
    assert row(table, "all").spearman == pytest.approx(1 - 6 * 8 / (4 * 15))
    assert row(table, "all/without-layer-0").spearman == pytest.approx(-1.0)


def test_without_layer_0_a_block_from_layer_0_is_never_shared() -> None:
    table = consensus_table(one_map({2: [0.1, 0.9, 0.8, 0.7]}), [2], "all")
    assert row(table, "all").block_start == 0
    assert row(table, "all/without-layer-0").block_start == 3


def test_planted_agreement_is_found() -> None:
    random = np.random.default_rng(0)
    planted = np.array([0.9, 0.5, 0.4, 0.1, 0.3, 0.5, 0.6, 0.5, 0.6, 0.7, 0.8])
    maps = joined(
        *(
            one_map({2: planted + random.normal(0, 0.01, 11)}, encoder=e, source=s)
            for e in ("a", "b")
            for s in ("en", "de", "fr")
        )
    )
    found = row(consensus_table(maps, [2], "all"), "all")
    assert (found.block_start, found.jaccard) == (3, 1.0)
    assert found.p_value == pytest.approx(1 / 2001)
    assert found.spearman > 0.9
    assert found.regret_max < 0.05


def test_planted_disagreement_is_found() -> None:
    # Each condition has its own block, none overlaps another's.
    maps = []
    for i, source in enumerate(("en", "de", "fr", "es")):
        distances = np.full(11, 0.5)
        distances[3 * i] = 0.1
        maps.append(one_map({2: distances}, source=source))
    found = row(consensus_table(joined(*maps), [2], "all"), "all")
    assert found.jaccard == 0.0
    assert found.p_value == 1.0
    assert found.regret_max == pytest.approx(0.4)


def test_permutation_test_keeps_its_level_when_nothing_is_shared() -> None:
    table = consensus_table(random_maps(3, 300, 6, 12), [2], "all")
    p_values = table[table.scope == "all"].p_value.to_numpy()
    assert len(p_values) == 300
    # Three standard errors of 300 trials; p is a little conservative, as blocks are few.
    assert 0.01 <= np.mean(p_values <= 0.05) <= 0.088
    assert 0.15 <= np.mean(p_values <= 0.25) <= 0.325


def test_table_does_not_depend_on_the_order_of_rows_and_repeats() -> None:
    maps = random_maps(5, 1, 5, 10)
    shuffled = maps.sample(frac=1.0, random_state=1)
    first, second = (consensus_table(m, [2], "all") for m in (maps, shuffled))
    pd.testing.assert_frame_equal(first, second)


def grid(**changes: float) -> pd.DataFrame:
    """Two encoders × (asr-de, asr-en, ast-de-en), text before and after adapting, and speech."""
    tasks = [("asr", "de", None), ("asr", "en", None), ("ast", "de", "en")]
    maps = []
    for encoder, modality, adapted in [
        (None, "text", False), ("a", "text", True), ("a", "speech", True),
        ("b", "text", True), ("b", "speech", True),
    ]:  # fmt: skip
        for task, source, target in tasks:
            best = 1
            for value in (encoder, task, source, modality, "adapted" if adapted else "before"):
                best = int(changes.get(str(value), best))
            distances = np.full(7, 0.5)
            distances[best] = 0.1
            maps.append(
                one_map(
                    {2: distances}, encoder=encoder, task=task, source=source, target=target,
                    modality=modality, adapted=adapted,
                )
            )  # fmt: skip
    return joined(*maps)


@pytest.mark.parametrize(
    ("changes", "unlike"),
    [
        ({"b": 5}, {"all", "encoders", "adapted", "inherited"}),
        ({"ast": 5}, {"all", "tasks"}),
        ({"en": 5}, {"all", "languages"}),
        ({"speech": 5}, {"modalities", "inherited"}),
        ({"before": 5}, {"adapted", "inherited"}),
        ({}, set()),
    ],
)
def test_a_scope_sees_the_difference_it_is_about(
    changes: dict[str, float], unlike: set[str]
) -> None:
    table = consensus_table(grid(**changes), [2], "all", permutations=9)
    table = table[~table.scope.str.contains("/")]
    assert set(table.scope) == {
        "all", "tasks", "languages", "encoders", "modalities", "adapted", "inherited",
    }  # fmt: skip
    assert set(table[table.jaccard < 1].scope) == unlike


def test_missing_conditions_lower_the_coverage() -> None:
    maps = grid()
    gone = (maps.encoder == "b") & (maps.task == "ast") & (maps.modality == "speech")
    table = consensus_table(maps[~gone], [2], "all", permutations=9)
    assert (row(table, "all").conditions, row(table, "all").coverage) == (5, pytest.approx(5 / 6))
    assert row(table, "encoders").coverage == pytest.approx(4 / 6)
    assert row(table, "tasks").coverage == pytest.approx(2 / 4)


def test_map_with_a_hole_at_a_depth_counts_as_missing_there_only() -> None:
    maps = joined(
        one_map({1: [0.4, 0.3, 0.2, 0.1], 2: [0.5, 0.1, 0.2]}, source="en"),
        one_map({1: [0.4, 0.3, 0.2, 0.1], 2: [0.5, 0.1, np.nan]}, source="de"),
    )
    table = consensus_table(maps, [1, 2], "all", permutations=9)
    assert row(table, "all", 1).coverage == 1.0
    assert row(table, "all", 2).coverage == 0.5
    assert pd.isna(row(table, "all", 2).jaccard)
    assert row(table, "all", 2).block_start == 1


def test_results_name_conditions_that_have_no_map_yet() -> None:
    results = pd.DataFrame(
        {
            "model": ["m", "m", "n"], "encoder": ["e", "f", "e"], "task": "asr", "layers": 4,
            "source_language": "en", "target_language": None,
        }
    )  # fmt: skip
    table = consensus_table(one_map({2: [0.3, 0.1, 0.2]}), [2], "all", results, permutations=9)
    of_m, of_n = (table[(table.model == m) & (table.scope == "all")].iloc[0] for m in "mn")
    assert (of_m.conditions, of_m.coverage) == (1, 0.5)
    assert (of_n.conditions, of_n.coverage) == (0, 0.0)
    assert pd.isna(of_n.block_start)
    assert len(expected_conditions(one_map({2: [0.3, 0.1, 0.2]}), results)) == 2


def test_an_encoder_of_another_models_own_is_not_missed() -> None:
    results = pd.DataFrame(
        {
            "model": ["m", "n"], "encoder": ["e", "own"], "task": "asr", "layers": 4,
            "source_language": "en", "target_language": None,
        }
    )  # fmt: skip
    table = consensus_table(one_map({2: [0.3, 0.1, 0.2]}), [2], "all", results, permutations=9)
    of_m, of_n = (table[(table.model == m) & (table.scope == "all")].iloc[0] for m in "mn")
    assert (of_m.conditions, of_m.coverage) == (1, 1.0)
    assert (of_n.conditions, of_n.coverage) == (0, 0.0)


def test_two_values_for_one_block_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"two maps of m for e · asr-en · speech"):
        model_maps(joined(one_map({2: [0.1, 0.2]}), one_map({2: [0.3, 0.2]})), "all")


def test_empty_maps_give_empty_tables() -> None:
    empty = one_map({2: [0.1, 0.2]}).iloc[:0]
    assert consensus_table(empty, [2], "all").empty
    assert layer_frequency(empty, "all", [2]).empty
    assert agreement_between_models(empty, [2], "all").empty


def test_layer_frequency_by_hand() -> None:
    # Blocks {1,2} and {2,3} at depth 2, {2} and {3} at depth 1; text does not count.
    maps = joined(
        one_map({1: [0.4, 0.3, 0.1, 0.2], 2: [0.9, 0.1, 0.3]}, source="en"),
        one_map({1: [0.4, 0.3, 0.2, 0.1], 2: [0.9, 0.2, 0.1]}, source="de"),
        one_map({1: [0.1, 0.3, 0.2, 0.4], 2: [0.1, 0.2, 0.3]}, modality="text"),
    )
    frequency = layer_frequency(maps, "all", [0, 1, 2])
    assert list(frequency.frequency) == [0.0, 0.25, 0.75, 0.5]


def test_chance_by_hand() -> None:
    # Three positions of two layers among four: pairs at shift 0 (3), 1 (4), 2 (2).
    assert chance_jaccard(3, 2) == pytest.approx((3 * 1 + 4 / 3 + 0) / 9)
    assert list(chance_frequency(4, [2])) == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1 / 3])


def test_near_ties_are_named() -> None:
    maps = one_map({1: [0.5, 0.10, 0.11, 0.2]}, std_error=0.01)
    chosen = chosen_blocks(maps, [1], "all").iloc[0]
    assert (chosen.block_start, chosen.near_ties) == (1, [2])


def test_regret_of_a_given_block() -> None:
    maps = joined(
        one_map({2: [0.9, 0.1, 0.3]}, source="en"), one_map({2: [0.9, 0.2, 0.1]}, source="de")
    )
    assert block_regret(model_maps(maps, "all")["m"], 2, 2) == pytest.approx((0.1, 0.2))


def test_models_of_different_size_are_compared_on_relative_depth() -> None:
    # The middle half of 4 layers and of 8 layers is the same block; the first quarter is not.
    small = one_map({2: [0.5, 0.1, 0.5]}, model="small")
    large = one_map({4: [0.5, 0.5, 0.1, 0.5, 0.5]}, model="large")
    other = one_map({4: [0.1, 0.5, 0.5, 0.5, 0.5]}, model="large")
    (same, _) = agreement_between_models(joined(large, small), [4], "all").itertuples()
    assert (same.depth_a, same.depth_b, same.jaccard, same.conditions) == (4, 2, 1.0, 1)
    (unlike, _) = agreement_between_models(joined(other, small), [4], "all").itertuples()
    assert unlike.jaccard == pytest.approx(0.25 / 0.75)
    assert 0 < unlike.chance < 1
