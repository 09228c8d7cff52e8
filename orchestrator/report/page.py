"""One self-contained page, the tables beside it, and a Markdown summary: the report of a sweep.

Made from tables alone, at any time, also from those of a half-finished sweep. Everything that came
from data is escaped, and the page's own policy forbids any script but its two and any request.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.consensus import (
    SCOPES,
    WITHOUT_LAYER_0,
    agreement_between_models,
    chance_jaccard,
    expected_conditions,
    model_maps,
)
from orchestrator.report.curves import curve_figure
from orchestrator.report.figures import MOST_NUMBERS, Figure, frequency_figure, strip_figure
from orchestrator.report.heatmaps import map_figure, measured_maps
from orchestrator.report.markdown import markdown
from orchestrator.report.pairs import PAIRED, pair_figure
from orchestrator.report.scores import METRIC_NAMES, primary_cells, task_label
from orchestrator.report.summary import LAB_LIMITS, Failure, RunSummary
from orchestrator.report.tables import TABLES, replace_text, typed, with_criterion, write_tables
from orchestrator.report.validation import WITHOUT, in_words, judgements
from orchestrator.report.validation_figures import curves_figure, scatter_figure
from orchestrator.report.verdict import (
    Recommendation,
    layers_text,
    percent,
    points,
    recommendations,
    verdict,
)

_HERE = Path(__file__).parent
_STATUSES = ("done", "pending", "skipped", "suspect", "blocked", "failed")
_SCOPE_NAMES = {
    "all": "all conditions",
    "tasks": "across tasks",
    "languages": "across languages",
    "encoders": "across encoders",
    "modalities": "text against speech",
    "adapted": "before and after adapting",
    "inherited": "text before, speech after",
}


@dataclass(frozen=True)
class Report:
    """A report that was written."""

    page: Path
    """`index.html`."""
    verdicts: dict[str, str]
    """The first sentence about each model."""


def build_report(
    results: pd.DataFrame,
    maps: pd.DataFrame,
    consensus: pd.DataFrame,
    profile: pd.DataFrame,
    summary: RunSummary,
    out: Path,
    validation: pd.DataFrame | None = None,
) -> Report:
    """Write `index.html`, `report.md` and each table as Parquet and CSV into a folder.

    Every file appears whole or not at all, so an open page can be reloaded while a sweep runs.

    Args:
        results: scores, with the columns of `tables.RESULTS_COLUMNS`; may be empty, as may be:
        maps: distances (`MAPS_COLUMNS`).
        consensus: what `consensus_table` gave for them (`CONSENSUS_COLUMNS`).
        profile: speed and memory (`PROFILE_COLUMNS`).
        summary: how the figures were made.
        out: the folder, made if it is not there.
        validation: how well distances foretell damage (`VALIDATION_COLUMNS`); None: not measured.

    Returns:
        Where the page is, and what it says first.
    """
    given = {
        "results": results,
        "maps": with_criterion(maps),
        "consensus": consensus,
        "profile": profile,
        "validation": pd.DataFrame() if validation is None else validation,
    }
    tables = {name: typed(table, TABLES[name]) for name, table in given.items()}
    cells = primary_cells(tables["results"])
    advice = recommendations(
        cells, tables["consensus"], model_maps(tables["maps"], summary.pool), summary.tolerance
    )
    models = sorted({str(m) for t in tables.values() for m in t["model"].dropna().unique()})
    depths = _depths(tables, summary)
    sections = [_model_section(model, tables, cells, advice, summary, depths) for model in models]
    missing = missing_cells(cells)
    statuses = _counts(cells["status"])
    out.mkdir(parents=True, exist_ok=True)
    write_tables(tables, out)
    plotly, script = _plotly(), (_HERE / "page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "duration": _duration}
    page = environment.get_template("page.html").render(
        summary=summary,
        failures=[Failure(*failure) for failure in summary.failures],
        lab_limits=LAB_LIMITS,
        sections=sections,
        statuses=statuses,
        cell_count=len(cells),
        missing=missing,
        between=_between(tables["maps"], depths, summary.pool),
        profile=_profile_rows(tables["profile"]),
        metric_names=METRIC_NAMES,
        table_names=list(TABLES),
        no_validation=WITHOUT,
        tolerance=points(summary.tolerance),
        results_json=_embedded(_columnar(tables["results"])),
        sweep_yaml=yaml.safe_dump(
            json.loads(json.dumps(dict(summary.sweep), default=str)),
            sort_keys=False,
            allow_unicode=True,
        ),
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),  # noqa: S704 - our own
        plotly=Markup(plotly),  # noqa: S704 - the library's own source
        script=Markup(script),  # noqa: S704 - our own
        policy=_policy([plotly, script]),
    )
    replace_text(out / "report.md", markdown(summary, sections, statuses, missing))
    return Report(
        replace_text(out / "index.html", page),
        {section["model"]: section["verdict"] for section in sections},
    )


def missing_cells(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """Cells without a score, grouped by status and reason, with some examples."""
    without = cells[~cells["scored"]] if len(cells) else cells
    groups = []
    keys = [without["status"].fillna("pending"), without["reason"].fillna("")]
    for (status, reason), rows in without.groupby(keys, sort=False):
        examples = [
            f"{row.model} · {row.unit} · depth {row.depth} · {row.heal}"
            for row in rows.head(3).itertuples()
        ]
        groups.append(
            {"status": status, "reason": reason, "count": len(rows), "examples": examples}
        )
    return sorted(groups, key=lambda g: (-_rank(str(g["status"])), -g["count"]))


def _rank(status: str) -> int:
    return _STATUSES.index(status) if status in _STATUSES else 0


def _counts(status: pd.Series) -> list[tuple[str, int]]:
    counts = status.fillna("pending").value_counts()
    names = [s for s in _STATUSES if s in counts] + [s for s in counts.index if s not in _STATUSES]
    return [(str(name), int(counts[name])) for name in names]


def _depths(tables: dict[str, pd.DataFrame], summary: RunSummary) -> list[int]:
    """The depths the figures show: the summary's, else those scored, else those agreed on."""
    for found in (summary.depths, tables["results"]["depth"], tables["consensus"]["depth"]):
        depths = sorted({int(d) for d in found if not pd.isna(d) and d > 0})
        if depths:
            return depths
    return []


def _model_section(
    model: str,
    tables: dict[str, pd.DataFrame],
    cells: pd.DataFrame,
    advice: Sequence[Recommendation],
    summary: RunSummary,
    depths: Sequence[int],
) -> dict[str, Any]:
    own = [r for r in advice if r.model == model]
    sentence, note = verdict(own, summary.tolerance)
    of_model = cells[cells["model"] == model]

    def hole(encoder: str | None, task: str, source: str, target: str | None) -> str:
        rows = of_model[of_model["condition"] == task_label(task, source, target)]
        if encoder is not None:
            rows = rows[rows["encoder"] == encoder]
        # A map fails with its base, as the control does, or on its own, and then blocks the cuts.
        reasons = rows.loc[~rows["scored"]].dropna(subset=["reason"])
        control = reasons["depth"] == 0
        blocked = (reasons["status"] == "blocked") & reasons["reason"].astype(str).str.contains(
            "map"
        )
        named = reasons.loc[control | blocked, "reason"]
        return str(named.iloc[0]) if len(named) else "not measured"

    maps, pool = tables["maps"], summary.pool
    most = MOST_NUMBERS // max(1, maps["model"].nunique())
    validation = tables["validation"]
    measured = measured_maps(model, maps, pool)
    judged = judgements(validation[validation["model"] == model], depths)
    expected = expected_conditions(maps, tables["results"], model)
    made: dict[str, Figure | None] = {
        "curves": curve_figure(model, cells, summary.tolerance),
        "strip": strip_figure(model, maps, tables["consensus"], pool, depths),
        "frequency": frequency_figure(model, maps, pool, depths),
        "maps": map_figure(model, measured, expected, hole, most),
        "damage": scatter_figure(model, measured, depths, most),
        "validation": curves_figure(model, validation, most),
    }
    pairs = [pair_figure(model, scope, measured, depths, most) for scope in PAIRED]
    return {
        "model": model,
        "verdict": sentence,
        "note": note,
        "advice": own,
        "chosen": _chosen(own),
        "unscored": _unscored(of_model, own),
        "scored": (int(of_model["scored"].sum()), len(of_model)),
        "consensus": _consensus_rows(tables, model, depths),
        "mapped": bool(measured),
        "judged": judged,
        "judgement": in_words(judged, pool) if judged else WITHOUT,
        "pairs": [_embed_figure(figure) for figure in pairs if figure is not None],
        "figures": {name: figure and _embed_figure(figure) for name, figure in made.items()},
    }


def _unscored(cells: pd.DataFrame, advice: Sequence[Recommendation]) -> list[dict[str, Any]]:
    """Depths that nothing can be said about yet, with the first reason given."""
    known = {0, *(r.depth for r in advice)}
    rows = []
    for depth, at_depth in cells[~cells["depth"].isin(known)].groupby("depth", sort=True):
        reasons = at_depth["reason"].fillna(at_depth["status"]).dropna()
        layers = at_depth["layers"].max()
        rows.append(
            {
                "depth": depth,
                "fraction": None if pd.isna(layers) else depth / layers,
                "reason": reasons.iloc[0] if len(reasons) else "not yet run",
            }
        )
    return rows


def _chosen(advice: Sequence[Recommendation]) -> int | None:
    good = [r.depth for r in advice if r.within]
    return max(good) if good else None


def _consensus_rows(
    tables: dict[str, pd.DataFrame], model: str, depths: Sequence[int]
) -> list[dict[str, Any]]:
    """A row a depth and scope, the figures without layer 0 beside those with it."""
    table = tables["consensus"]
    table = table[(table["model"] == model) & table["depth"].isin(list(depths))]
    indexed: dict[tuple[Any, Any], Any] = {(r.depth, r.scope): r for r in table.itertuples()}
    maps = tables["maps"][tables["maps"]["model"] == model]
    layers = int((maps["start"] + maps["depth"]).max()) if len(maps) else None
    rows = []
    for depth in depths:
        for scope in SCOPES:
            row = indexed.get((depth, scope))
            if row is None:
                continue
            rows.append(
                {
                    "depth": depth,
                    "scope": scope,
                    "name": _SCOPE_NAMES[scope],
                    "block": None
                    if pd.isna(row.block_start)
                    else layers_text(int(row.block_start), depth),
                    "chance": chance_jaccard(layers - depth + 1, depth)
                    if layers and depth <= layers
                    else None,
                    "with": row,
                    "without": indexed.get((depth, scope + WITHOUT_LAYER_0)),
                }
            )
    return rows


def _between(maps: pd.DataFrame, depths: Sequence[int], pool: str) -> list[Any]:
    return list(agreement_between_models(maps, depths, pool).itertuples()) if len(maps) else []


def _profile_rows(profile: pd.DataFrame) -> list[dict[str, Any]]:
    """Profile rows with what each gains over the unpruned model of the same pair."""
    rows = []
    for _, group in profile.groupby(["model", "encoder", "device"], dropna=False, sort=True):
        control = group[group["depth"] == 0]
        for row in group.sort_values("depth").itertuples():
            base = control.iloc[0] if len(control) else None
            rows.append(
                {
                    "row": row,
                    "speed": None if base is None else base["token_ms"] / row.token_ms,
                    "weights": None if base is None else row.weight_bytes / base["weight_bytes"],
                }
            )
    return rows


def _columnar(results: pd.DataFrame) -> dict[str, Any]:
    """The results, dictionary-coded by column, so that 5,000 cells stay a small part of the page."""
    frame = results.assign(
        condition=[
            task_label(*key)
            for key in results[["task", "source_language", "target_language"]].itertuples(
                index=False, name=None
            )
        ],
        stage=results["stage_key"].str.slice(0, 12),
    )
    shown = [
        "model", "encoder", "condition", "test_set", "selector", "depth", "block_start", "heal",
        "seed", "metric", "value", "ci_low", "ci_high", "samples", "runaway_rate", "status",
        "reason", "stage",
    ]  # fmt: skip
    columns = []
    for name in shown:
        column = frame[name]
        if column.dtype == "float64":
            values: list[Any] = [None if pd.isna(v) else round(float(v), 3) for v in column]
            columns.append({"name": name, "values": values})
        else:
            codes, labels = pd.factorize(column, sort=True)
            kind = "number" if str(column.dtype) == "Int64" else "text"
            found = [int(v) if kind == "number" else str(v) for v in labels]
            columns.append({"name": name, "kind": kind, "codes": codes.tolist(), "labels": found})
    return {"rows": len(frame), "columns": columns}


def _embed_figure(figure: Figure) -> dict[str, Any]:
    return {"figure": figure, "json": _embedded(figure.views)}


def _embedded(data: object) -> Markup:
    """JSON for a `<script type="application/json">`: no character that could end the element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - escaped just above


def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # imported late: it costs a third of a second

    return str(get_plotlyjs()).replace("\r\n", "\n")


def _policy(scripts: Sequence[str]) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _number(value: Any, digits: int = 2) -> str:
    if value is None or pd.isna(value):
        return "–"
    text = f"{float(value):.{digits}f}"
    if text.startswith("-"):
        text = text[1:] if float(text) == 0 else "−" + text[1:]
    return text


def _percent(value: Any) -> str:
    return "–" if value is None or pd.isna(value) else percent(float(value))


def _duration(seconds: float | None) -> str:
    if seconds is None or pd.isna(seconds):
        return "–"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
