import csv
import html
import json
import re
from collections.abc import Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from orchestrator.consensus import consensus_table, expected_conditions
from orchestrator.report import (
    CONSENSUS_COLUMNS,
    MAPS_COLUMNS,
    PROFILE_COLUMNS,
    RESULTS_COLUMNS,
    TABLES,
    VALIDATION_COLUMNS,
    RunSummary,
    build_report,
    typed,
)
from orchestrator.report.curves import curve_figure
from orchestrator.report.figures import frequency_figure, strip_figure
from orchestrator.report.heatmaps import allotted, drawn_depths, map_figure, measured_maps
from orchestrator.report.pairs import PAIRED, pair_figure
from orchestrator.report.scores import changes, mean_score, of_selector, primary_cells, records
from orchestrator.report.validation import in_words, judgements
from orchestrator.report.validation_figures import curves_figure, scatter_figure
from orchestrator.report.verdict import recommendations, verdict
from workers.config import POOLS

LAYERS = 12
CONDITIONS = [
    ("asr", "en", None),
    ("asr", "de", None),
    ("asr", "fr", None),
    ("ast", "de", "en"),
    ("ast", "fr", "en"),
]
DEPTHS = (0, 2, 4, 6)
HEALS = ("none", "decoder", "joint")
WER = {
    "none": (6.0, 10.3, 30.1, 47.3),
    "decoder": (5.8, 6.0, 8.7, 19.1),
    "joint": (5.5, 6.1, 8.1, 18.4),
}
BLEU = {"none": (88.0, 82.8, 46.7, 44.2), "decoder": (89.7, 88.4, 84.2, 68.4), "joint": (90.0, 89.8, 85.8, 69.8)}  # fmt: skip


def demo_results(
    models: Sequence[str] = ("lab-llama",), seeds: Iterable[int] = (0,), holes: bool = False
) -> pd.DataFrame:
    """A quickstart's results: scores near those that the lab gave, with plausible noise."""
    random = np.random.default_rng(1)
    rows = []
    for model in models:
        for encoder in ("whisper", "conformer"):
            for task, source, target in CONDITIONS:
                for test_set, in_domain in (("test", True), ("ood", False)):
                    for i, depth in enumerate(DEPTHS):
                        for heal in HEALS:
                            for seed in seeds:
                                row = {
                                    "model": model, "encoder": encoder, "task": task,
                                    "source_language": source, "target_language": target,
                                    "test_set": test_set, "in_domain": in_domain,
                                    "selector": "consensus", "depth": depth, "layers": LAYERS,
                                    "fraction_removed": depth / LAYERS,
                                    "block_start": 5 if depth else None, "heal": heal,
                                    "seed": seed, "status": "done", "stage_key": "0f" * 16,
                                }  # fmt: skip
                                if holes and depth == 6 and encoder == "conformer":
                                    why = "device out of memory after 3 attempts"
                                    rows.append(row | {"status": "failed", "reason": why})
                                    continue
                                if holes and depth == 6:
                                    rows.append(
                                        row | {"status": "pending", "reason": "not yet run"}
                                    )
                                    continue
                                if holes and encoder == "conformer" and target and depth == 4:
                                    why = "needs heal lab-llama · conformer · depth 4, which failed"
                                    rows.append(row | {"status": "blocked", "reason": why})
                                    continue
                                first, second = (
                                    ("WER", "CER") if task == "asr" else ("BLEU", "chrF")
                                )
                                mean = (WER if task == "asr" else BLEU)[heal][i]
                                worse = 14 if task == "asr" else -19
                                value = mean + random.normal(0, 0.5) + (0 if in_domain else worse)
                                wide = {"ci_low": value - 1.6, "ci_high": value + 1.8}
                                more = {"samples": 100, "runaway_rate": 0.01 * i}
                                rows.append(row | more | wide | {"metric": first, "value": value})
                                rows.append(row | more | {"metric": second, "value": value / 2})
    return typed(rows, RESULTS_COLUMNS)


def demo_maps(
    models: Sequence[str] = ("lab-llama",), drop: int = 0, criteria: Sequence[str] = ("angular",)
) -> pd.DataFrame:
    """25 maps a model: text before adapting, and text and speech after it for both encoders.

    Damage is measured at the depths of the sweep alone.
    """
    random = np.random.default_rng(2)
    rows = []
    for model in models:
        steps = 0.03 + 0.05 * np.abs(np.arange(LAYERS) - 6) / 6
        steps[0] = 0.35
        kinds = [(None, "text", False)]
        kinds += [(e, m, True) for e in ("whisper", "conformer") for m in ("text", "speech")]
        for task, source, target in CONDITIONS:
            for encoder, modality, adapted in kinds:
                own = steps * random.uniform(0.8, 1.25, LAYERS)
                places = [(c, p) for c in criteria for p in POOLS if c != "damage" or p == "target"]
                for criterion, pool in places:
                    for depth in DEPTHS[1:] if criterion == "damage" else range(1, LAYERS + 1):
                        for start in range(LAYERS - depth + 1):
                            scale = 8 if criterion == "damage" else 0.5
                            distance = scale * np.tanh(2 * own[start : start + depth].sum())
                            rows.append({
                                "model": model, "encoder": encoder, "task": task,
                                "source_language": source, "target_language": target,
                                "modality": modality, "adapted": adapted, "pool": pool,
                                "criterion": criterion, "start": start, "depth": depth, "distance": distance,
                                "std_error": 0.002, "samples": 128, "stage_key": "ab" * 16,
                            })  # fmt: skip
    frame = typed(rows, MAPS_COLUMNS)
    if drop:
        gone = (frame["encoder"] == "conformer") & (frame["task"] == "ast")
        frame = frame[~gone]
    return frame


def demo_validation(models: Sequence[str] = ("lab-llama",)) -> pd.DataFrame:
    """Influence foretells damage better than the angular distance does; in pool last, nothing."""
    rows = []
    for model in models:
        for encoder in ("whisper", "conformer"):
            for task, source, target in CONDITIONS:
                for criterion, pool, skill in (
                    ("angular", "all", 0.4), ("angular", "last", 0.0), ("influence", "all", 0.8),
                ):  # fmt: skip
                    rows += [
                        {
                            "model": model, "encoder": encoder, "task": task,
                            "source_language": source, "target_language": target,
                            "modality": "speech", "adapted": True, "criterion": criterion,
                            "pool": pool, "depth": depth, "spearman": (1 + skill) / 2,
                            "spearman_without_layer_0": skill, "start": 5, "best_start": 6,
                            "regret": (1 - skill) * depth / 10, "regret_ci_low": 0.0,
                            "regret_ci_high": (1 - skill) * depth / 5, "samples": 64,
                        }
                        for depth in DEPTHS[1:]
                    ]  # fmt: skip
    return typed(rows, VALIDATION_COLUMNS)


def demo_profile() -> pd.DataFrame:
    rows = [
        {
            "model": "lab-llama", "encoder": encoder, "depth": depth, "layers": LAYERS,
            "parameters": 2_800_000 - 200_000 * depth, "weight_bytes": 11_200_000 - 800_000 * depth,
            "peak_bytes": 90_000_000, "encode_ms": 5.0, "prefill_ms": 4.0 - depth / 4,
            "token_ms": 3.0 - depth / 5, "rtfx": 80.0 + 10 * depth, "device": "cpu",
        }
        for encoder in ("whisper", "conformer")
        for depth in DEPTHS
    ]  # fmt: skip
    return typed(rows, PROFILE_COLUMNS)


def demo_summary(**more: object) -> RunSummary:
    settings: dict[str, object] = {
        "name": "quickstart",
        "created": "2026-01-01T12:00:00+00:00",
        "sweep": {"name": "quickstart", "depths": list(DEPTHS), "encoders": [{"encoder": "lab:w"}]},
        "stages": {"done": 161, "reused": 4},
        "lab": True,
        "depths": DEPTHS,
        "wall_seconds": 352.0,
        "cpu_seconds": 670.0,
        "versions": {"layersweep": "0.1.0", "torch": "2.13.0"},
        "rerun": "layersweep run configs/quickstart.yaml",
    }
    return RunSummary(**(settings | more))  # type: ignore[arg-type]


def demo_consensus(maps: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    return typed(consensus_table(maps, DEPTHS, "all", results, permutations=200), CONSENSUS_COLUMNS)


class Page(HTMLParser):
    """What a browser would load and run, and what a reader would see."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.handlers: list[str] = []
        self._inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        names = ["src", "srcset", "action", "data", "poster"] + (["href"] if tag != "a" else [])
        self.loads += [str(given[name]) for name in names if name in given]
        self.handlers += [name for name in given if name.startswith("on")]
        if tag in ("script", "style"):
            self._inside.append(f"{tag}:{given.get('type')}")
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data
        elif self._inside[-1].startswith("script"):
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_report(tmp_path_factory.mktemp("full"))


def full_report(out: Path) -> Path:
    """Every table filled, several criteria measured."""
    results, maps = demo_results(), demo_maps(criteria=("angular", "influence", "damage"))
    tables = results, maps, demo_consensus(maps, results), demo_profile()
    return build_report(*tables, demo_summary(), out, demo_validation()).page


def test_page_is_one_file_that_loads_nothing(full: Path) -> None:
    page = Page(full)
    assert page.loads == []
    style = full.read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert full.stat().st_size < 8_000_000
    assert full.read_text(encoding="utf-8").count("plotly.js v") == 1
    assert "default-src 'none'" in html.unescape(full.read_text(encoding="utf-8"))


def test_page_links_only_to_itself_and_to_its_tables(full: Path) -> None:
    body = re.sub(r"<script.*?</script>", "", full.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = set(re.findall(r'href="([^"]*)"', body))
    anchors = {target[1:] for target in targets if target.startswith("#")}
    assert anchors <= set(re.findall(r'id="([^"]*)"', body))
    files = {target for target in targets if not target.startswith("#")}
    assert files == {f"{name}.{kind}" for name in TABLES for kind in ("csv", "parquet")}
    assert all((full.parent / name).is_file() for name in files)


def test_first_screen_gives_the_decision_and_the_lab_limits(full: Path) -> None:
    text = " ".join(Page(full).text.split())
    assert "Remove layers 5–6 of 12 (17 %): WER" in text
    assert "within 0.0" in text
    assert "layers grown by copying" in text or "grown by copying layers" in text
    assert "240 done" in text


def test_tables_come_back_as_they_were(full: Path) -> None:
    for name, columns in TABLES.items():
        table = pd.read_parquet(full.parent / f"{name}.parquet")
        assert list(table.columns) == list(columns)
        with (full.parent / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            assert next(csv.reader(file)) == list(columns)
    stored = typed(pd.read_parquet(full.parent / "results.parquet"), RESULTS_COLUMNS)
    pd.testing.assert_frame_equal(stored, demo_results())


def test_same_tables_give_the_same_page(full: Path, tmp_path: Path) -> None:
    again = full_report(tmp_path)
    assert again.read_bytes() == full.read_bytes()
    assert (tmp_path / "report.md").read_bytes() == (full.parent / "report.md").read_bytes()


def test_half_finished_sweep_shows_its_holes_and_how_to_fill_them(tmp_path: Path) -> None:
    results, maps = demo_results(holes=True), demo_maps(drop=1)
    failure = ("heal lab-llama · conformer · depth 6", "device-oom", "out of memory", "logs/1.txt")
    page = Page(
        build_report(
            results,
            maps,
            demo_consensus(maps, results),
            typed([], PROFILE_COLUMNS),
            demo_summary(failures=[failure], stages={"done": 90, "failed": 1, "pending": 12}),
            tmp_path,
        ).page
    )
    text = " ".join(page.text.split())
    assert "30 failed" in text
    assert "30 pending" in text
    assert "device out of memory after 3 attempts" in text
    assert "layersweep run configs/quickstart.yaml" in text
    assert "logs/1.txt" in text
    assert "80 %" in text  # coverage of the consensus: 8 of 10 speech maps
    figures = " ".join(page.scripts)
    assert "no map" in figures
    assert "✕" in figures


def test_empty_tables_give_a_page_that_says_so(tmp_path: Path) -> None:
    empty = {name: typed([], columns) for name, columns in TABLES.items()}
    page = Page(build_report(**empty, summary=demo_summary(depths=()), out=tmp_path).page)
    assert "Nothing is measured yet" in page.text
    assert (tmp_path / "report.md").read_text().startswith("# Layer-consensus report")


@pytest.mark.parametrize("only", list(TABLES))
def test_any_one_table_alone_gives_a_page(only: str, tmp_path: Path) -> None:
    results, maps = demo_results(), demo_maps()
    whole = {
        "results": results,
        "maps": maps,
        "consensus": demo_consensus(maps, results),
        "profile": demo_profile(),
        "validation": demo_validation(),
    }
    tables = {name: whole[name] if name == only else typed([], TABLES[name]) for name in TABLES}
    page = Page(build_report(**tables, summary=demo_summary(), out=tmp_path).page)
    assert "lab-llama" in page.text


def test_text_from_data_is_escaped_everywhere(tmp_path: Path) -> None:
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
    results, maps = demo_results([evil], holes=True), demo_maps([evil])
    results["reason"] = results["reason"].fillna(evil).where(results["status"] != "done")
    results["encoder"] = results["encoder"].replace("whisper", evil)
    maps["encoder"] = maps["encoder"].replace("whisper", evil)
    summary = demo_summary(
        name=evil, failures=[(evil, evil, evil, evil)], sweep={"x": evil}, versions={evil: evil}
    )
    path = build_report(
        results, maps, demo_consensus(maps, results), typed([], PROFILE_COLUMNS), summary, tmp_path
    ).page
    page = Page(path)
    assert page.loads == []
    assert page.handlers == []
    assert not any("alert" in s for s in page.scripts if not s.lstrip().startswith(("{", "[")))
    for script in page.scripts:
        if script.lstrip().startswith("{"):
            json.loads(script)
    # Plotly reads a little HTML in its labels: what it is given holds no tag of the data's.
    views = [json.loads(s) for s in page.scripts if s.startswith('{"') and '"layout"' in s]
    labels = json.dumps([view for figure in views for view in figure.values()])
    assert views
    assert "<img" not in labels
    assert "<script" not in labels
    assert "<img" not in (tmp_path / "report.md").read_text()


def test_names_from_data_are_escaped_in_the_figures_of_pairs_and_validation() -> None:
    evil = "<img src=x>"
    maps = demo_maps([evil], criteria=("angular", "damage"))
    maps["encoder"] = maps["encoder"].replace("whisper", evil)
    measured = measured_maps(evil, maps, "all")
    figures = [
        *(pair_figure(evil, scope, measured, DEPTHS) for scope in PAIRED),
        scatter_figure(evil, measured, DEPTHS),
        curves_figure(evil, demo_validation([evil])),
    ]
    for figure in figures:
        assert figure is not None
        assert "<img" not in json.dumps(list(figure.views.values()))


def test_only_the_two_own_scripts_may_run(full: Path) -> None:
    page = full.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].count("sha256-") == 2
    assert "unsafe-inline" not in policy[1].split("script-src")[1].split(";")[0]


def test_figures_are_valid_plotly() -> None:
    results = demo_results(seeds=(0, 1, 2), holes=True)
    maps = demo_maps(drop=1, criteria=("angular", "damage"))
    measured = measured_maps("lab-llama", maps, "all")
    cells, consensus = primary_cells(results), demo_consensus(maps, results)
    figures = [
        curve_figure("lab-llama", cells, 1.0),
        strip_figure("lab-llama", maps, consensus, "all", DEPTHS),
        frequency_figure("lab-llama", maps, "all", DEPTHS),
        map_figure("lab-llama", measured, expected_conditions(maps, results), lambda *_: "why"),
        *(pair_figure("lab-llama", scope, measured, DEPTHS) for scope in PAIRED),
        scatter_figure("lab-llama", measured, DEPTHS),
        curves_figure("lab-llama", demo_validation()),
    ]
    for figure in figures:
        assert figure is not None
        for view in figure.views.values():
            go.Figure(view)
            json.dumps(view, allow_nan=False)


def _cells(rows: list[dict[str, object]]) -> pd.DataFrame:
    base = {
        "model": "m", "encoder": "e", "task": "asr", "source_language": "en", "test_set": "test",
        "in_domain": True, "selector": "consensus", "layers": 12, "heal": "joint", "seed": 0,
        "metric": "WER", "status": "done",
    }  # fmt: skip
    return primary_cells(typed([base | row for row in rows], RESULTS_COLUMNS))


def _pair(control: float, pruned: float, **more: object) -> list[dict[str, object]]:
    return [
        {"depth": 0, "value": control, "ci_low": control - 3, "ci_high": control + 3} | more,
        {"depth": 4, "block_start": 5, "value": pruned, "ci_low": pruned - 4, "ci_high": pruned + 4}
        | more,
    ]


def test_change_by_hand() -> None:
    cells = _cells(_pair(6.0, 8.0) + _pair(4.0, 10.0, source_language="de"))
    (change,) = changes(records(cells), 4, "joint")
    assert (change.control.value, change.pruned.value, change.loss) == (5.0, 9.0, 4.0)
    # Two test sets, each ±4: sqrt(4² + 4²) / 2.
    assert change.pruned.high == pytest.approx(9 + 32**0.5 / 2)
    assert change.loss_high == pytest.approx(4 + (32 + 18) ** 0.5 / 2)
    assert (change.worst, change.worst_loss) == ("e · asr-de · test", 6.0)


def test_lower_bleu_is_a_loss() -> None:
    ast = {"task": "ast", "target_language": "en", "source_language": "de", "metric": "BLEU"}
    (change,) = changes(records(_cells(_pair(88.0, 85.0, **ast))), 4, "joint")
    assert change.loss == 3.0


def test_encoders_on_one_test_set_do_not_narrow_the_interval() -> None:
    rows = _pair(6.0, 8.0) + _pair(6.0, 8.0, encoder="other")
    cells = _cells(rows)
    assert mean_score(records(cells[cells["depth"] == 4])).high == pytest.approx(12.0)


def test_conditions_without_a_control_stay_out_of_the_comparison_and_are_counted() -> None:
    rows = [*_pair(6.0, 8.0), *_pair(0.0, 90.0, source_language="de")]
    rows[2] |= {"status": "failed", "value": None, "reason": "no space on device"}
    cells = _cells(rows)
    (advice,) = recommendations(cells, typed([], CONSENSUS_COLUMNS), {}, 1.0)
    assert advice.in_domain[0].loss == 2.0
    assert advice.missing == 1


@pytest.mark.parametrize(("loss", "within"), [(0.5, True), (1.5, False)])
def test_verdict_follows_the_tolerance(loss: float, within: bool) -> None:
    (advice,) = recommendations(
        _cells(_pair(6.0, 6.0 + loss)), typed([], CONSENSUS_COLUMNS), {}, 1.0
    )
    assert advice.within is within
    assert not advice.established  # ±5 points of interval
    sentence, note = verdict([advice], 1.0)
    sentence = sentence.replace("\u00a0", " ")
    assert (
        sentence.startswith("Remove layers 5–8 of 12 (33 %): WER 6.0 → 6.5 [2.5, 10.5]") is within
    )
    assert ("No tested depth stays within 1 point" in sentence) is not within
    assert ("to be sure" in note) is within


def test_control_under_another_selector_serves_all() -> None:
    rows = [*_pair(6.0, 8.0), {"depth": 4, "block_start": 2, "value": 9.0, "selector": "own"}]
    assert set(of_selector(_cells(rows), "own")["depth"]) == {0, 4}


def test_chinese_asr_is_judged_by_characters() -> None:
    rows = _pair(50.0, 60.0, source_language="zh")
    rows += _pair(5.0, 5.5, source_language="zh", metric="CER")
    (advice,) = recommendations(_cells(rows), typed([], CONSENSUS_COLUMNS), {}, 1.0)
    assert [c.metric for c in advice.changes] == ["cer"]


def test_cell_without_a_score_keeps_its_row() -> None:
    cells = _cells([{"depth": 2, "metric": None, "value": None, "status": "failed"}])
    assert len(cells) == 1
    assert not cells["scored"].any()


def test_mean_curve_leaves_out_a_condition_that_has_a_hole() -> None:
    rows = [r for k in ("en", "de", "fr") for r in _pair(6.0, 8.0, source_language=k)]
    rows[-1] |= {"status": "failed", "value": None, "reason": "gone"}
    rows[-2]["value"] = 60.0
    figure = curve_figure("m", _cells(rows), 1.0)
    assert figure is not None
    view = figure.views["consensus|mean over all conditions"]
    assert view["data"][0]["y"] == [6.0, 8.0]
    assert "2 of 3 conditions" in json.dumps(view["layout"])


def test_unknown_column_is_refused() -> None:
    with pytest.raises(ValueError, match="no such column: wer"):
        typed([{"wer": 1.0}], RESULTS_COLUMNS)


# --- maps by criterion, pairs and validation -----------------------------------------------


def test_maps_have_a_choice_of_criterion_with_the_angular_distance_first() -> None:
    maps = demo_maps(criteria=("damage", "influence", "angular"))
    measured = measured_maps("lab-llama", maps, "last")
    # One pool of each criterion comes first: those are what a full page keeps.
    assert list(measured)[:3] == [("angular", "last"), ("influence", "last"), ("damage", "target")]
    conditions = expected_conditions(maps)
    figure = map_figure("lab-llama", measured, conditions, lambda *_: "why")
    assert figure is not None
    criterion, pool = figure.controls
    assert list(criterion.options) == ["angular", "influence", "damage"]
    assert pool.options[0] == "last"
    assert "damage|target" in figure.views
    assert "damage|last" not in figure.views
    for key, name in (("angular|last", "angular distance"), ("damage|target", "damage")):
        assert name in figure.views[key]["layout"]["coloraxis"]["colorbar"]["title"]["text"]


def test_damage_is_shaded_by_its_logarithm_and_read_in_nats() -> None:
    measured = measured_maps("lab-llama", demo_maps(criteria=("damage",)), "all")
    conditions = list(next(iter(measured.values())).distances)
    figure = map_figure("lab-llama", measured, conditions, lambda *_: "why")
    assert figure is not None
    view = figure.views["damage|target"]
    heat = view["data"][0]
    assert [len(row) for row in heat["z"]] == [0, 11, 0, 9, 0, 7]  # depths 2, 4, 6 of 12
    shaded, nats = heat["z"][1][3], float(heat["text"][1][3])
    assert shaded == pytest.approx(np.arcsinh(nats / 0.05), abs=2e-3)
    bar = view["layout"]["coloraxis"]["colorbar"]
    assert dict(zip(bar["ticktext"], bar["tickvals"], strict=True))["1"] == pytest.approx(
        np.arcsinh(1 / 0.05), abs=1e-4
    )


def test_a_page_of_many_maps_is_thinned_and_says_so() -> None:
    measured = measured_maps("lab-llama", demo_maps(), "all")
    conditions = list(next(iter(measured.values())).distances)
    cells = 25 * LAYERS * (LAYERS + 1) // 2
    figure = map_figure("lab-llama", measured, conditions, lambda *_: "why", cells // 2)
    assert figure is not None
    assert list(figure.views) == ["angular|all"]
    assert "one depth in 2 is drawn" in figure.caption
    assert "4 further choices" in figure.caption
    heat, best = figure.views["angular|all"]["data"][:2]
    assert (len(heat["z"]), heat["dy"], best["y"]) == (6, 2, [1, 3, 5, 7, 9, 11])
    pair = pair_figure("lab-llama", PAIRED[0], measured, DEPTHS, cells // 2)
    assert pair is not None
    assert "one depth in" in pair.caption


def test_room_goes_to_one_pool_of_each_criterion_first() -> None:
    costs = {("a", "x"): 40, ("b", "x"): 40, ("a", "y"): 40, ("b", "y"): 10}
    assert allotted(costs, 80, 200) == (1, list(costs))
    assert allotted(costs, 80, 90) == (1, [("a", "x"), ("b", "x"), ("b", "y")])
    # Half the depths of 80 layers make room for the second criterion; of 12 layers they would not.
    assert allotted(costs, 80, 40) == (2, [("a", "x"), ("b", "x")])
    assert allotted(costs, 12, 40) == (1, [("a", "x")])
    assert allotted(costs, 12, 10)[0] == 4  # the first is always there


def test_depths_never_measured_are_not_thinned() -> None:
    table = np.full((13, 12), np.nan)
    table[[2, 4, 6], :6] = 1.0
    assert drawn_depths([table], 2) == range(1, 7)
    table[1:, 0] = 1.0
    assert drawn_depths([table], 2) == range(1, 13, 2)


def test_text_stands_beside_speech_and_before_beside_after() -> None:
    maps = demo_maps(criteria=("angular", "damage"))
    measured = measured_maps("lab-llama", maps, "all")
    text_speech, before_after = (
        pair_figure("lab-llama", scope, measured, DEPTHS) for scope in PAIRED
    )
    assert text_speech is not None
    assert before_after is not None
    assert len(text_speech.controls[0].options) == len(before_after.controls[0].options) == 10
    assert "ast-de-en · text · whisper" in before_after.controls[0].options
    view = text_speech.views["asr-de · whisper|angular|all"]

    def table(modality: str) -> pd.DataFrame:
        chosen = maps[(maps["encoder"] == "whisper") & (maps["modality"] == modality)]
        chosen = chosen[(chosen["task"] == "asr") & (chosen["source_language"] == "de")]
        chosen = chosen[(chosen["criterion"] == "angular") & (chosen["pool"] == "all")]
        return chosen.set_index(["depth", "start"])["distance"]

    heats = [trace for trace in view["data"] if trace["type"] == "heatmap"]
    text, speech = table("text"), table("speech")
    for heat, expected in zip(heats, (text, speech, speech - text), strict=True):
        assert heat["z"][3] == pytest.approx(expected.loc[4].sort_index().to_list(), abs=1e-4)
    limits = view["layout"]["coloraxis2"]
    assert limits["cmin"] == -limits["cmax"]
    (marks, _) = (trace for trace in view["data"] if trace["type"] == "scatter")
    assert marks["x"][3] == text.loc[4].idxmin()
    words = view["layout"]["annotations"][-1]["text"]
    assert "Best blocks at depth 2, 4, 6: mean Jaccard" in words
    assert "Correlation over blocks, each depth centred" in words
    assert "speech − text" in words


def test_a_sweep_without_pairs_has_no_such_figure() -> None:
    maps = demo_maps()
    measured = measured_maps("lab-llama", maps[maps["modality"] == "speech"], "all")
    assert [pair_figure("lab-llama", scope, measured, DEPTHS) for scope in PAIRED] == [None, None]


def test_judgements_by_hand() -> None:
    found = judgements(demo_validation(), depths=(2, 4))
    assert [(j.criterion, j.pool) for j in found] == [
        ("influence", "all"), ("angular", "all"), ("angular", "last"),
    ]  # fmt: skip
    own = found[1]
    assert own.spearman_without_layer_0 == pytest.approx(0.4)
    assert own.spearman == pytest.approx(0.7)
    assert own.regret == pytest.approx(0.6 * 0.3)
    assert (own.worst, own.worst_low, own.worst_high) == pytest.approx((0.24, 0.0, 0.48))
    assert (own.depths, own.conditions) == ((2, 4), 10)


def test_the_sentence_speaks_of_the_distance_that_selectors_read() -> None:
    found = judgements(demo_validation(), depths=(2, 4))
    assert in_words(found, "all") == (
        "Across depths 2, 4 the angular distance in pool all ranks blocks as damage does with mean "
        "rank correlation 0.40 without layer 0 (0.70 with it); its choice costs 0.18 nats per token "
        "more than the best block in the mean, and 0.24 at worst. The block influence in pool all "
        "costs least: 0.060 in the mean."
    )
    assert "angular distance in pool last" in in_words(found, "last")
    alone = demo_validation()
    alone = alone[alone["criterion"] == "influence"]
    alone["spearman"] = alone["spearman_without_layer_0"] = None
    text = in_words(judgements(alone, (6,)), "all")
    assert text.startswith("At depth 6 the block influence in pool all has too few starts")
    assert "costs least" not in text


def test_dots_are_the_blocks_measured_twice_and_rings_what_the_distance_would_choose() -> None:
    maps = demo_maps(criteria=("angular", "damage"))
    measured = measured_maps("lab-llama", maps, "all")
    figure = scatter_figure("lab-llama", measured, DEPTHS)
    assert figure is not None
    assert "damage" not in figure.controls[0].options
    data = figure.views["angular|all"]["data"]
    rings = [t for t in data if t["marker"].get("symbol") == "circle-open"]
    assert len(rings) == len(DEPTHS) - 1
    dots = [t for t in data if t not in rings]
    assert {len(t["x"]) for t in dots} == {LAYERS - d for d in DEPTHS[1:]}  # none from layer 0
    assert min(min(t["marker"]["color"]) for t in dots) == 1
    for ring, depth in zip(rings, DEPTHS[1:], strict=True):
        panel = [t for t in dots if t["xaxis"] == ring["xaxis"]]
        assert sorted(ring["x"]) == sorted(min(t["x"]) for t in panel), depth


def test_page_says_how_well_distances_foretell_damage(full: Path) -> None:
    text = " ".join(Page(full).text.split())
    assert "Across depths 2, 4, 6 the angular distance in pool all ranks blocks" in text
    assert "Every block: distance against damage" in text
    assert "maps.damage: true" not in text
    short = (full.parent / "report.md").read_text(encoding="utf-8")
    assert "Validation against damage: Across depths 2, 4, 6" in short
    assert "| block influence | all | 0.80 | 0.90 |" in short


def test_page_without_damage_says_how_to_get_it(tmp_path: Path) -> None:
    results, maps = demo_results(), demo_maps()
    page = build_report(
        results, maps, demo_consensus(maps, results), demo_profile(), demo_summary(), tmp_path
    ).page
    text = " ".join(Page(page).text.split())
    assert "maps.damage: true" in text
    assert "Text beside speech" in text
    assert "Before beside after adapting" in text
    assert "distance against damage" not in text.replace("Validation: distance against damage", "")
    assert "maps.damage: true" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert len(pd.read_parquet(tmp_path / "validation.parquet")) == 0


@pytest.mark.parametrize("null", [False, True])
def test_a_table_from_before_there_was_a_choice_of_criterion_is_angular(
    null: bool, tmp_path: Path
) -> None:
    results, maps = demo_results(), demo_maps()
    old = maps.assign(criterion=None) if null else maps.drop(columns="criterion")
    tables = demo_consensus(old, results), demo_profile()
    pd.testing.assert_frame_equal(tables[0], demo_consensus(maps, results))
    page = build_report(results, old, *tables, demo_summary(), tmp_path).page
    assert "angular|all" in " ".join(Page(page).scripts)
    written = typed(pd.read_parquet(tmp_path / "maps.parquet"), MAPS_COLUMNS)
    assert set(written["criterion"]) == {"angular"}
