"""The public tables of a finished sweep: their columns, types and files.

Names and order are an interface others build on (docs: definitions). Scores are in percent,
intervals are 95 %, fractions 0–1, sizes in bytes, times as the name says.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from orchestrator.mapgrid import ANGULAR

RESULTS_COLUMNS: dict[str, str] = {
    "model": "str",
    "encoder": "str",
    "task": "str",
    "source_language": "str",
    "target_language": "str",
    "test_set": "str",
    "in_domain": "boolean",
    "selector": "str",
    "depth": "Int64",
    "layers": "Int64",
    "fraction_removed": "float64",
    "block_start": "Int64",
    "heal": "str",
    "seed": "Int64",
    "metric": "str",
    "value": "float64",
    "ci_low": "float64",
    "ci_high": "float64",
    "samples": "Int64",
    "runaway_rate": "float64",
    "status": "str",
    "reason": "str",
    "stage_key": "str",
}
"""`layers` counts the unpruned decoder's; `depth` 0 is the unpruned control."""

MAPS_COLUMNS: dict[str, str] = {
    "model": "str",
    "encoder": "str",
    "task": "str",
    "source_language": "str",
    "target_language": "str",
    "modality": "str",
    "adapted": "boolean",
    "criterion": "str",
    "pool": "str",
    "start": "Int64",
    "depth": "Int64",
    "distance": "float64",
    "std_error": "float64",
    "samples": "Int64",
    "stage_key": "str",
}

CONSENSUS_COLUMNS: dict[str, str] = {
    "model": "str",
    "depth": "Int64",
    "scope": "str",
    "block_start": "Int64",
    "jaccard": "float64",
    "spearman": "float64",
    "p_value": "float64",
    "regret_mean": "float64",
    "regret_max": "float64",
    "conditions": "Int64",
    "coverage": "float64",
}

PROFILE_COLUMNS: dict[str, str] = {
    "model": "str",
    "encoder": "str",
    "depth": "Int64",
    "layers": "Int64",
    "parameters": "Int64",
    "weight_bytes": "Int64",
    "peak_bytes": "Int64",
    "encode_ms": "float64",
    "prefill_ms": "float64",
    "token_ms": "float64",
    "rtfx": "float64",
    "device": "str",
}

VALIDATION_COLUMNS: dict[str, str] = {
    "model": "str",
    "encoder": "str",
    "task": "str",
    "source_language": "str",
    "target_language": "str",
    "modality": "str",
    "adapted": "boolean",
    "criterion": "str",
    "pool": "str",
    "depth": "Int64",
    "spearman": "float64",
    "spearman_without_layer_0": "float64",
    "start": "Int64",
    "best_start": "Int64",
    "regret": "float64",
    "regret_ci_low": "float64",
    "regret_ci_high": "float64",
    "samples": "Int64",
}
"""How well a criterion ranks the blocks of one depth as their damage does (nats per token)."""

TABLES: dict[str, dict[str, str]] = {
    "results": RESULTS_COLUMNS,
    "maps": MAPS_COLUMNS,
    "consensus": CONSENSUS_COLUMNS,
    "profile": PROFILE_COLUMNS,
    "validation": VALIDATION_COLUMNS,
}


def typed(
    rows: Iterable[Mapping[str, object]] | pd.DataFrame, columns: Mapping[str, str]
) -> pd.DataFrame:
    """A table with exactly `columns`, in that order and of those types.

    Args:
        rows: mappings of column to value (a column left out is null), or a frame.
        columns: one of the `…_COLUMNS` of this module.

    Raises:
        ValueError: a row has a column that the table does not.
    """
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    unknown = [str(name) for name in frame.columns if name not in columns]
    if unknown:
        raise ValueError(f"no such column: {', '.join(unknown)} (known: {', '.join(columns)})")
    return frame.reindex(columns=list(columns)).reset_index(drop=True).astype(dict(columns))


def with_criterion(maps: pd.DataFrame) -> pd.DataFrame:
    """A `maps` table that names its criterion: one from before there was a choice is angular."""
    if "criterion" not in maps:
        return maps.assign(criterion=ANGULAR)
    return maps.assign(criterion=maps["criterion"].fillna(ANGULAR))


def write_tables(tables: Mapping[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Write each table (named as in `TABLES`) as `<name>.parquet` and `<name>.csv`."""
    paths = []
    for name, table in tables.items():
        frame = typed(table, TABLES[name])
        csv = frame.to_csv(index=False, lineterminator="\n")
        paths.append(replace_text(folder / f"{name}.csv", csv))
        unfinished = folder / f".{name}.parquet.new"
        frame.to_parquet(unfinished, index=False)
        paths.append(unfinished.replace(folder / f"{name}.parquet"))
    return paths


def replace_text(path: Path, text: str) -> Path:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    return unfinished.replace(path)
