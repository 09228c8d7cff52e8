"""One redundancy map as an array, read from its table: what comparisons and pictures work on.

A map table has a row a block (docs: definitions): `criterion, pool, start, depth, distance,
std_error, samples`. Tables from before there was more than one criterion lack the first column and
hold angular distances.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from orchestrator.consensus import Floats, whole_row
from workers.errors import InvalidInput

ANGULAR = "angular"
DAMAGE = "damage"
FILE = "map.parquet"
_NEEDED = ("pool", "start", "depth", "distance")


class Wording(NamedTuple):
    """How a criterion is called where people read."""

    name: str
    unit: str


CRITERIA: dict[str, Wording] = {
    ANGULAR: Wording("angular distance", "arccos(cos) / π"),
    "influence": Wording("block influence", "1 − mean cosine"),
    "cka": Wording("CKA distance", "1 − linear CKA"),
    DAMAGE: Wording("damage", "nats per target token"),
}
"""In the order in which they are shown."""


def wording(criterion: str) -> Wording:
    """A criterion's name and unit; of one not known here, its name in the table."""
    return CRITERIA.get(criterion, Wording(criterion, criterion))


@dataclass(frozen=True, eq=False)
class MapGrid:
    """One map by one criterion in one token pool. In all of them small means redundant."""

    criterion: str
    pool: str
    layers: int
    """Layers of the decoder, L."""
    distances: Floats
    """`[depth, start]` of shape `[layers + 1, layers]`, in the criterion's unit; NaN where not
    measured and where `start + depth > layers`."""
    samples: int | None = None
    """Utterances, where the table says so."""

    def row(self, depth: int) -> Floats | None:
        """`d(start, depth)` for every start `[layers - depth + 1]`; None unless all are there."""
        return whole_row(self.distances, depth) if 1 <= depth <= self.layers else None

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths of which every block was measured."""
        return tuple(d for d in range(1, self.layers + 1) if self.row(d) is not None)

    @property
    def best(self) -> dict[int, int]:
        """Start of the best block of each of `depths`: the smallest distance, of equals the first."""
        rows = {depth: self.row(depth) for depth in self.depths}
        return {depth: int(row.argmin()) for depth, row in rows.items() if row is not None}


def read_map(path: Path) -> pd.DataFrame:
    """A map table from its file, or from the folder it lies in; always with `criterion`.

    Raises:
        InvalidInput: there is none, it is not one, or it holds more than one map.
    """
    file = path / FILE if path.is_dir() else path
    remedy = f"give the {FILE} of one map, or the folder that holds it"
    if not file.is_file():
        raise InvalidInput("no map here", str(path), remedy)
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise InvalidInput("not a Parquet file that can be read", str(file), remedy) from error
    missing = [name for name in _NEEDED if name not in table]
    if missing:
        raise InvalidInput(f"no map: it has no column {', '.join(missing)}", str(file), remedy)
    if table.empty:
        raise InvalidInput("the map holds no block", str(file), "measure it again")
    if "criterion" not in table:
        table = table.assign(criterion=ANGULAR)
    table["criterion"] = table["criterion"].fillna(ANGULAR).astype("str")
    if table.duplicated(["criterion", "pool", "start", "depth"]).any():
        raise InvalidInput(
            "more than one map: it holds two values for the same block",
            str(file),
            "of a sweep's maps.parquet, give the artefact of one: store/map/STAGE_KEY",
        )
    wrong = table[(table["start"] < 0) | (table["depth"] < 1) | ~np.isfinite(table["distance"])]
    if len(wrong):
        first = wrong.iloc[0]
        raise InvalidInput(
            f"distance {first['distance']} at start {first['start']}, depth {first['depth']} "
            f"({first['criterion']}, pool {first['pool']})",
            str(file),
            "measure the map again",
        )
    return table


def map_choices(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The (criterion, pool) pairs a table holds, known criteria first, pools as they come."""
    known = list(CRITERIA)
    pairs = table[["criterion", "pool"]].drop_duplicates().itertuples(index=False, name=None)
    found = [(str(criterion), str(pool)) for criterion, pool in pairs]
    return sorted(found, key=lambda pair: known.index(pair[0]) if pair[0] in known else len(known))


def map_grid(table: pd.DataFrame, criterion: str, pool: str) -> MapGrid:
    """One map of a table (`read_map`) as an array.

    Raises:
        InvalidInput: the table has no such criterion or pool.
    """
    rows = table[(table["criterion"] == criterion) & (table["pool"] == pool)]
    if rows.empty:
        held = ", ".join(f"{c} in {p}" for c, p in map_choices(table))
        raise InvalidInput(
            f"the map has no {criterion} distances in pool {pool!r}", "", f"it has {held}"
        )
    layers = int((table["start"] + table["depth"]).max())
    distances = np.full((layers + 1, layers), np.nan)
    distances[rows["depth"].to_numpy(dtype=int), rows["start"].to_numpy(dtype=int)] = rows[
        "distance"
    ].to_numpy(dtype=np.float64)
    samples = rows["samples"].max() if "samples" in rows else None
    return MapGrid(criterion, pool, layers, distances, None if pd.isna(samples) else int(samples))
