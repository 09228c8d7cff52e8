import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from map_tables import formula_map, hand_map
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.cli.compare import distinct_names
from orchestrator.compare import Comparison, common_choice, compare, spans, summary_lines
from orchestrator.mapgrid import map_choices, map_grid, read_map
from workers.errors import InvalidInput

TEXT = {1: [9, 1, 2, 3], 2: [9, 2, 1], 3: [9, 4], 4: [9]}
SPEECH = {1: [9, 3, 2, 1], 2: [9, 1, 2], 3: [9, 5], 4: [8]}


def between(
    a: dict[int, list[float]], b: dict[int, list[float]], depths: tuple[int, ...] = ()
) -> Comparison:
    one, two = (map_grid(hand_map(rows), "angular", "all") for rows in (a, b))
    return compare(one, two, depths)


def test_each_depth_by_hand() -> None:
    first, second, third, fourth = between(TEXT, SPEECH).depths
    assert (first.start_a, first.start_b, first.jaccard) == (1, 3, 0.0)
    assert (first.regret_a, first.regret_b) == (2.0, 2.0)  # 3 - 1 in either
    # Ranks 4 1 2 3 and 4 3 2 1: 1 - 6·(0 + 4 + 0 + 4) / (4·15).
    assert first.spearman == pytest.approx(0.2)
    assert first.spearman_without_layer_0 == pytest.approx(-1)
    # Layers 2–3 and 1–2 have one of three in common.
    assert (second.start_a, second.start_b, second.jaccard) == (2, 1, pytest.approx(1 / 3))
    assert (second.regret_a, second.regret_b) == (1.0, 1.0)
    assert second.spearman == pytest.approx(0.5)
    assert second.spearman_without_layer_0 is None  # two starts have no order worth the name
    assert (third.jaccard, third.regret_a, third.spearman) == (1.0, 0.0, None)
    assert (fourth.jaccard, fourth.spearman, fourth.spearman_without_layer_0) == (1.0, None, None)


def test_overlap_by_chance_is_given_beside_the_overlap() -> None:
    found = between(TEXT, SPEECH)
    # One of four positions each: a quarter. A block of all layers cannot miss itself.
    assert found.depths[0].jaccard_by_chance == pytest.approx(0.25)
    assert found.depths[3].jaccard_by_chance == 1.0
    assert found.jaccard == pytest.approx((0 + 1 / 3 + 1 + 1) / 4)


def test_figures_over_all_blocks_by_hand() -> None:
    a, b = {1: [4, 0, 2], 2: [5, 1], 3: [7]}, {1: [8, 0, 4], 2: [9, 1], 3: [7]}
    found = between(a, b)
    # Centred: (2, -2, 0, 2, -2, 0) and twice that.
    assert found.correlation == pytest.approx(1)
    assert found.contrast == pytest.approx(2)
    assert found.mean_difference == pytest.approx((4 + 0 + 2 + 4 + 0 + 0) / 6)
    # Without layer 0: (-1, 1, 0) and (-2, 2, 0).
    assert found.correlation_without_layer_0 == pytest.approx(1)
    assert found.contrast_without_layer_0 == pytest.approx(2)


def test_depth_alone_makes_no_correlation() -> None:
    """Both maps grow with depth alike, but order the blocks of one depth the other way round."""
    a = {n: [10 * n + s for s in range(5 - n)] for n in range(1, 5)}
    b = {n: [10 * n - s for s in range(5 - n)] for n in range(1, 5)}
    assert between(a, b).correlation == pytest.approx(-1)


def test_layer_0_is_left_out_where_the_figure_says_so() -> None:
    a = {1: [100, 1, 2, 3], 2: [100, 1, 2], 3: [100, 1], 4: [100]}
    b = {1: [100, 3, 2, 1], 2: [100, 2, 1], 3: [100, 1], 4: [100]}
    found = between(a, b)
    assert found.correlation is not None
    assert found.correlation > 0.99
    assert found.correlation_without_layer_0 == pytest.approx(-1)


def test_a_map_against_itself_agrees_in_everything() -> None:
    grid = map_grid(formula_map(12), "angular", "all")
    found = compare(grid, grid)
    assert found.jaccard == 1
    assert found.correlation == pytest.approx(1)
    assert found.contrast == pytest.approx(1)
    assert found.mean_difference == 0
    assert all(d.regret_a == d.regret_b == 0 for d in found.depths)
    assert all(d.spearman == pytest.approx(1) for d in found.depths if d.depth <= 10)


def test_a_flat_map_has_no_correlation_and_no_contrast() -> None:
    flat = {1: [0.1, 0.1, 0.1], 2: [0.1, 0.1], 3: [0.1]}
    found = between(flat, {1: [1, 2, 3], 2: [4, 5], 3: [6]})
    assert (found.correlation, found.contrast, found.depths[0].spearman) == (None, None, None)
    assert "undefined" in " ".join(summary_lines(found, ("a", "b")))
    assert between({1: [1, 2, 3]}, {1: [0.1] * 3}).contrast == 0


def test_only_depths_that_both_maps_have_whole_are_compared() -> None:
    damage = hand_map({1: [4, 2, 3], 2: [5, 6]}, "damage", "target")
    other = hand_map({2: [5, 7], 3: [9]}, "damage", "target")
    found = compare(*(map_grid(t, "damage", "target") for t in (damage, other)))
    assert [d.depth for d in found.depths] == [2]
    assert found.mean_difference == pytest.approx(0.5)
    with pytest.raises(InvalidInput, match=r"--depth: depth 1 is not whole.*they have 2"):
        compare(*(map_grid(t, "damage", "target") for t in (damage, other)), depths=[1])
    with pytest.raises(InvalidInput, match="no depth has all its blocks"):
        compare(
            map_grid(damage, "damage", "target"),
            map_grid(hand_map({3: [9]}, "damage", "target"), "damage", "target"),
        )


def test_decoders_of_different_size_are_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidInput, match=r"3 and 2 layers \(give two maps of one decoder"):
        between({1: [1, 2, 3]}, {1: [1, 2]})


def test_depths_are_named_in_spans() -> None:
    assert spans([1, 2, 3, 5, 8, 9]) == "1–3, 5, 8–9"


# --- tables --------------------------------------------------------------------------------


def test_a_table_without_criterion_is_of_angular_distances(tmp_path: Path) -> None:
    hand_map(TEXT, criterion=None).to_parquet(tmp_path / "map.parquet")
    table = read_map(tmp_path)
    assert map_choices(table) == [("angular", "all")]
    assert map_grid(table, "angular", "all").row(2) == pytest.approx([9, 2, 1])


def test_a_part_of_a_table_knows_how_many_layers_the_whole_one_has() -> None:
    table = pd.concat([hand_map(TEXT), hand_map({1: [1, 1, 1, 1]}, "damage", "target")])
    grid = map_grid(table, "damage", "target")
    assert (grid.layers, grid.depths, grid.samples) == (4, (1,), 8)
    assert np.isnan(grid.distances[2]).all()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda _: None, "no map here"),
        (lambda file: file.write_text("no parquet"), "not a Parquet file"),
        (lambda file: pd.DataFrame({"pool": ["all"]}).to_parquet(file), "no column start"),
        (lambda file: hand_map({1: [1]}).iloc[:0].to_parquet(file), "holds no block"),
        (
            lambda file: pd.concat([hand_map(TEXT)] * 2).to_parquet(file),
            r"more than one map.*store/map/STAGE_KEY",
        ),
        (
            lambda file: hand_map({1: [1, np.nan]}).to_parquet(file),
            r"distance nan at start 1, depth 1 \(angular, pool all\)",
        ),
    ],
)
def test_what_is_no_map_is_named(write, message: str, tmp_path: Path) -> None:
    file = tmp_path / "map.parquet"
    write(file)
    with pytest.raises(InvalidInput, match=message):
        read_map(file)


def test_what_is_compared_suggests_itself() -> None:
    both = pd.concat([hand_map(TEXT), hand_map(TEXT, pool="last"), hand_map(TEXT, "cka")])
    damage = hand_map(TEXT, "damage", "target")
    assert common_choice(both, both, None, None) == ("angular", "all")
    assert common_choice(both, both, "cka", None) == ("cka", "all")
    assert common_choice(both, both, None, "last") == ("angular", "last")
    assert common_choice(pd.concat([both, damage]), damage, None, None) == ("damage", "target")
    with pytest.raises(InvalidInput, match=r"--pool: .*'audio' \(both have all, last\)"):
        common_choice(both, both, None, "audio")
    with pytest.raises(InvalidInput, match=r"--criterion: .*'damage' \(both have angular, cka\)"):
        common_choice(both, both, "damage", None)
    with pytest.raises(InvalidInput, match="first has angular in all; the second damage in target"):
        common_choice(hand_map(TEXT), damage, None, None)
    two_pools = pd.concat([hand_map(TEXT, pool="last"), hand_map(TEXT, pool="audio")])
    with pytest.raises(InvalidInput, match=r"--pool: .*more than one pool \(name one of"):
        common_choice(two_pools, two_pools, None, None)


# --- command -------------------------------------------------------------------------------


@pytest.fixture
def maps(tmp_path: Path) -> tuple[Path, Path]:
    for name, rows in (("text", TEXT), ("speech", SPEECH)):
        (tmp_path / name).mkdir()
        hand_map(rows).to_parquet(tmp_path / name / "map.parquet")
    return tmp_path / "text", tmp_path / "speech" / "map.parquet"


def test_command_prints_what_it_found_and_draws_it(maps: tuple[Path, Path], tmp_path: Path) -> None:
    picture = tmp_path / "both.png"
    answer = CliRunner().invoke(app, ["compare", *map(str, maps), "--out", str(picture)])
    assert answer.exit_code == 0, answer.output
    assert "A = text (8 samples)" in answer.output
    assert "B = speech (8 samples)" in answer.output
    assert "Best blocks at depth 1–4: mean Jaccard 0.58" in answer.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_gives_json_for_the_depths_asked(maps: tuple[Path, Path]) -> None:
    answer = CliRunner().invoke(app, ["compare", *map(str, maps), "--depth", "2", "--json"])
    data = json.loads(answer.output)
    assert [row["depth"] for row in data["depths"]] == [2]
    assert data["depths"][0]["spearman_without_layer_0"] is None
    assert (data["a"], data["b"], data["picture"]) == ("text", "speech", None)
    assert data["correlation"] == pytest.approx(between(TEXT, SPEECH).correlation)


def test_command_refuses_a_picture_of_no_known_kind_before_it_compares(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["compare", "no", "no", "--out", str(tmp_path / "a.gif")])
    assert isinstance(answer.exception, InvalidInput)
    assert "end it in .png, .svg, .pdf" in str(answer.exception)


def test_maps_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    one, two = tmp_path / "text" / "map.parquet", tmp_path / "speech" / "map.parquet"
    assert distinct_names(one, two) == ("text", "speech")
    assert distinct_names(tmp_path / "a.parquet", tmp_path / "b.parquet") == ("a", "b")
    assert distinct_names(one, one) == ("A", "B")
