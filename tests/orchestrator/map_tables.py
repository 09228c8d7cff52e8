"""Map tables made by hand or by formula, for tests of what reads them."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd


def hand_map(
    rows: Mapping[int, Sequence[float]],
    criterion: str | None = "angular",
    pool: str = "all",
    samples: int = 8,
) -> pd.DataFrame:
    """A map table with the given distances by depth, one a start; criterion None: no such column."""
    cells = [
        {"criterion": criterion, "pool": pool, "start": start, "depth": depth,
         "distance": float(distance), "std_error": 0.01, "samples": samples}
        for depth, distances in rows.items()
        for start, distance in enumerate(distances)
    ]  # fmt: skip
    table = pd.DataFrame(cells)
    return table if criterion else table.drop(columns="criterion")


def formula_map(
    layers: int,
    seed: int = 0,
    criterion: str = "angular",
    pool: str = "all",
    depths: Sequence[int] = (),
) -> pd.DataFrame:
    """A map such as decoders have: layer 0 turns the stream most, and the upper middle least."""
    places = np.arange(layers) / layers
    steps = (0.03 + 0.1 * abs(places - 0.6)) * np.random.default_rng(seed).uniform(0.8, 1.2, layers)
    steps[0] = 0.35
    scale = 8.0 if criterion == "damage" else 0.5
    rows = {
        depth: [
            scale * np.tanh(2 * steps[start : start + depth].sum())
            for start in range(layers - depth + 1)
        ]
        for depth in depths or range(1, layers + 1)
    }
    return hand_map(rows, criterion, pool, 128)
