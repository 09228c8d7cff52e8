"""A sweep as a person thinks of it, and how far it is.

A row per model, encoder, task, selector and healing, a column per depth; other stages by kind. Built
once from the stages' labels, then kept in step one stage at a time: of 10,000 stages only those that
changed are touched.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.graph import Plan
from workers.config import Condition

LABELS = ("model", "encoder", "task", "selector", "healing")
HEALED = ("heal", "backbone")
"""Kinds whose artefact an evaluation scores."""
SETTLED = ("done", "failed", "blocked")
"""States in which nothing more happens to a stage in this run."""


@dataclass(frozen=True)
class Stage:
    """What the board needs to know of a stage, from the plan or from a run folder."""

    id: str
    kind: str
    needs: Sequence[str] = ()
    cell: Mapping[str, Any] = field(default_factory=dict)
    """Labels of the tables; only an evaluation's are read."""


class Tally:
    """Counts of a set of stages by state."""

    def __init__(self) -> None:
        self.total = 0
        self.counts: Counter[str] = Counter()

    def move(self, old: str, new: str) -> None:
        """A stage changed state."""
        self.counts[old] -= 1
        self.counts[new] += 1

    @property
    def done(self) -> int:
        """Stages that are done."""
        return self.counts["done"]

    @property
    def state(self) -> str:
        """One word for all: what one would want to know first.

        `failed`, `running`, `blocked`, `done`, `stopped` or `waiting`.
        """
        for state in ("failed", "running", "blocked"):
            if self.counts[state]:
                return state
        if self.done == self.total:
            return "done"
        return "stopped" if self.counts["stopped"] else "waiting"

    def data(self) -> dict[str, Any]:
        """Plain data."""
        counts = {state: n for state, n in self.counts.items() if n}
        return {"state": self.state, "done": self.done, "total": self.total, "states": counts}

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> "Tally":
        """The tally that `data` was made of."""
        tally = cls()
        tally.total, tally.counts = data["total"], Counter(data["states"])
        return tally


@dataclass
class Row:
    """One line of the table."""

    labels: tuple[str, ...]
    """As `LABELS` names them."""
    cells: dict[int, Tally] = field(default_factory=dict)
    """By depth: the heals and evaluations there, over seeds and test sets."""
    all: Tally = field(default_factory=Tally)


class Board:
    """Every stage's state, and the counts of it: of all, by kind, by row, by cell.

    Args:
        stages: all of them.
        start: the state they are in before anything is known.
    """

    def __init__(self, stages: Iterable[Stage], start: str = "waiting") -> None:
        self.state: dict[str, str] = {}
        self.kind: dict[str, str] = {}
        self.all = Tally()
        self.kinds: dict[str, Tally] = {}
        self.estimates: Mapping[str, float] = {}
        self.left: defaultdict[str, float] = defaultdict(float)
        """Estimated seconds of the stages that are not settled, by kind."""
        self._tallies: dict[str, list[Tally]] = {}
        listed = list(stages)
        for stage in listed:
            self.state[stage.id], self.kind[stage.id] = start, stage.kind
            self._tallies[stage.id] = [self.all]
        self.rows = self._lay_out(listed)
        for stage in listed:
            tallies = self._tallies[stage.id]
            if len(tallies) == 1:
                tallies.append(self.kinds.setdefault(stage.kind, Tally()))
            for tally in tallies:
                tally.total += 1
                tally.counts[start] += 1
        self.depths = sorted({depth for row in self.rows for depth in row.cells})

    @classmethod
    def of(cls, plan: Plan) -> "Board":
        """The board of a plan."""
        return cls(
            Stage(n.id, n.kind, tuple(n.inputs.values()), n.cell) for n in plan.nodes.values()
        )

    def data(self) -> dict[str, Any]:
        """The counts as plain data: `all`, `shared` by kind, and `rows` with their `depths`."""
        return {
            "all": self.all.data(),
            "shared": {kind: tally.data() for kind, tally in self.kinds.items()},
            "rows": [
                {
                    **dict(zip(LABELS, row.labels, strict=True)),
                    "all": row.all.data(),
                    "depths": {str(d): cell.data() for d, cell in sorted(row.cells.items())},
                }
                for row in self.rows
            ],
        }

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> "Board":
        """A board to look at, of what `data` gave: it knows counts, and no single stage."""
        board = cls(())
        board.all = Tally.of_data(data["all"])
        board.kinds = {kind: Tally.of_data(tally) for kind, tally in data["shared"].items()}
        board.rows = [
            Row(
                tuple(row[name] for name in LABELS),
                {int(depth): Tally.of_data(cell) for depth, cell in row["depths"].items()},
                Tally.of_data(row["all"]),
            )
            for row in data["rows"]
        ]
        board.depths = sorted({depth for row in board.rows for depth in row.cells})
        return board

    def set(self, node_id: str, state: str) -> None:
        """A stage is in `state` now; one that isn't of the plan is passed over."""
        old = self.state.get(node_id)
        if old is None or old == state:
            return
        self.state[node_id] = state
        for tally in self._tallies[node_id]:
            tally.move(old, state)
        if self.estimates and (old in SETTLED) != (state in SETTLED):
            seconds = self.estimates.get(node_id, 0.0)
            self.left[self.kind[node_id]] += -seconds if state in SETTLED else seconds

    def sync(self, states: Mapping[str, str]) -> None:
        """Take over all states: some stages end without an event, such as those reused."""
        known = self.state
        for node_id, state in states.items():
            if known.get(node_id) != state:
                self.set(node_id, state)

    def estimate(self, estimates: Mapping[str, float]) -> None:
        """Take over what each stage is estimated to last, in seconds."""
        self.estimates = estimates
        self.left.clear()
        for node_id, state in self.state.items():
            if state not in SETTLED:
                self.left[self.kind[node_id]] += estimates.get(node_id, 0.0)

    def _lay_out(self, stages: Sequence[Stage]) -> list[Row]:
        """Rows in the plan's order; the unpruned control is part of every selector's row."""
        tests = [stage for stage in stages if stage.kind == "evaluate" and "depth" in stage.cell]
        healed = {stage.id for stage in stages if stage.kind in HEALED}
        makers = {t.id: [need for need in t.needs if need in healed] for t in tests}
        tasks: dict[str, dict[str, None]] = {}
        for test in tests:
            for maker in makers[test.id]:
                tasks.setdefault(maker, {})[_task(test.cell)] = None
        cells: dict[tuple[str, ...], dict[int, dict[str, None]]] = {}
        for test in tests:
            shared = {task for maker in makers[test.id] for task in tasks[maker]}
            key: tuple[str, ...] = (
                str(test.cell["model"]),
                str(test.cell["encoder"] or ""),
                "all" if len(shared) > 1 else _task(test.cell),
                str(test.cell["selector"] or ""),
                str(test.cell["heal"]),
            )
            ids = cells.setdefault(key, {}).setdefault(int(test.cell["depth"]), {})
            ids.update(dict.fromkeys((*makers[test.id], test.id)))
        selected = {_control(key) for key in cells if _control(key) != key}
        rows = []
        for key, by_depth in cells.items():
            if key in selected:
                continue
            row = Row(key)
            control = cells.get(_control(key), {})
            for depth, ids in {**control, **by_depth}.items():
                cell = row.cells[depth] = Tally()
                for node_id in ids:
                    self._tallies[node_id] += [cell, row.all]
            rows.append(row)
        return rows


def _task(cell: Mapping[str, Any]) -> str:
    names = ("task", "source_language", "target_language")
    return Condition.model_validate({name: cell[name] for name in names}).label


def _control(key: tuple[str, ...]) -> tuple[str, ...]:
    """The row of the unpruned control: no selector chose anything there."""
    selector = LABELS.index("selector")
    return (*key[:selector], "", *key[selector + 1 :])
