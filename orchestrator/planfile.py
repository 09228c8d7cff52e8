"""A plan as its run folder keeps it (`plan.json`), and what a new plan does differently, and why.

Parameters and choices that nodes share are written once, and nodes name each other by number: a
plan of 100,000 nodes stays some tens of megabytes.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.graph import Choice, Plan
from workers.stages import STAGES

SHOWN = 60
"""Characters of a value in a reason."""


def plan_data(plan: Plan) -> dict[str, Any]:
    """The plan as plain data.

    Returns:
        `sweep`; `params`, `cells` (labels of the tables) and `choices`, each distinct one once; and `nodes` in plan order: `id`,
        `kind`, `version` of the code, `key` (null while undetermined), `params` (a number in that
        list), `cell` likewise where it has one, `inputs` by role (numbers of nodes), `sources` by role (fingerprints), and `choice`
        (a number) where a block is still to be chosen.
    """
    numbers = {node_id: number for number, node_id in enumerate(plan.nodes)}
    params, cells = _Shared(), _Shared()
    choices: dict[Choice, int] = {}
    nodes = []
    for node in plan.nodes.values():
        data: dict[str, Any] = {
            "id": node.id,
            "kind": node.kind,
            "version": STAGES[node.kind].version,
            "key": plan.key(node.id),
            "params": params.number(node.params),
            "inputs": {role: numbers[other] for role, other in node.inputs.items()},
        }
        if node.cell:
            data["cell"] = cells.number(node.cell)
        if node.sources:
            data["sources"] = {role: s.fingerprint for role, s in node.sources.items()}
        if node.choice is not None:
            data["choice"] = choices.setdefault(node.choice, len(choices))
        nodes.append(data)
    chosen = [{**vars(c), "maps": [numbers[other] for other in c.maps]} for c in choices]
    return {
        "sweep": plan.sweep,
        "params": params.found,
        "cells": cells.found,
        "choices": chosen,
        "nodes": nodes,
    }


def write_plan(plan: Plan) -> str:
    """The text of `plan.json`."""
    return json.dumps(plan_data(plan), separators=(",", ":"))


def read_plan(path: Path) -> dict[str, Any] | None:
    """What `write_plan` wrote; None if there is none that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return data if isinstance(data["nodes"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def planned_stages(
    data: Mapping[str, Any],
) -> Iterator[tuple[str, str, list[str], dict[str, Any]]]:
    """Id, kind, dependencies and labels of every node."""
    names = [node["id"] for node in data["nodes"]]
    for node in data["nodes"]:
        if "dependencies" in node:  # before inputs were written down
            yield node["id"], node["kind"], node["dependencies"], node.get("cell", {})
            continue
        numbers = set(node["inputs"].values())
        if "choice" in node:
            numbers |= set(data["choices"][node["choice"]]["maps"])
        cell = data["cells"][node["cell"]] if "cell" in node else {}
        yield node["id"], node["kind"], sorted(names[number] for number in numbers), cell


@dataclass(frozen=True)
class Difference:
    """A plan against the last one of the same run."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By id: same id, another key; the reasons."""

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)


def difference(last: Mapping[str, Any], plan: Plan) -> Difference | None:
    """What changed since the last plan.

    A block that has been chosen since is no change. A stage whose own parameters stand, but which
    reads something that changed, names what it follows.

    Args:
        last: what `read_plan` gave.
        plan: the plan now.

    Returns:
        None where the last plan was written by a version that kept too little.
    """
    if "params" not in last:
        return None
    now = plan_data(plan)
    before = {node["id"]: node for node in last["nodes"]}
    ids = {node["id"] for node in now["nodes"]}
    compare = _Comparison(last, now)
    changed: dict[str, tuple[str, ...]] = {}
    for node in now["nodes"]:
        old = before.get(node["id"])
        if old is None or (old["key"] is not None and old["key"] == node["key"]):
            continue
        reasons = compare.reasons(old, node)
        if not reasons:
            names = (now["nodes"][number]["id"] for number in node["inputs"].values())
            followed = next((name for name in names if name in changed), None)
            if followed is not None:
                reasons = [f"follows {followed}"]
            elif old["key"] is not None and node["key"] is not None and not compare.open(old, node):
                reasons = ["its key is made another way"]
        if reasons:
            changed[node["id"]] = tuple(reasons)
    return Difference(
        tuple(node["id"] for node in now["nodes"] if node["id"] not in before),
        tuple(name for name in before if name not in ids),
        changed,
    )


class _Shared:
    """Plain data, each distinct value once."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self._numbers: dict[str, int] = {}

    def number(self, value: Any) -> int:
        text = json.dumps(value)
        if text not in self._numbers:
            self._numbers[text] = len(self.found)
            self.found.append(json.loads(text))  # blocks are filled in later, in the plan's own
        return self._numbers[text]


class _Comparison:
    """Reasons why a node of one plan has another key than in the other."""

    def __init__(self, last: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        self.last, self.now = last, now
        self._params: dict[tuple[int, int, bool], list[str]] = {}
        self._choices: dict[tuple[int, int], list[str]] = {}

    def open(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        """Whether a block is still to be chosen in one of the two."""
        return "choice" in old or "choice" in new

    def reasons(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
        found = []
        if old["version"] != new["version"]:
            found.append(f"code version {old['version']} → {new['version']}")
        found += self._of_params(old["params"], new["params"], self.open(old, new))
        if "choice" in old and "choice" in new:
            found += self._of_choices(old["choice"], new["choice"])
        here, there = new.get("sources", {}), old.get("sources", {})
        found += [
            f"{role}: {_shown(there[role])} → {_shown(here[role])}"
            for role in here
            if role in there and here[role] != there[role]
        ]
        inputs = (self._inputs(self.last, old), self._inputs(self.now, new))
        found += [
            f"{role}: {before} → {after}"
            for role, before, after in _items(*inputs)
            if before != after
        ]
        return found

    def _inputs(self, plan: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, str]:
        """What stands behind each role; a source by itself, as its content is compared."""
        named = {role: plan["nodes"][number]["id"] for role, number in node["inputs"].items()}
        return named | dict.fromkeys(node.get("sources", {}), "a source")

    def _of_params(self, old: int, new: int, open_block: bool) -> list[str]:
        key = (old, new, open_block)
        if key not in self._params:
            before, after = dict(self.last["params"][old]), dict(self.now["params"][new])
            if open_block:
                before.pop("block", None)
                after.pop("block", None)
            self._params[key] = list(_differences(before, after))
        return self._params[key]

    def _of_choices(self, old: int, new: int) -> list[str]:
        if (old, new) not in self._choices:
            before, after = dict(self.last["choices"][old]), dict(self.now["choices"][new])
            maps = [
                {plan["nodes"][number]["id"] for number in choice.pop("maps")}
                for plan, choice in ((self.last, before), (self.now, after))
            ]
            found = [f"choice.{reason}" for reason in _differences(before, after)]
            if maps[0] != maps[1]:
                found.append(
                    f"chosen from {len(maps[1])} maps, {len(maps[1] - maps[0])} of them new"
                )
            self._choices[old, new] = found
        return self._choices[old, new]


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Dotted paths at which two pieces of plain data differ, with both values."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name, before, after in _items(old, new):
            yield from _differences(before, after, f"{path}.{name}" if path else name)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{path}[{number}]")
    else:
        yield f"{path} {_shown(old)} → {_shown(new)}"


def _items(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys([*old, *new]):
        yield name, old.get(name, _ABSENT), new.get(name, _ABSENT)


class _Absent:
    def __str__(self) -> str:
        return "(nothing)"


_ABSENT = _Absent()


def _shown(value: Any) -> str:
    text = (
        str(value) if isinstance(value, (_Absent, str)) else json.dumps(value, ensure_ascii=False)
    )
    text = json.dumps(text, ensure_ascii=False)[1:-1]  # line breaks of a prompt, as one writes them
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
