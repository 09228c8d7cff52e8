"""The commands on sweeps and runs: plan, run, status, logs, report, and the check of the machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from orchestrator.cli.options import (
    Address,
    AsJson,
    Overrides,
    RunName,
    StoreLocation,
    SweepFile,
    app,
    console,
    print_json,
)

if TYPE_CHECKING:
    from orchestrator.graph import Plan
    from orchestrator.reuse import Assessment
    from orchestrator.store import Store
    from orchestrator.sweep import Sweep


def _load(sweep_file: Path, store: str, overrides: list[str] | None) -> tuple[Any, ...]:
    from orchestrator.plan import build_plan
    from orchestrator.sources import DigestCache
    from orchestrator.store import open_store
    from orchestrator.sweep import load_sweep

    sweep = load_sweep(sweep_file, overrides or ())
    opened = open_store(store)
    base = sweep_file.absolute().parent
    plan = build_plan(sweep, base, DigestCache(opened.folder / "digests.json"))
    return sweep, opened, base, plan


@app.command()
def plan(
    sweep_file: SweepFile,
    store: StoreLocation = "store",
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--all", help="List every stage.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a sweep would run, what is reused, and why. Runs nothing."""
    from orchestrator.reuse import assess

    sweep, opened, _, laid_out = _load(sweep_file, store, overrides)
    assessment = assess(laid_out, opened)
    if as_json:
        print_json(
            {
                "sweep": sweep.name,
                "stages": [
                    {
                        "id": node.id,
                        "kind": node.kind,
                        "key": laid_out.key(node.id),
                        "block": node.params.get("block"),
                        "verdict": assessment.verdicts[node.id],
                        "reason": assessment.reasons[node.id],
                        "needs": sorted(node.dependencies()),
                    }
                    for node in laid_out.nodes.values()
                ],
            }
        )
        return
    _show_plan(sweep, opened, laid_out, assessment, every)


def _show_plan(
    sweep: "Sweep", store: "Store", laid_out: "Plan", assessment: "Assessment", every: bool
) -> None:
    out = console()
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
    table = Table(box=None, pad_edge=False)
    verdicts = ("run", "reuse", "undetermined", "unneeded")
    table.add_column("stage")
    for verdict in verdicts:
        table.add_column(verdict, justify="right")
    kinds = list(dict.fromkeys(node.kind for node in laid_out.nodes.values()))
    for kind in kinds:
        ids = [node.id for node in laid_out.by_kind(kind)]
        counts = [sum(assessment.verdicts[i] == v for i in ids) for v in verdicts]
        table.add_row(kind, *(str(n) if n else "-" for n in counts))
    total = [assessment.count(verdict) for verdict in verdicts]  # type: ignore[arg-type]
    table.add_row("all", *(str(n) if n else "-" for n in total))
    out.print(table)
    if total[2]:
        out.print("undetermined: their block is chosen from maps that are still to be made")
    if total[3]:
        out.print("unneeded: not in the store, but all that would need them is")
    seconds = sum(
        node.cost
        for node in laid_out.nodes.values()
        if assessment.verdicts[node.id] in ("run", "undetermined")
    )
    if seconds:
        out.print(
            f"Roughly {max(1, round(seconds / 60))} job-minutes to run. Store: {store.location}"
        )
    else:
        out.print(f"Nothing to run: all of it is in {store.location}")
    if every:
        for node in laid_out.nodes.values():
            out.print(
                f"{assessment.verdicts[node.id]:13}{node.id}  ({assessment.reasons[node.id]})",
                markup=False,
            )


@app.command()
def run(
    sweep_file: SweepFile,
    address: Address = None,
    store: StoreLocation = "store",
    overrides: Overrides = None,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="CPU slots of the embedded cluster.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a sweep, or resume it: what is in the store is not done again."""
    from orchestrator.execute import execute

    sweep, opened, base, laid_out = _load(sweep_file, store, overrides)
    result = execute(
        sweep, opened, base, laid_out, address=address, cpus=cpus, plain=as_json, console=console()
    )
    if as_json:
        print_json(result.data)
    raise typer.Exit(result.status)


@app.command()
def status(run_name: RunName, as_json: AsJson = False) -> None:
    """Show how far a run is: stages by state, what runs now, what failed and why."""
    from orchestrator.runs import RunFolder
    from orchestrator.watch import status_data, status_table

    folder = RunFolder.existing(run_name)
    data = status_data(folder)
    if as_json:
        print_json(data)
    else:
        status_table(data, console())


@app.command()
def logs(
    run_name: RunName,
    stage: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="A stage's id, or a part of it.")
    ] = None,
) -> None:
    """Print a run's journal, or the log of one stage's newest attempt."""
    from orchestrator.runs import RunFolder
    from orchestrator.watch import journal_lines, stage_log

    folder = RunFolder.existing(run_name)
    lines = journal_lines(folder) if stage is None else stage_log(folder, stage)
    for line in lines:
        print(line)


@app.command()
def report(run_name: RunName, as_json: AsJson = False) -> None:
    """Build a run's report from the store, finished or not: HTML, Markdown, Parquet and CSV."""
    from orchestrator.execute import write_report
    from orchestrator.runs import RunFolder

    folder = RunFolder.existing(run_name)
    written = write_report(folder)
    if as_json:
        print_json({"verdicts": written.verdicts, "report": str(written.page)})
    else:
        print(written.page)


@app.command()
def doctor(
    address: Address = None, store: StoreLocation = "store", as_json: AsJson = False
) -> None:
    """Check this machine: packages, GPUs, Ray, the store, the hub; says how to mend what is not."""
    from orchestrator.doctor import examine

    findings = examine(address, store)
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.state:5} {finding.what}: {finding.found}")
            if finding.remedy:
                print(f"      -> {finding.remedy}")
    raise typer.Exit(1 if any(finding.state == "fail" for finding in findings) else 0)
