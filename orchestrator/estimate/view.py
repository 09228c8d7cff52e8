"""A plan's outlook for people and for programs."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.connection import Capacity
from orchestrator.estimate.feasible import gib
from orchestrator.estimate.memory import Memory
from orchestrator.estimate.outlook import Outlook
from orchestrator.planfile import Difference
from orchestrator.reuse import Verdict
from orchestrator.sweep import Sweep

VERDICTS: tuple[Verdict, ...] = ("run", "reuse", "undetermined", "unneeded")
FOLLOWING = "follow what they read"
LINES = 12
"""Reasons for changes shown; `--json` has all."""


def show_outlook(sweep: Sweep, outlook: Outlook, store: str, out: Console, every: bool) -> None:
    """Print what a plan would do and take.

    Args:
        sweep: the sweep.
        outlook: what was found out about its plan.
        store: the store's folder.
        out: where to print.
        every: list every stage too.
    """
    _headline(sweep, out)
    _stages(outlook, out)
    if outlook.to_run:
        _needs(sweep, outlook, out)
        _time(outlook, out)
    else:
        out.print(f"Nothing to run: all of it is in {store}", markup=False)
    _sharing(outlook, out)
    if outlook.difference is not None:
        _difference(sweep.name, outlook, outlook.difference, out)
    if outlook.to_run:
        out.print(f"Store: {store}", markup=False)
    for obstacle in outlook.obstacles:
        out.print(f"Cannot be placed: {_named(outlook, obstacle.stages)}", markup=False)
        out.print(f"  {obstacle.problem}", markup=False)
        out.print(f"  {obstacle.where}: {obstacle.remedy}", markup=False)
    if every:
        for node in outlook.plan.nodes.values():
            verdict, need = outlook.assessment.verdicts[node.id], outlook.memory[node.id]
            seconds = duration(outlook.times.seconds[node.id])
            out.print(
                f"{verdict:13}{seconds:>8} {_memory(need):>9}  {node.id}  "
                f"({outlook.assessment.reasons[node.id]})",
                markup=False,
            )


def outlook_data(sweep: Sweep, outlook: Outlook) -> dict[str, Any]:
    """The same as plain data: seconds and bytes."""
    plan, found = outlook.plan, outlook.difference
    return {
        "sweep": sweep.name,
        "stages": [
            {
                "id": node.id,
                "kind": node.kind,
                "key": plan.key(node.id),
                "block": node.params.get("block"),
                "verdict": outlook.assessment.verdicts[node.id],
                "reason": outlook.assessment.reasons[node.id],
                "needs": sorted(node.dependencies()),
                "seconds": round(outlook.times.seconds[node.id], 3),
                "memory": _parts(outlook.memory[node.id]),
                "gpus": None if outlook.gpus is None else outlook.gpus[node.id],
            }
            for node in plan.nodes.values()
        ],
        "time": {
            "job_seconds": round(outlook.seconds, 1),
            "wall_seconds": _rounded(outlook.wall_seconds),
            "gpu_seconds": _rounded(outlook.gpu_seconds),
            "jobs_at_once": outlook.slots,
            "finished_stages": outlook.times.finished,
            "measured": outlook.times.measured,
            "device": outlook.times.device,
        },
        "sharing": {
            "cells": outlook.sharing.cells,
            "alone_seconds": round(outlook.sharing.alone, 1),
            "shared_seconds": round(outlook.sharing.shared, 1),
        },
        "cluster": None if outlook.capacity is None else _cluster(outlook.capacity),
        "infeasible": [asdict(obstacle) for obstacle in outlook.obstacles],
        "difference": None
        if found is None
        else {"added": found.added, "removed": found.removed, "changed": found.changed},
    }


def duration(seconds: float) -> str:
    """Seconds for people: `45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 or not seconds else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _headline(sweep: Sweep, out: Console) -> None:
    decoders = sum(model.decoder is not None for model in sweep.models)
    models = [f"{decoders} decoder(s) x {len(sweep.encoders)} encoder(s)"] if decoders else []
    if decoders < len(sweep.models):
        models.append(f"{len(sweep.models) - decoders} released SpeechLLM(s)")
    out.print(
        f"Sweep {sweep.name}: {' and '.join(models)} x "
        f"{len(sweep.conditions())} conditions x depths {', '.join(map(str, sweep.depths))}"
    )
    trusted = [m.name for m in sweep.models if m.trust_remote_code]
    trusted += [e.name for e in sweep.encoders if e.trust_remote_code]
    for name in trusted:
        out.print(f"[bold]Runs code from the hub repository of {name}.[/bold]")


def _stages(outlook: Outlook, out: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    for name in (*VERDICTS, "time", "memory"):
        table.add_column(name, justify="right")
    counts: dict[str, Counter[str]] = {}
    seconds: dict[str, float] = defaultdict(float)
    for node in outlook.plan.nodes.values():
        counts.setdefault(node.kind, Counter())[outlook.assessment.verdicts[node.id]] += 1
    for node_id in outlook.to_run:
        seconds[outlook.plan.nodes[node_id].kind] += outlook.times.seconds[node_id]
    for kind, of in counts.items():
        table.add_row(kind, *_counts(of), *_figures(outlook, kind, seconds[kind]))
    total = sum(counts.values(), Counter[str]())
    table.add_row("all", *_counts(total), *_figures(outlook, None, outlook.seconds))
    out.print(table)
    if total["undetermined"]:
        out.print("undetermined: their block is chosen from maps that are still to be made")
    if total["unneeded"]:
        out.print("unneeded: not in the store, but all that would need them is")


def _counts(of: Counter[str]) -> Iterable[str]:
    return (str(of[verdict]) if of[verdict] else "-" for verdict in VERDICTS)


def _figures(outlook: Outlook, kind: str | None, seconds: float) -> tuple[str, str]:
    """Time of what is to run, one job at a time, and memory of its largest job."""
    ids = [i for i in outlook.to_run if kind is None or outlook.plan.nodes[i].kind == kind]
    if not ids:
        return "-", "-"
    largest = outlook.largest(kind)
    return duration(seconds), _memory(largest[1] if largest else None)


def _memory(need: Memory | None) -> str:
    if need is None:
        return "unknown"
    return gib(need.total) if need.total else "-"


def _needs(sweep: Sweep, outlook: Outlook, out: Console) -> None:
    cluster = outlook.capacity
    if cluster is not None:
        out.print(
            f"Cluster: {cluster.nodes} node(s), {cluster.cpus:g} CPUs, {cluster.gpus:g} GPUs; the "
            f"largest node has {cluster.node_cpus:g} CPUs, {cluster.node_gpus:g} GPUs"
        )
    amounts = {outlook.gpus[i] for i in outlook.to_run} if outlook.gpus else set()
    if not amounts:
        gpus = "one GPU if the cluster has any"
    elif len(amounts) == 1:
        gpus = f"{max(amounts):g} GPU(s)"
    else:
        gpus = f"{min(amounts):.3g} to {max(amounts):g} GPUs, as it needs"
    out.print(f"A job takes {sweep.resources.cpus:g} CPU(s) and {gpus}")
    largest = outlook.largest()
    if largest is not None and largest[1].total:
        node_id, need = largest
        parts = [
            f"{field.name} {gib(getattr(need, field.name))}"
            for field in fields(need)
            if getattr(need, field.name)
        ]
        out.print(f"Largest job: {node_id}, {gib(need.total)}: {', '.join(parts)}", markup=False)
    unknown = [i for i in outlook.to_run if outlook.memory[i] is None]
    if unknown:
        out.print(
            f"Memory unknown: {_named(outlook, unknown)}: the shape of a model or the length of its "
            "data cannot be read",
            markup=False,
        )


def _time(outlook: Outlook, out: Console) -> None:
    line = f"Time: {duration(outlook.seconds)} one job at a time"
    if outlook.slots is not None and outlook.wall_seconds is not None:
        where = "of the cluster" if outlook.capacity else "of this machine"
        line += f", about {duration(outlook.wall_seconds)} on {outlook.slots} slot(s) {where}"
    out.print(f"{line} ({outlook.times.basis})", markup=False)
    if outlook.gpu_seconds:
        out.print(f"GPU-hours: {outlook.gpu_seconds / 3600:.1f}")


def _sharing(outlook: Outlook, out: Console) -> None:
    of = outlook.sharing
    if not of.alone:
        return
    out.print(
        f"Sharing: {of.cells} results, each by a process of its own, would take "
        f"{duration(of.alone)}; with shared stages {duration(of.shared)}, "
        f"{of.saved / of.alone:.0%} less"
    )
    a_job = max(outlook.gpus.values(), default=0.0) if outlook.gpus else 0.0
    if a_job:
        out.print(f"GPU-hours saved by sharing: {of.saved * a_job / 3600:.1f}")


def _difference(name: str, outlook: Outlook, found: Difference, out: Console) -> None:
    if not found:
        out.print(f"Last plan (runs/{name}): the same stages")
        return
    out.print(
        f"Last plan (runs/{name}): {len(found.added)} added, {len(found.removed)} removed, "
        f"{len(found.changed)} changed"
    )
    # What only follows another change is told as one line a kind.
    groups: Counter[tuple[str, str]] = Counter()
    for node_id, reasons in found.changed.items():
        kind = outlook.plan.nodes[node_id].kind
        for reason in reasons:
            groups[kind, FOLLOWING if reason.startswith("follows ") else reason] += 1
    own_first = sorted(groups.items(), key=lambda group: group[0][1] == FOLLOWING)
    lines = [f"  {kind} ({count}): {reason}" for (kind, reason), count in own_first]
    for line in lines[:LINES]:
        out.print(line, markup=False)
    if len(lines) > LINES:
        out.print(f"  and {len(lines) - LINES} more reasons (--json has all)")


def _named(outlook: Outlook, ids: Iterable[str]) -> str:
    """Some stages for people: the first one, and how many more of which kinds."""
    listed = list(ids)
    kinds = Counter(outlook.plan.nodes[node_id].kind for node_id in listed)
    if len(listed) == 1:
        return listed[0]
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) + f" (as {listed[0]})"


def _parts(need: Memory | None) -> dict[str, int] | None:
    return None if need is None else {**asdict(need), "total": need.total}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _cluster(capacity: Capacity) -> dict[str, float]:
    return {
        "cpus": capacity.cpus,
        "gpus": capacity.gpus,
        "nodes": capacity.nodes,
        "node_cpus": capacity.node_cpus,
        "node_gpus": capacity.node_gpus,
    }
