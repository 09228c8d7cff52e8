"""From the store to the tables: `results`, `maps` and `profile` of a finished or half-finished sweep.

Every cell of the plan has its row, with a status and a reason where there is no score.
"""

import contextlib
import io
import json
from typing import Any

import pandas as pd

from orchestrator.graph import Node, Plan
from orchestrator.report.tables import (
    MAPS_COLUMNS,
    PROFILE_COLUMNS,
    RESULTS_COLUMNS,
    VALIDATION_COLUMNS,
    typed,
)
from orchestrator.reuse import decide
from orchestrator.runs import StageRecord
from orchestrator.store import Artefacts, CorruptArtefact, Store
from orchestrator.validation import validate
from workers.maps.redundancy import RedundancyMap

RELIEVED = ("adapt", "heal", "map", "damage", "evaluate")
"""Kinds that the OOM ladder helps."""
SCORE = ("metric", "value", "ci_low", "ci_high", "samples")
METRICS = {"asr": ("wer", "cer"), "ast": ("bleu", "chrf")}


DAMAGED = "its artefact in the store is not what was written: run the sweep again"


def fetch_tables(plan: Plan, store: Store) -> Artefacts:
    """Bring what the tables read to this machine, many artefacts at a time.

    Returns:
        The store as it is then: what turned out to be damaged is not in it.
    """
    known = store.snapshot()
    for kinds in (("map", "damage"), ("evaluate",)):
        for node in plan.nodes.values():
            with contextlib.suppress(CorruptArtefact):
                decide(plan, node, known)
        nodes = [node for kind in kinds for node in plan.by_kind(kind)]
        keyed = [(node.kind, key) for node in nodes if (key := plan.key(node.id)) is not None]
        store.fetch(artefact for artefact in keyed if known.has(*artefact))
    return store.snapshot()


def results_table(
    plan: Plan,
    store: Artefacts,
    records: dict[str, StageRecord],
    damaged: list[tuple[str, str]],
) -> pd.DataFrame:
    """One row per evaluation and metric (columns of the design's `results.parquet`).

    Args:
        plan: of the run.
        store: of the run.
        records: what the journal says of each stage.
        damaged: receives kind and key of artefacts that are not what was written.
    """
    rows: list[dict[str, Any]] = []
    for node in plan.by_kind("evaluate"):
        heal = plan.nodes[node.inputs["model"]]
        with contextlib.suppress(CorruptArtefact):
            decide(plan, heal, store)
        block = heal.params.get("block")
        key = plan.key(node.id)
        shared = {
            **node.cell,
            "fraction_removed": node.cell["depth"] / node.cell["layers"],
            "block_start": block["start"] if block else None,
            "stage_key": key,
        }
        data = None
        if key is not None and store.has("evaluate", key):
            try:
                data = json.loads(store.read("evaluate", key, "scores.json"))
            except CorruptArtefact:
                damaged.append(("evaluate", key))
        if data is not None:
            rows.extend(
                {
                    **shared,
                    **{name: score[name] for name in SCORE},
                    "runaway_rate": data["runaway_rate"],
                    "status": "done",
                    "reason": None,
                }
                for score in data["scores"]
            )
        else:
            state, reason = _why_not(node, records)
            if key and _lost(node, key, records) and ("evaluate", key) not in damaged:
                damaged.append(("evaluate", key))
            if ("evaluate", key) in damaged:
                state, reason = "pending", DAMAGED
            rows.extend(
                {**shared, "metric": metric, "status": state, "reason": reason}
                for metric in METRICS[node.cell["task"]]
            )
    return typed(rows, RESULTS_COLUMNS)


def maps_table(
    plan: Plan,
    store: Artefacts,
    records: dict[str, StageRecord],
    damaged: list[tuple[str, str]],
) -> pd.DataFrame:
    """One row per map, criterion, pool and block (columns of the design's `maps.parquet`)."""
    parts = []
    for node in (*plan.by_kind("map"), *plan.by_kind("damage")):
        key = plan.key(node.id)
        if key is None or not store.has(node.kind, key):
            if key and _lost(node, key, records):
                damaged.append((node.kind, key))
            continue
        try:
            part = pd.read_parquet(io.BytesIO(store.read(node.kind, key, "map.parquet")))
        except CorruptArtefact:
            damaged.append((node.kind, key))
            continue
        labels = {name: value for name, value in node.cell.items() if name != "layers"}
        parts.append(part.assign(**labels, stage_key=key))
    if not parts:
        return typed([], MAPS_COLUMNS)
    return pd.concat([typed(part, MAPS_COLUMNS) for part in parts], ignore_index=True)


def validation_table(plan: Plan, store: Artefacts, damaged: list[tuple[str, str]]) -> pd.DataFrame:
    """Every map that has a damage map of its condition, held against it (`validation.parquet`)."""
    parts = []
    for damage in plan.by_kind("damage"):
        beside = plan.nodes[damage.id.replace("damage/", "map/", 1)]
        keys = plan.key(beside.id), plan.key(damage.id)
        folders = [
            store.path(node.kind, key)
            for node, key in zip((beside, damage), keys, strict=True)
            if key is not None and store.has(node.kind, key) and (node.kind, key) not in damaged
        ]
        if len(folders) == 2:
            judged = validate(RedundancyMap.load(folders[0]), RedundancyMap.load(folders[1]))
            labels = {name: value for name, value in damage.cell.items() if name != "layers"}
            parts.append(judged.assign(**labels))
    if not parts:
        return typed([], VALIDATION_COLUMNS)
    return pd.concat([typed(part, VALIDATION_COLUMNS) for part in parts], ignore_index=True)


def profile_table() -> pd.DataFrame:
    """An empty table of the design's `profile.parquet`: sweeps have no profile stage yet."""
    return typed([], PROFILE_COLUMNS)


def deviations(plan: Plan, known: Artefacts, store: Store) -> list[tuple[str, str]]:
    """Stages that had to do with less memory than their parameters ask for, and how."""
    found = []
    for node in plan.nodes.values():
        key = plan.key(node.id)
        if key is None or node.kind not in RELIEVED or not known.has(node.kind, key):
            continue
        with contextlib.suppress(OSError, ValueError):
            relief = store.stage(node.kind, key).get("provenance", {}).get("relief", "")
            if relief:
                found.append((node.id, relief))
    return found


def _lost(node: Node, key: str, records: dict[str, StageRecord]) -> bool:
    """Whether an artefact that isn't there was, by the journal."""
    record = records.get(node.id)
    return record is not None and (record.state, record.key) == ("done", key)


def _why_not(node: Node, records: dict[str, StageRecord]) -> tuple[str, str]:
    record = records.get(node.id)
    if record is None or record.state in ("pending", "running", "stopped", "done"):
        return "pending", "not run yet"
    if record.state == "failed":
        return "failed", f"({record.failure}) {record.message}"
    return "blocked", record.message
