"""The short form of the report, for a repository or a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from orchestrator.report.scores import metric_name
from orchestrator.report.summary import LAB_LIMITS, Failure, RunSummary
from orchestrator.report.verdict import percent


def markdown(
    summary: RunSummary,
    sections: Sequence[Mapping[str, Any]],
    statuses: Sequence[tuple[str, int]],
    missing: Sequence[Mapping[str, Any]],
) -> str:
    """Verdict, recommended blocks, agreement, validation and coverage as Markdown."""
    lines = [f"# Layer-consensus report: {_cell(summary.name)}", "", f"Made {summary.created}.", ""]
    if summary.lab:
        lines += ["> **Figures from the built-in lab.** Known limits:", ">"]
        lines += [f"> - {limit}" for limit in LAB_LIMITS] + [""]
    for section in sections:
        lines += [f"## {_cell(section['model'])}", "", f"**{_cell(section['verdict'])}**", ""]
        lines += [_cell(section["note"]), ""]
        rows = [
            [
                str(r.depth), percent(r.fraction), r.block, r.heal,
                "; ".join(
                    f"{metric_name(c.metric)}{'' if c.in_domain else ' (out of domain)'} "
                    f"{c.control.value:.1f} → {c.pruned}" for c in r.changes
                ),
                "yes" if r.within else "no", _figure(r.regret_max, 3),
            ]
            for r in section["advice"]
        ]  # fmt: skip
        lines += _table(
            ["depth", "removed", "block", "healing", "control → pruned [95 %]",
             f"within {summary.tolerance:g}", "largest regret"], rows,
        )  # fmt: skip
        rows = [
            [
                str(c["depth"]), c["name"], c["block"] or "–", _figure(c["with"].jaccard),
                _figure(c["chance"]), _figure(c["with"].p_value, 4), _figure(c["with"].spearman),
                _figure(c["without"].spearman if c["without"] is not None else None),
                _figure(c["with"].regret_max, 3), str(c["with"].conditions),
                percent(c['with'].coverage),
            ]
            for c in section["consensus"]
        ]  # fmt: skip
        lines += _table(
            ["depth", "scope", "shared block", "Jaccard", "by chance", "p", "Spearman",
             "Spearman without layer 0", "largest regret", "conditions", "coverage"], rows,
        )  # fmt: skip
        if section["mapped"]:
            lines += ["Validation against damage: " + _cell(section["judgement"]), ""]
        rows = [
            [
                j.name, j.pool, _figure(j.spearman_without_layer_0), _figure(j.spearman),
                _figure(j.regret, 4), _figure(j.worst, 4), j.spans, str(j.conditions),
            ]
            for j in section["judged"]
        ]  # fmt: skip
        lines += _table(
            ["criterion", "tokens", "rank correlation without layer 0", "with it", "mean regret (nats)",
             "largest regret (nats)", "depths", "conditions"], rows,
        )  # fmt: skip
    lines += ["## Coverage", ""]
    lines += [", ".join(f"{count} {name}" for name, count in statuses) or "No cells yet.", ""]
    lines += _table(
        ["status", "cells", "reason"],
        [[str(g["status"]), str(g["count"]), str(g["reason"])] for g in missing],
    )
    lines += _table(
        ["failed stage", "class", "message", "log"],
        [list(Failure(*failure)) for failure in summary.failures],
    )
    lines += _table(["done with less memory", "how"], summary.relief)
    if missing:
        lines += [f"Run what is missing: `{summary.rerun}` (what is done is reused).", ""]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return [*lines, ""]


def _cell(text: str) -> str:
    flat = " ".join(str(text).split())
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'")


def _figure(value: Any, digits: int = 2) -> str:
    return "–" if value is None or pd.isna(value) else f"{float(value):.{digits}f}"
