"""`layersweep map`: the redundancy map of one model, with no sweep and no Ray."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from orchestrator.cli.options import (
    AsJson,
    ModelReference,
    Revision,
    TrustRemoteCode,
    app,
    console,
    error_console,
    print_json,
    quiet_libraries,
)
from workers.config import CHEAP_CRITERIA, POOLS, Criterion
from workers.errors import InvalidInput

if TYPE_CHECKING:
    import pandas as pd

    from workers.maps.model_map import ModelMap

DTYPES = ("auto", "float32", "bfloat16", "float16")


@app.command(name="map")
def map_(
    model: ModelReference,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="Text, a sample a line (or JSONL with text)."),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option("--manifest", metavar="FILE", help="JSONL that names audio and its text."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where the map goes (.parquet).")
    ] = Path("map.parquet"),
    pool: Annotated[
        list[str] | None,
        typer.Option("--pool", help=f"Token pool: {', '.join(POOLS)}; repeatable. Default: all."),
    ] = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(
            "--criterion",
            help=f"{', '.join(get_args(Criterion))}; repeatable. Default: angular.",
        ),
    ] = None,
    validate: Annotated[
        bool,
        typer.Option(
            "--validate", help="Measure damage too, and hold every other criterion against it."
        ),
    ] = False,
    depth: Annotated[
        list[int] | None,
        typer.Option(
            "--depth", help="Depth to print, and to measure damage at; repeatable. Default: all."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples at most, spread over FILE.")] = 128,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples a batch.")] = 16,
    modality: Annotated[
        str | None,
        typer.Option(help="With --manifest: speech, or text for its transcripts."),
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Spoken language, where lines have no lang.")
    ] = None,
    target_language: Annotated[
        str | None, typer.Option("--target-language", help="Translate into it, not transcribe.")
    ] = None,
    no_adapter: Annotated[
        bool, typer.Option("--no-adapter", help="Switch the model's adapter off.")
    ] = False,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)} (auto: as stored).")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    picture: Annotated[
        str, typer.Option(metavar="png|svg|pdf|none", help="Form of the pictures beside the map.")
    ] = "png",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad samples out, and list them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how redundant every block of layers of a model is, in one pass over the data."""
    criteria = _chosen("--criterion", criterion or ["angular"], get_args(Criterion))
    if validate:
        criteria = list(dict.fromkeys([*CHEAP_CRITERIA, *criteria, "damage"]))
    pools = _chosen("--pool", pool or list(POOLS), POOLS)
    _chosen("--dtype", [dtype], DTYPES)
    _chosen("--modality", [modality or "speech"], ("speech", "text"))
    _chosen("--picture", [picture], ("png", "svg", "pdf", "none"))
    if out.suffix != ".parquet":
        raise InvalidInput(f"{out} does not end in .parquet", "--out", "e.g. --out map.parquet")
    if (text is None) == (manifest is None):
        raise InvalidInput("give one of the two", "--text, --manifest", "what to measure on")
    for file in (text, manifest):
        if file is not None and not file.is_file():
            raise InvalidInput("no such file", str(file))

    import torch

    from orchestrator.validation import validate as hold_against
    from workers.maps.measure import CKA_TOKENS
    from workers.maps.model_map import MapRequest, conditions_of, map_model
    from workers.model_folder import open_model

    quiet_libraries()
    request = MapRequest(
        text=text,
        manifest=manifest,
        modality=modality,  # type: ignore[arg-type]
        language=language,
        target_language=target_language,
        samples=samples,
        batch_size=batch_size,
        pools=tuple(pools),  # type: ignore[arg-type]
        criteria=tuple(c for c in criteria if c != "damage"),  # type: ignore[misc]
        damage="damage" in criteria,
        depths=tuple(sorted(set(depth or ()))),
        adapter=not no_adapter,
        skip_bad=skip_bad,
    )
    with _bar(quiet=as_json) as tell:
        tell("opening", 0.0, model)
        opened = open_model(
            model,
            revision=revision,
            dtype=dtype,
            device=_device(device, torch.cuda.is_available()),
            trust_remote_code=trust_remote_code,
            conditions=conditions_of(request),
        )
        result = map_model(
            opened,
            request,
            tell,
        )
    about = {
        "model": model,
        "revision": revision,
        "data": str(text or manifest),
        "modality": result.modality,
        "adapter": not no_adapter,
        "dtype": str(opened.decoder.dtype).removeprefix("torch."),
        "skipped": list(result.skipped),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    result.whole.save(out.parent, out.stem, about)
    files = [out]
    judged = None
    if validate:
        assert result.measured is not None
        assert result.damage is not None
        judged = hold_against(result.measured, result.damage)
        files.append(out.with_suffix(".validation.parquet"))
        judged.to_parquet(files[-1], index=False)
    if picture != "none":
        title = f"{model}, {result.modality}" + ("" if not no_adapter else ", without adapter")
        files += _draw(result, judged, out, picture, title)
    shown = sorted(set(depth or range(1, result.whole.layers // 2 + 1)))
    best = best_blocks(result, shown)
    if as_json:
        _print_data(result, best, judged, files)
    else:
        _print_tables(result, best, judged, files, model)
        if "cka" in criteria and "cka" not in result.whole.criteria:
            console().print(f"cka left out: no sample has {CKA_TOKENS} tokens in a pool")


def best_blocks(result: "ModelMap", depths: list[int]) -> list[dict[str, Any]]:
    """The block each measure would remove at each depth, and how sure that is."""
    whole, rows = result.whole, []
    table = whole.table().set_index(["criterion", "pool", "start", "depth"])
    cells = table[["distance", "std_error"]].to_dict("index")
    for measure in whole.measures:
        for depth in depths:
            start = whole.best(depth, measure.pool, measure.criterion)
            cell = cells[(*measure, start, depth)]
            rows.append(
                {
                    "criterion": measure.criterion,
                    "pool": measure.pool,
                    "depth": depth,
                    "start": start,
                    "distance": cell["distance"],
                    "std_error": None if math.isnan(cell["std_error"]) else cell["std_error"],
                    "stability": whole.stability(depth, measure.pool, measure.criterion)[start],
                    "near_ties": list(whole.near_ties(depth, measure.pool, measure.criterion)),
                }
            )
    return rows


def _chosen(option: str, given: list[str], known: tuple[str, ...]) -> list[str]:
    for name in given:
        if name not in known:
            raise InvalidInput(f"{name!r} is not known", option, f"choose among {', '.join(known)}")
    return list(dict.fromkeys(given))


def _device(asked: str, has_cuda: bool) -> str:
    if asked == "auto":
        return "cuda" if has_cuda else "cpu"
    if asked.startswith("cuda") and not has_cuda:
        raise InvalidInput("there is no GPU here", "--device", "use --device cpu")
    if asked != "cpu" and not asked.startswith("cuda"):
        raise InvalidInput(f"{asked!r} is not known", "--device", "use auto, cpu or cuda")
    return asked


class _bar:  # noqa: N801 - used as a function
    """Progress on standard error: a bar on a terminal, nothing elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        target = error_console()
        self._progress = Progress(
            TextColumn("{task.fields[what]}"),
            BarColumn(),
            TextColumn("{task.fields[words]}"),
            TimeRemainingColumn(),
            console=target,
            transient=True,
            disable=quiet or not target.is_terminal,
        )
        self._task = self._progress.add_task("", total=1.0, what="", words="")

    def __enter__(self) -> Callable[[str, float, str], None]:
        self._progress.start()
        return self._tell

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def _tell(self, what: str, done: float, words: str) -> None:
        self._progress.update(self._task, completed=done, what=what, words=words)


def _draw(
    result: "ModelMap", judged: "pd.DataFrame | None", out: Path, suffix: str, title: str
) -> list[Path]:
    """Pictures beside the map: its criteria in the pool that is printed, and the validation."""
    from orchestrator.mapgrid import map_grid
    from orchestrator.pictures import draw_maps, draw_validation

    table = result.whole.table()
    grids = [map_grid(table, c, _shown_pool(result, c)) for c in result.whole.criteria]
    drawn = [draw_maps(grids, out.with_suffix(f".{suffix}"), title)]
    if judged is not None and len(judged):
        drawn.append(draw_validation(judged, out.with_suffix(f".validation.{suffix}"), title))
    return drawn


def _print_data(
    result: "ModelMap",
    best: list[dict[str, Any]],
    judged: "pd.DataFrame | None",
    files: list[Path],
) -> None:
    data: dict[str, Any] = {
        "layers": result.whole.layers,
        "modality": result.modality,
        "samples": result.samples,
        "skipped": list(result.skipped),
        "files": [str(file) for file in files],
        "best": best,
    }
    if result.damage is not None and result.damage.unpruned_loss is not None:
        data["unpruned_loss"] = float(result.damage.unpruned_loss.mean())
    if judged is not None:
        rows = judged.astype(object).where(judged.notna(), None)
        data["validation"] = rows.to_dict(orient="records")
    print_json(data)


def _print_tables(
    result: "ModelMap",
    best: list[dict[str, Any]],
    judged: "pd.DataFrame | None",
    files: list[Path],
    model: str,
) -> None:
    from orchestrator.compare import span

    out, whole = console(), result.whole
    out.print(
        f"{model}: {whole.layers} layers, {len(whole.blocks)} blocks, {result.samples} samples of "
        f"{result.modality}",
        markup=False,
    )
    if result.skipped:
        out.print(f"{len(result.skipped)} bad samples left out:")
        for line in result.skipped:
            out.print(f"  {line}", markup=False)
    for measure in whole.measures:
        # `all` speaks for the pools: the rest is in the file.
        if len(whole.pools) > 1 and measure.pool != _shown_pool(result, measure.criterion):
            continue
        table = Table(
            "remove", "layers", "distance", "±", "chosen", "near-ties (first layer)",
            title=f"{measure.criterion}, pool {measure.pool}", title_justify="left", box=None,
            pad_edge=False,
        )  # fmt: skip
        for row in best:
            if (row["criterion"], row["pool"]) != tuple(measure):
                continue
            table.add_row(
                str(row["depth"]),
                span(row["start"], row["depth"]),
                f"{row['distance']:.4f}",
                "" if row["std_error"] is None else f"{row['std_error']:.4f}",
                f"{row['stability']:.0%}",
                ", ".join(map(str, row["near_ties"])) or "none",
            )
        out.print(table)
        out.print()
    if judged is not None:
        _print_validation(judged)
    for file in files:
        out.print(str(file), markup=False)


def _shown_pool(result: "ModelMap", criterion: str) -> str:
    pools = [m.pool for m in result.whole.measures if m.criterion == criterion]
    return "all" if "all" in pools else pools[0]


def _print_validation(judged: "pd.DataFrame") -> None:
    """Means over depths: how each criterion and pool ranks blocks, and what its choice costs."""
    out = console()
    figures = ["spearman", "spearman_without_layer_0", "regret"]
    means = judged.groupby(["criterion", "pool"], sort=False)[figures].mean().reset_index()
    table = Table(
        "criterion", "pool", "rank correlation", "without layer 0", "regret (nats a token)",
        title="against damage, mean over depths", title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    for name, pool, whole, inner, regret in means.itertuples(index=False, name=None):
        table.add_row(name, pool, f"{whole:.2f}", f"{inner:.2f}", f"{regret:.3f}")
    out.print(table)
    out.print()
