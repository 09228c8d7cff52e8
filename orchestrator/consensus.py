"""What maps say together: the shared block, agreement between conditions, and how sure that is.

Pure functions on the `maps` table of a sweep (docs: definitions). A *condition* is one map:
(encoder, task, source language, target language, modality, adapted) on one model. Nothing here
averages over an incomplete grid without saying so: `coverage` tells what was there.
"""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from workers.errors import InvalidInput

Floats = NDArray[np.float64]
SCOPES = ("all", "tasks", "languages", "encoders", "modalities", "adapted", "inherited")
WITHOUT_LAYER_0 = "/without-layer-0"
CONSENSUS = [
    "model", "depth", "scope", "block_start", "jaccard", "spearman", "p_value", "regret_mean",
    "regret_max", "conditions", "coverage",
]  # fmt: skip
_CONDITION = ["encoder", "task", "source_language", "target_language", "modality", "adapted"]
_DECIMALS = 12  # regrets closer than this are ties: sums in another order must not move a block


class MapCondition(NamedTuple):
    """Under what one map was measured (on one model); `encoder` is None where none took part."""

    encoder: str | None
    task: str
    source_language: str
    target_language: str | None
    modality: str
    adapted: bool

    @property
    def label(self) -> str:
        """Such as `whisper · asr-de · speech`."""
        task = "-".join(p for p in (self.task, self.source_language, self.target_language) if p)
        kind = self.modality if self.adapted else f"{self.modality}, before adapting"
        return " · ".join(p for p in (self.encoder, task, kind) if p)


@dataclass(frozen=True)
class ModelMaps:
    """One model's maps in one pool.

    `distances[condition][depth, start]` has shape `[layers + 1, layers]`, NaN where not measured;
    `errors` holds the standard errors likewise.
    """

    layers: int
    distances: dict[MapCondition, Floats]
    errors: dict[MapCondition, Floats]

    def row(self, condition: MapCondition, depth: int) -> Floats | None:
        """`d(start, depth)` for every start `[layers - depth + 1]`; None unless all are there."""
        table = self.distances.get(condition)
        if table is None or not 1 <= depth <= self.layers:
            return None
        return whole_row(table, depth)


def whole_row(table: Floats, depth: int) -> Floats | None:
    """The starts of one depth in `[layers + 1, layers]`; None unless all of them are finite."""
    row = table[depth, : table.shape[1] - depth + 1]
    return row if bool(np.isfinite(row).all()) else None


def best_start(distances: Mapping[int, float]) -> int:
    """Start of the best block of one depth: `argmin_start d(start, depth)`; ties: the smallest.

    Raises:
        InvalidInput: no distance given, or one is not finite.
    """
    if not distances:
        raise InvalidInput("no distances to choose a block from", "maps")
    for start, distance in distances.items():
        if not math.isfinite(distance):
            raise InvalidInput(f"the distance at start {start} is {distance}", "maps")
    return min(distances, key=lambda start: (distances[start], start))


def shared_start(
    tables: Sequence[pd.DataFrame], depth: int, pool: str, criterion: str = "angular"
) -> int:
    """Start of the block all conditions can share at one depth.

    With regret `r_c(s) = d_c(s, depth) - min_s' d_c(s', depth)`, the start that minimises the
    largest regret over conditions `max_c r_c(s)`; ties: the smaller mean regret, then the smaller
    start.

    Args:
        tables: one map a condition, each with the columns of `maps.parquet`.
        depth: number of layers to remove.
        pool: token pool the distances are read from.
        criterion: what the distances are.

    Raises:
        InvalidInput: no table, or one lacks a block of this depth or is of another size.
    """
    rows = []
    for table in tables:
        of_pool = by_criterion(table, criterion)
        chosen = of_pool[(of_pool["depth"] == depth) & (of_pool["pool"] == pool)]
        chosen = chosen.sort_values("start")
        row = chosen["distance"].to_numpy(dtype=np.float64)
        if list(chosen["start"]) != list(range(len(row))) or not len(row):
            raise InvalidInput(f"a map lacks blocks of depth {depth} in pool {pool}", "maps")
        if not np.isfinite(row).all():
            raise InvalidInput(f"a map has a distance at depth {depth} that is not finite", "maps")
        rows.append(row)
    if not rows:
        raise InvalidInput("no maps to choose a shared block from", "maps")
    if len({len(row) for row in rows}) > 1:
        raise InvalidInput(
            "the maps are of decoders with different numbers of layers",
            "maps",
            "a block can be shared within one decoder only",
        )
    return _minimax(np.stack(rows))[0]


def block_regret(measured: ModelMaps, depth: int, start: int) -> tuple[float, float]:
    """Mean and largest regret `d_c(start, depth) - min_s d_c(s, depth)` of one block.

    Over the speech conditions of the adapted model; NaN without any such map.
    """
    rows = [measured.row(c, depth) for c in measured.distances if _speech(c)]
    regrets = [row[start] - row.min() for row in rows if row is not None and start < len(row)]
    if not regrets:
        return math.nan, math.nan
    return float(np.mean(regrets)), float(np.max(regrets))


def by_criterion(maps: pd.DataFrame, criterion: str) -> pd.DataFrame:
    """The rows of one criterion; where none is named, distances are angular."""
    if "criterion" in maps.columns:
        return maps[maps["criterion"].fillna("angular") == criterion]
    return maps if criterion == "angular" else maps.iloc[:0]


def model_maps(maps: pd.DataFrame, pool: str, criterion: str = "angular") -> dict[str, ModelMaps]:
    """Every model's maps by one criterion in one pool, as arrays.

    Raises:
        InvalidInput: one condition has two values for the same block.
    """
    result = {}
    for model, of_model in maps.groupby("model", sort=True):
        layers = int((of_model["start"] + of_model["depth"]).max())
        distances: dict[MapCondition, Floats] = {}
        errors: dict[MapCondition, Floats] = {}
        of_criterion = by_criterion(of_model, criterion)
        in_pool = of_criterion[of_criterion["pool"] == pool]
        for key, rows in in_pool.groupby(_CONDITION, dropna=False, sort=True):
            condition = condition_of(key)
            starts = rows["start"].to_numpy(dtype=int)
            depths = rows["depth"].to_numpy(dtype=int)
            if len(set(zip(starts, depths, strict=True))) < len(rows):
                raise InvalidInput(f"two maps of {model} for {condition.label}", "maps")
            for target, column in ((distances, "distance"), (errors, "std_error")):
                table = np.full((layers + 1, layers), np.nan)
                table[depths, starts] = rows[column].to_numpy(dtype=np.float64, na_value=np.nan)
                target[condition] = table
        result[str(model)] = ModelMaps(layers, distances, errors)
    return result


def chosen_blocks(maps: pd.DataFrame, depths: Sequence[int], pool: str) -> pd.DataFrame:
    """Each condition's own best block at each depth.

    Returns:
        Columns: model, encoder, task, source_language, target_language, modality, adapted, depth,
        block_start, distance, near_ties. `near_ties` names the other starts that this sample
        cannot tell from the best: `d(s) - d(best) <= 1.96 * sqrt(se(s)^2 + se(best)^2)`, which is
        generous, as all blocks of a map are measured on the same utterances.
    """
    rows = []
    for model, measured in model_maps(maps, pool).items():
        for condition in measured.distances:
            for depth in depths:
                row = measured.row(condition, depth)
                if row is None:
                    continue
                error = measured.errors[condition][depth, : len(row)]
                start = int(np.argmin(row))
                near = row - row[start] <= 1.96 * np.hypot(error, error[start])
                ties = [int(s) for s in np.flatnonzero(near) if s != start]
                rows.append((model, *condition, depth, start, float(row[start]), ties))
    columns = ["model", *_CONDITION, "depth", "block_start", "distance", "near_ties"]
    return pd.DataFrame(rows, columns=columns)


def consensus_table(
    maps: pd.DataFrame,
    depths: Sequence[int],
    pool: str,
    results: pd.DataFrame | None = None,
    permutations: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Agreement between conditions and the block they can share, per model, depth and scope.

    A scope says over what the conditions agree; it is made of pairs of conditions:

    - `all`: any two speech conditions of the adapted model;
    - `tasks`, `languages`, `encoders`: two of them that differ in that alone (tasks: on the same
      spoken language; languages: in the same task);
    - `modalities`: text against speech, both after adapting;
    - `adapted`: before against after adapting, on the same modality (text);
    - `inherited`: text before adapting against speech after it.

    Each stands once with every start and once as `…/without-layer-0` with the blocks that leave
    layer 0 in place: layer 0 does so much of the work that it inflates every correlation.

    At depth `n`, with `B_c` the best block of condition `c` and pairs `(a, b)` of the scope:

    - `jaccard`: mean over pairs of `|B_a ∩ B_b| / |B_a ∪ B_b|`;
    - `spearman`: mean over pairs of the rank correlation of `d_a(·, n)` and `d_b(·, n)`; null with
      fewer than three starts;
    - `p_value`: `(1 + #{T* >= T}) / (1 + permutations)`, where `T` is `jaccard` and `T*` the same
      after the positions of each condition's `d(·, n)` were shuffled on their own, which makes
      every block position as likely as any other. Conditions on one decoder share its weights, so
      a small p is nearly a matter of course: see `agreement_between_models` for a baseline;
    - `block_start`, `regret_mean`, `regret_max`: the minimax block over the scope's conditions
      (see `shared_start`) and its regret in distance;
    - `conditions`: how many conditions took part; `coverage`: that number over those expected.
      Expected are all the model's encoders × all (task, language), as `results` names them (without
      it: all encoders in `maps`), for every kind of map (modality, adapted) that any model has. A
      map that lacks a start at this depth
      counts as missing. A scope with no pair to expect has no row.

    Args:
        maps: the `maps` table.
        depths: numbers of layers removed; 0 is passed over.
        pool: token pool the distances are read from.
        results: the `results` table, to know conditions that have no map yet.
        permutations: size of the permutation test.
        seed: of the permutation test.
    """
    grids = model_maps(maps, pool)
    nulls: dict[tuple[int, int, bytes], Floats] = {}
    rows: list[tuple[object, ...]] = []
    if results is not None:  # a model none of whose maps is there yet still has a row: a hole
        for model, layers in results.groupby("model")["layers"].max().dropna().items():
            grids.setdefault(str(model), ModelMaps(int(layers), {}, {}))
    for model, measured in sorted(grids.items()):
        expected = expected_conditions(maps, results, model)
        scopes = {scope: scope_pairs(scope, expected) for scope in SCOPES}
        for depth in sorted({d for d in depths if 1 <= d <= measured.layers}):
            known = {c: r for c in expected if (r := measured.row(c, depth)) is not None}
            for scope in SCOPES:
                members, pairs = scopes[scope]
                if not members:
                    continue
                here = [(a, b) for a, b in pairs if a in known and b in known]
                present = [c for c in members if c in known] if scope == "all" else _members(here)
                for first, suffix in ((0, ""), (1, WITHOUT_LAYER_0)):
                    if measured.layers - depth + 1 - first < 1:
                        continue
                    distances = np.array([known[c][first:] for c in present])
                    index = {c: i for i, c in enumerate(present)}
                    pair_index = np.array([(index[a], index[b]) for a, b in here], dtype=int)
                    numbers = _agreement(
                        distances, pair_index, depth, first, permutations, seed, nulls
                    )
                    coverage = len(present) / len(members)
                    rows.append((model, depth, scope + suffix, *numbers, len(present), coverage))
    frame = pd.DataFrame(rows, columns=CONSENSUS)
    floats = ["jaccard", "spearman", "p_value", "regret_mean", "regret_max", "coverage"]
    kinds = dict.fromkeys(["depth", "block_start", "conditions"], "Int64")
    return frame.astype(kinds | dict.fromkeys(floats, "float64") | {"model": "str", "scope": "str"})


def expected_conditions(
    maps: pd.DataFrame, results: pd.DataFrame | None = None, model: str | None = None
) -> list[MapCondition]:
    """The full grid: every encoder × (task, languages), for each kind of map that any model has.

    Args:
        maps: the `maps` table.
        results: the `results` table.
        model: only encoders that `results` names beside this model: a released SpeechLLM has its
            own, and no other.
    """
    tables = [t for t in (maps, results) if t is not None and len(t)]
    names = ["task", "source_language", "target_language"]
    tasks: set[tuple[Any, ...]] = {
        tuple(None if pd.isna(part) else part for part in key)
        for table in tables
        for key in table[names].drop_duplicates().itertuples(index=False, name=None)
    }
    named = [table["encoder"] for table in tables]
    if results is not None and model in set(results["model"]):
        named = [table.loc[table["model"] == model, "encoder"] for table in tables]
    encoders = sorted({str(e) for column in named for e in column.dropna().unique()})
    kinds = {
        (modality, bool(adapted), not pd.isna(encoder))
        for modality, adapted, encoder in maps[["modality", "adapted", "encoder"]]
        .drop_duplicates()
        .itertuples(index=False, name=None)
    }
    if results is not None and len(results):
        kinds.add(("speech", True, True))
    return sorted(
        (
            condition_of((encoder, *task, modality, adapted))
            for modality, adapted, has_encoder in kinds
            for encoder in (encoders if has_encoder else [None])
            for task in tasks
        ),
        key=lambda condition: tuple(str(part or "") for part in condition),
    )


def layer_frequency(maps: pd.DataFrame, pool: str, depths: Sequence[int]) -> pd.DataFrame:
    """How often each layer falls in a chosen block.

    `frequency(l)` = share of (condition, depth) pairs whose best block holds layer `l`, over the
    speech conditions of the adapted model that have a whole row at that depth.

    Returns:
        Columns: model, layer, frequency (0–1). No rows for a model without such maps.
    """
    rows = []
    blocks = chosen_blocks(maps, [d for d in depths if d >= 1], pool)
    blocks = blocks[(blocks["modality"] == "speech") & (blocks["adapted"] == True)]  # noqa: E712
    layers = {model: measured.layers for model, measured in model_maps(maps, pool).items()}
    for model, chosen in blocks.groupby("model", sort=True):
        counts = np.zeros(layers[str(model)])
        for start, depth in zip(chosen["block_start"], chosen["depth"], strict=True):
            counts[start : start + depth] += 1
        rows += [(model, layer, count / len(chosen)) for layer, count in enumerate(counts)]
    return pd.DataFrame(rows, columns=["model", "layer", "frequency"]).astype(
        {"model": "str", "layer": "int64", "frequency": "float64"}
    )


def chance_frequency(layers: int, depths: Sequence[int]) -> Floats:
    """What `layer_frequency` is in the mean `[layers]` if every block position is as likely."""
    rows = []
    for depth in (d for d in depths if 1 <= d <= layers):
        counts = np.zeros(layers)
        for start in range(layers - depth + 1):
            counts[start : start + depth] += 1
        rows.append(counts / (layers - depth + 1))
    return np.mean(rows, axis=0) if rows else np.zeros(layers)


def chance_jaccard(starts: int, depth: int) -> float:
    """Mean Jaccard of two blocks whose positions among `starts` are drawn on their own."""
    positions = np.arange(starts)
    return float(jaccard_by_shift(starts, depth)[abs(positions[:, None] - positions)].mean())


def agreement_between_models(maps: pd.DataFrame, depths: Sequence[int], pool: str) -> pd.DataFrame:
    """Agreement of *different* decoders under the same condition, on relative depth.

    The baseline beside `consensus_table`: two decoders share no weights. A block `(s, n)` of a
    decoder with `L` layers is the interval `[s/L, (s+n)/L]`; depth `n` of model a is compared with
    `round(n * L_b / L_a)` (at least 1) of model b. `jaccard` is the mean over conditions of
    overlap over union of the two best blocks' intervals; `chance` the same over all pairs of
    positions, each as likely. Speech conditions of the adapted models.

    Returns:
        Columns: model_a, model_b, depth_a, depth_b, without_layer_0 (bool), jaccard, chance,
        conditions. Empty with fewer than two models.
    """
    grids = model_maps(maps, pool)
    names = sorted(grids)
    rows = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            one, two = grids[a], grids[b]
            common = [c for c in one.distances if c in two.distances and _speech(c)]
            for depth_a in sorted({d for d in depths if 1 <= d < one.layers}):
                depth_b = max(1, round(depth_a * two.layers / one.layers))
                paired = [(one.row(c, depth_a), two.row(c, depth_b)) for c in common]
                whole = [(x, y) for x, y in paired if x is not None and y is not None]
                for first in (0, 1):
                    starts_a = np.arange(first, one.layers - depth_a + 1) / one.layers
                    starts_b = np.arange(first, two.layers - depth_b + 1) / two.layers
                    if not whole or not len(starts_a) or not len(starts_b):
                        continue
                    overlap = _interval_jaccard(
                        starts_a, depth_a / one.layers, starts_b, depth_b / two.layers
                    )
                    values = [overlap[np.argmin(x[first:]), np.argmin(y[first:])] for x, y in whole]
                    numbers = (float(np.mean(values)), float(overlap.mean()), len(whole))
                    rows.append((a, b, depth_a, depth_b, first == 1, *numbers))
    columns = ["model_a", "model_b", "depth_a", "depth_b", "without_layer_0"]
    return pd.DataFrame(rows, columns=[*columns, "jaccard", "chance", "conditions"])


def _agreement(
    distances: Floats,
    pairs: NDArray[np.int_],
    depth: int,
    first: int,
    permutations: int,
    seed: int,
    nulls: dict[tuple[int, int, bytes], Floats],
) -> tuple[object, ...]:
    """block_start, jaccard, spearman, p_value, regret_mean, regret_max; None where undefined."""
    if not len(distances):
        return (None,) * 6
    start, regret_mean, regret_max = _minimax(distances)
    jaccard = spearman = p_value = None
    if len(pairs):
        left, right = pairs.T
        starts = distances.shape[1]
        by_shift = jaccard_by_shift(starts, depth)
        best = distances.argmin(axis=1)
        jaccard = float(by_shift[abs(best[left] - best[right])].mean())
        spearman = mean_rank_correlation(distances, left, right)
        key = (starts, depth, pairs.tobytes())
        if key not in nulls:
            nulls[key] = _null_jaccards(starts, by_shift, pairs, depth, permutations, seed)
        p_value = float((1 + np.sum(nulls[key] >= jaccard - 1e-9)) / (1 + permutations))
    return start + first, jaccard, spearman, p_value, regret_mean, regret_max


def _null_jaccards(
    starts: int,
    by_shift: Floats,
    pairs: NDArray[np.int_],
    depth: int,
    permutations: int,
    seed: int,
) -> Floats:
    # Shuffling d(·, n) puts its minimum anywhere with equal chance: drawing the position is enough.
    random = np.random.default_rng([seed, starts, depth, zlib.crc32(pairs.tobytes())])
    best = random.integers(starts, size=(permutations, int(pairs.max()) + 1))
    left, right = pairs.T
    rows_at_once = max(1, 4_000_000 // len(pairs))
    return np.concatenate(
        [
            by_shift[abs(part[:, left] - part[:, right])].mean(axis=1)
            for part in (
                best[row : row + rows_at_once] for row in range(0, permutations, rows_at_once)
            )
        ]
        or [np.empty(0)]
    )


def _minimax(distances: Floats) -> tuple[int, float, float]:
    """Shared start, its mean and its largest regret, from `[conditions, starts]`."""
    regret = distances - distances.min(axis=1, keepdims=True)
    largest, mean = regret.max(axis=0), regret.mean(axis=0)
    order = np.lexsort((np.arange(len(mean)), mean.round(_DECIMALS), largest.round(_DECIMALS)))
    start = int(order[0])
    return start, float(mean[start]), float(largest[start])


def mean_rank_correlation(
    distances: Floats, left: NDArray[np.int_], right: NDArray[np.int_]
) -> float | None:
    """Mean Spearman over pairs of rows `(left, right)` of `[maps, starts]`.

    None with fewer than three starts, or where a row is flat.
    """
    if distances.shape[1] < 3:
        return None
    ranks = rankdata(distances, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1)
    if not norms.all():  # a flat row has no order to correlate
        return None
    ranks /= norms[:, None]
    return float((ranks[left] * ranks[right]).sum(axis=1).mean())


def jaccard_by_shift(starts: int, depth: int) -> Floats:
    """Jaccard of two blocks of `depth` layers whose starts differ by 0, 1, … `starts - 1`."""
    common = np.maximum(0, depth - np.arange(starts))
    return np.asarray(common / (2 * depth - common), dtype=np.float64)


def _interval_jaccard(a: Floats, length_a: float, b: Floats, length_b: float) -> Floats:
    """Overlap over union of intervals `[a, a + length_a]` and `[b, b + length_b]`: `[len a, len b]`."""
    upper = np.minimum((a + length_a)[:, None], b + length_b)
    overlap = np.maximum(0.0, upper - np.maximum(a[:, None], b))
    return np.asarray(overlap / (length_a + length_b - overlap), dtype=np.float64)


def condition_of(key: Iterable[Any]) -> MapCondition:
    """The condition named by the six columns of a table, null where they do not apply."""
    encoder, task, source, target, modality, adapted = key
    return MapCondition(
        None if pd.isna(encoder) else encoder,
        task,
        source,
        None if pd.isna(target) else target,
        modality,
        bool(adapted),
    )


def scope_pairs(
    scope: str, conditions: Sequence[MapCondition]
) -> tuple[list[MapCondition], list[tuple[MapCondition, MapCondition]]]:
    """The conditions of a scope and its pairs (see `consensus_table`)."""
    pairs = [
        (a, b)
        for i, a in enumerate(conditions)
        for b in conditions[i + 1 :]
        if _belongs(scope, a, b)
    ]
    members = [c for c in conditions if _speech(c)] if scope == "all" else _members(pairs)
    return members, pairs


def _members(pairs: Iterable[tuple[MapCondition, MapCondition]]) -> list[MapCondition]:
    return list(dict.fromkeys(condition for pair in pairs for condition in pair))


def _speech(condition: MapCondition) -> bool:
    return condition.modality == "speech" and condition.adapted


def _belongs(scope: str, a: MapCondition, b: MapCondition) -> bool:
    same_work = a[1:4] == b[1:4]
    same_encoder = a.encoder == b.encoder
    # A map made without an encoder (text, before adapting) stands beside those of every encoder.
    fitting_encoder = same_encoder or a.encoder is None or b.encoder is None
    if scope in ("modalities", "adapted", "inherited"):
        if not (same_work and fitting_encoder):
            return False
        if scope == "modalities":
            return a.modality != b.modality and a.adapted and b.adapted
        if scope == "adapted":
            return a.modality == b.modality and a.adapted != b.adapted
        before, after = (a, b) if b.adapted else (b, a)
        return before.modality == "text" and not before.adapted and _speech(after)
    if not (_speech(a) and _speech(b)):
        return False
    if scope == "tasks":
        return same_encoder and a.task != b.task and a.source_language == b.source_language
    if scope == "languages":
        return same_encoder and a.task == b.task and not same_work
    if scope == "encoders":
        return same_work and not same_encoder
    return True
