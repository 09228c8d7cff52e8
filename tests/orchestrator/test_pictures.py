import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from map_tables import formula_map, hand_map
from matplotlib import rcParams

from orchestrator.compare import compare
from orchestrator.mapgrid import MapGrid, map_grid
from orchestrator.pictures import draw_comparison, draw_maps, draw_validation
from orchestrator.pictures.validation import validation_curves
from orchestrator.shades import Limits, damage_ticks, difference_limits, shade_limits
from workers.errors import InvalidInput

LAYERS = 6


def grid(seed: int = 0, criterion: str = "angular", pool: str = "all") -> MapGrid:
    return map_grid(formula_map(LAYERS, seed, criterion, pool), criterion, pool)


def validation(pools: tuple[str, ...] = ("all", "target")) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "criterion": criterion, "pool": pool, "depth": depth,
                "spearman": None if depth > 4 else 0.5,
                "spearman_without_layer_0": None if depth > 3 else 0.2, "start": 3,
                "best_start": 2, "regret": 0.1 * depth, "regret_ci_low": 0.0,
                "regret_ci_high": 0.3 * depth, "samples": 16,
            }
            for criterion in ("angular", "cka")
            for pool in pools
            for depth in range(1, LAYERS + 1)
        ]
    )  # fmt: skip


DRAWINGS: dict[str, Callable[[Path], Path]] = {
    "map": lambda out: draw_maps([grid()], out, "lab-llama · asr-de"),
    "maps": lambda out: draw_maps([grid(), grid(1, pool="last"), grid(0, "damage", "target")], out),
    "comparison": lambda out: draw_comparison(compare(grid(), grid(1)), out, ("text", "speech")),
    "validation": lambda out: draw_validation(validation(), out, "lab-llama"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_has_a_size_to_read_it_at_and_is_the_same_each_time(
    name: str, tmp_path: Path
) -> None:
    file = DRAWINGS[name](tmp_path / "one.png")
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert 700 <= width <= 3000
    assert 600 <= height <= 2500
    assert len(data) > 10_000  # more than an empty sheet
    assert DRAWINGS[name](tmp_path / "two.png").read_bytes() == data


@pytest.mark.parametrize(("suffix", "begins"), [(".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_the_suffix_says_the_format_and_no_date_gets_in(
    suffix: str, begins: bytes, tmp_path: Path
) -> None:
    one, two = (draw_maps([grid()], tmp_path / f"{name}{suffix}") for name in "ab")
    assert one.read_bytes().startswith(begins)
    assert one.read_bytes() == two.read_bytes()
    assert b"CreationDate" not in one.read_bytes()
    assert b"dc:date" not in one.read_bytes()


def test_text_in_a_title_is_taken_as_it_is(tmp_path: Path) -> None:
    """A dollar sign or a backslash in a name is no formula."""
    draw_maps([grid()], tmp_path / "a.png", r"m$odel · \frac{1}$")


def test_drawing_leaves_the_settings_of_a_notebook_alone(tmp_path: Path) -> None:
    before = dict(rcParams)
    draw_maps([grid()], tmp_path / "a.png")
    assert dict(rcParams) == before


def test_best_blocks_are_those_of_the_smallest_distance_and_of_whole_depths() -> None:
    rows = {1: [5, 2, 1, 1], 2: [4, 3, 3], 4: [9]}
    measured = map_grid(hand_map(rows), "angular", "all")
    assert measured.best == {1: 2, 2: 1, 4: 0}
    assert measured.distances.shape == (5, 4)


def test_the_scale_ends_where_blocks_that_leave_layer_0_do() -> None:
    table = map_grid(hand_map({1: [50, 2, 1], 2: [60, 3], 3: [70]}), "angular", "all").distances
    assert shade_limits([table]) == Limits(0.0, 3.0, True)
    assert shade_limits([table, table + 1]) == Limits(0.0, 4.0, True)


def test_damage_may_be_negative_and_a_flat_map_still_has_a_scale() -> None:
    gain = map_grid(hand_map({1: [0.4, -0.2, 0.1]}, "damage", "target"), "damage", "target")
    assert shade_limits([gain.distances]) == Limits(-0.2, 0.1, True)
    flat = map_grid(hand_map({1: [0, 0, 0]}), "angular", "all")
    assert shade_limits([flat.distances]) == Limits(0.0, 1.0, False)
    assert damage_ticks(Limits(-0.3, 1.5, False)) == [-0.2, -0.05, 0.0, 0.05, 0.2, 0.5, 1.0]


def test_a_difference_is_centred_on_zero() -> None:
    difference = compare(grid(), grid(1)).difference
    limits = difference_limits(difference)
    assert limits.low == -limits.high
    assert limits.high == pytest.approx(np.nanmax(abs(difference[:, 1:])))
    assert difference_limits(np.zeros((3, 2))) == Limits(-1.0, 1.0, False)


def test_validation_curves_are_means_over_conditions() -> None:
    two = validation(("all",))
    two["regret"] += 1.0
    curves = validation_curves(pd.concat([validation(("target", "all")), two]))
    assert list(curves) == [(c, p) for c in ("angular", "cka") for p in ("target", "all")]
    assert curves["angular", "all"].loc[2, "regret"] == pytest.approx((0.2 + 1.2) / 2)
    assert curves["angular", "target"].loc[2, "regret"] == pytest.approx(0.2)
    assert np.isnan(curves["cka", "all"].loc[5, "spearman"])


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"end it in \.png, \.svg, \.pdf"):
        draw_maps([grid()], tmp_path / "map.jpeg")
    with pytest.raises(InvalidInput, match="no such folder"):
        draw_maps([grid()], tmp_path / "none" / "map.png")
    with pytest.raises(InvalidInput, match="no map to draw"):
        draw_maps([], tmp_path / "map.png")
    with pytest.raises(InvalidInput, match="measure damage first"):
        draw_validation(validation().iloc[:0], tmp_path / "v.png")
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(InvalidInput, match="cannot be written"):
        draw_maps([grid()], tmp_path / "taken.png")


@pytest.mark.parametrize("layers", [1, 2])
def test_the_smallest_decoders_can_be_drawn(layers: int, tmp_path: Path) -> None:
    small = map_grid(formula_map(layers), "angular", "all")
    draw_maps([small], tmp_path / "a.png")
    draw_comparison(compare(small, small), tmp_path / "b.png", ("a", "b"))
