"""Reading the results table: primary scores, means over conditions, losses against the control.

A *unit* is what one score belongs to: (encoder, task, languages, test set). Means are taken over
the same units on both sides of a comparison, and say how many of the expected there were.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import pandas as pd

HIGHER_IS_BETTER = {"bleu", "chrf"}
_PRIMARY = {"asr": ("wer", "cer"), "ast": ("bleu", "chrf")}
_NO_WORD_SPACES = {"ja", "th", "zh"}  # WER means little where words are not set apart
METRIC_NAMES = {"wer": "WER", "cer": "CER", "bleu": "BLEU", "chrf": "chrF"}


class Cell(NamedTuple):
    """One row of `primary_cells`, for code that visits each many times."""

    unit: str
    test: str
    metric: str
    in_domain: bool
    depth: int
    heal: str
    seed: int
    value: float
    ci_low: float
    ci_high: float
    scored: bool
    status: str
    reason: str


@dataclass(frozen=True)
class Score:
    """A mean score in percent with its 95 % interval (NaN where unknown) over `units` units."""

    value: float
    low: float
    high: float
    units: int

    def __str__(self) -> str:
        interval = f" [{self.low:.1f}, {self.high:.1f}]" if math.isfinite(self.low) else ""
        return f"{self.value:.1f}{interval}"


@dataclass(frozen=True)
class Change:
    """What one depth costs in one metric, against the equally healed unpruned control.

    `loss` is in points and positive when the pruned model is worse (more WER, less BLEU). Its
    interval treats the two scores as independent, so it is wider than a paired one would be.
    """

    metric: str
    in_domain: bool
    control: Score
    pruned: Score
    loss: float
    loss_low: float
    loss_high: float
    expected: int
    worst: str
    worst_loss: float


def metric_name(metric: str) -> str:
    """`wer` as papers print it."""
    return METRIC_NAMES.get(metric.lower(), metric)


def task_label(task: object, source: object, target: object) -> str:
    """`asr-de`, `ast-de-en`."""
    return "-".join(str(part) for part in (task, source, target) if not _null(part))


def primary_cells(results: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: its primary metric (WER for ASR, BLEU for AST; CER without word spaces).

    A cell without a score keeps its row. Adds `condition` (`asr-de`), `test` (condition and test
    set), `unit` (encoder, condition and test set) and `scored` (bool: done, with a value). Columns
    of text become plain objects, which pandas slices several times faster.
    """
    cells = results.copy()
    cells["metric"] = cells["metric"].str.lower()
    wanted = [
        _primary(task, source)
        for task, source in zip(cells["task"], cells["source_language"], strict=True)
    ]
    has_primary = cells["metric"].isna() | (cells["metric"] == pd.Series(wanted, index=cells.index))
    cells = cells[has_primary.fillna(True).astype(bool)].copy()
    cells["metric"] = cells["metric"].fillna(
        pd.Series([w for w, keep in zip(wanted, has_primary, strict=True) if keep], cells.index)
    )
    cells["condition"] = [
        task_label(*key)
        for key in cells[["task", "source_language", "target_language"]].itertuples(
            index=False, name=None
        )
    ]
    for column, names in (
        ("unit", ["encoder", "condition", "test_set"]),
        ("test", ["condition", "test_set"]),
    ):
        cells[column] = [
            " · ".join(str(part) for part in key if not _null(part))
            for key in cells[names].itertuples(index=False, name=None)
        ]
    text = cells.columns[[isinstance(kind, pd.StringDtype) for kind in cells.dtypes]]
    cells = cells.astype(dict.fromkeys(text, object))
    cells["scored"] = (cells["status"] == "done") & cells["value"].notna()
    return cells.reset_index(drop=True)


def of_selector(cells: pd.DataFrame, selector: str) -> pd.DataFrame:
    """The rows of one selector with the unpruned control, which belongs to all of them."""
    control = cells["depth"] == 0
    own = cells["selector"] == selector
    no_selector = cells["selector"].isna()
    if (control & own).any():
        return cells[own]
    shared = cells[control & no_selector]
    if shared.empty and control.any():  # the control may stand under one other selector only
        first = cells.loc[control, "selector"].iloc[0]
        shared = cells[control & (cells["selector"] == first)]
    return pd.concat([shared, cells[own & ~control]])


def selectors(cells: pd.DataFrame) -> list[str]:
    """Selectors that chose a block, `consensus` first."""
    names = cells.loc[cells["depth"] > 0, "selector"].dropna().unique()
    return sorted((str(name) for name in names), key=lambda name: (name != "consensus", name))


def records(cells: pd.DataFrame) -> list[Cell]:
    """Primary cells as plain records; those that do not say where they belong are left out."""
    rows = cells.dropna(subset=["depth", "heal", "in_domain"])
    return [Cell(*row) for row in rows[list(Cell._fields)].itertuples(index=False, name=None)]


def mean_score(cells: Iterable[Cell]) -> Score:
    """Mean of scored cells over units, with an interval for the test sets' sampling alone.

    Seeds of a unit and encoders on the same test set share their utterances: their half-widths are
    averaged. Different test sets are independent: their half-widths add in quadrature.
    """
    units: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        units[cell.test, cell.unit].append(cell)
    if not units:
        return Score(math.nan, math.nan, math.nan, 0)
    tests: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (test, _), seeds in units.items():
        below = fmean(seed.value - seed.ci_low for seed in seeds)
        tests[test].append((below, fmean(seed.ci_high - seed.value for seed in seeds)))
    mean = fmean(fmean(seed.value for seed in seeds) for seeds in units.values())
    below, above = (
        math.hypot(*(fmean(width[side] for width in of_test) for of_test in tests.values()))
        / len(tests)
        for side in (0, 1)
    )
    return Score(mean, mean - below, mean + above, len(units))


def changes(cells: Iterable[Cell], depth: int, heal: str) -> list[Change]:
    """Loss at one depth and healing mode per (metric, in or out of domain).

    Args:
        cells: primary cells of one model and selector, control included (`of_selector`).
        depth: layers removed.
        heal: healing mode of both sides.
    """
    groups: dict[tuple[str, bool], list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.heal == heal:
            groups[cell.metric, bool(cell.in_domain)].append(cell)
    result = []
    for (metric, in_domain), rows in groups.items():
        control, pruned = (
            by_unit(c for c in rows if c.scored and c.depth == d) for d in (0, depth)
        )
        both = [unit for unit in control if unit in pruned]
        if not both:
            continue
        sign = -1.0 if metric in HIGHER_IS_BETTER else 1.0
        before, after = (mean_score(c for u in both for c in side[u]) for side in (control, pruned))
        loss = sign * (after.value - before.value)
        losses = {u: sign * (_mean(pruned[u]) - _mean(control[u])) for u in both}
        worst = max(losses, key=lambda unit: losses[unit])
        result.append(
            Change(
                metric=metric,
                in_domain=in_domain,
                control=before,
                pruned=after,
                loss=loss,
                loss_low=loss - _half_width(before, after, more=False, sign=sign),
                loss_high=loss + _half_width(before, after, more=True, sign=sign),
                expected=len({cell.unit for cell in rows}),
                worst=worst,
                worst_loss=losses[worst],
            )
        )
    return sorted(result, key=lambda c: (not c.in_domain, c.metric in HIGHER_IS_BETTER, c.metric))


def by_unit(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Cells by the unit they score."""
    units: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        units[cell.unit].append(cell)
    return dict(units)


def _mean(cells: Iterable[Cell]) -> float:
    return fmean(cell.value for cell in cells)


def _half_width(before: Score, after: Score, *, more: bool, sign: float) -> float:
    """Half-width of the loss's interval on the side of `more` loss, or of less."""
    rises = more == (sign > 0)
    one = after.high - after.value if rises else after.value - after.low
    two = before.value - before.low if rises else before.high - before.value
    return math.hypot(one, two)


def _primary(task: object, source: object) -> str:
    word, character = _PRIMARY.get(str(task), ("wer", "cer"))
    return character if task == "asr" and source in _NO_WORD_SPACES else word


def _null(part: object) -> bool:
    return part is None or part is pd.NA or (isinstance(part, float) and math.isnan(part))
