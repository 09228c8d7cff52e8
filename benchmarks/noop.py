"""Stages that do nothing, for `benchmarks/driver.py`: what is left is the driver and the store."""

from typing import Any

from orchestrator.store import Store, open_store

LAYERS = 12


def commit(
    payload: dict[str, Any], rank: int, ranks: int, meeting: tuple[str, int, int] | None
) -> dict[str, Any]:
    """Commit a tiny artefact, as a real attempt does: fence, folder, one file, digests, marker."""
    del rank, ranks, meeting
    store, fence = open_store(payload["store"], new=False), payload["fence"]
    note = store.read_note(fence["name"]) or {}
    if note.get("number") != fence["number"]:
        return {"status": "failed", "class": "fenced", "message": "another driver has the run"}
    artefact(store, payload)
    return {"status": "done", "seconds": 0.0, "summary": {}}


def nothing(
    payload: dict[str, Any], rank: int, ranks: int, meeting: tuple[str, int, int] | None
) -> dict[str, Any]:
    """Answer at once; only maps are committed, as blocks are chosen from them."""
    if payload["kind"] == "map":
        return commit(payload, rank, ranks, meeting)
    return {"status": "done", "seconds": 0.0, "summary": {}}


def artefact(store: Store, payload: dict[str, Any]) -> None:
    """The smallest artefact of a stage."""
    kind, key = payload["kind"], payload["key"]
    temporary = store.begin(kind, key)
    if kind == "map":
        _map().to_parquet(temporary / "map.parquet", index=False)
    else:
        (temporary / "answer.json").write_text('{"answer": 42}\n')
    stage = {name: payload[name] for name in ("kind", "key", "params", "inputs")}
    store.commit(temporary, kind, key, {**stage, "summary": {}})


def _map() -> Any:
    """A map whose least distances lie around layer 3, so that `last` is another block."""
    import pandas as pd

    return pd.DataFrame(
        [
            ("angular", "all", start, depth, 0.01 * depth + 0.001 * abs(start - 3), 0.0, 16)
            for depth in range(1, LAYERS + 1)
            for start in range(LAYERS - depth + 1)
        ],
        columns=["criterion", "pool", "start", "depth", "distance", "std_error", "samples"],
    )
