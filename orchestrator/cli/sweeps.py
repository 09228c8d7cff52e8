"""The commands on sweeps: plan and run; and the check of the machine."""

from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.options import (
    Address,
    AsJson,
    Overrides,
    StoreLocation,
    SweepFile,
    app,
    console,
    print_json,
)


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
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to hold the plan against: auto or host:port."),
    ] = None,
    store: StoreLocation = "store",
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--all", help="List every stage.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a sweep would run and reuse, what it takes, and whether it fits. Runs nothing."""
    from cluster.connection import Cluster
    from orchestrator.estimate.outlook import look_ahead
    from orchestrator.estimate.view import outlook_data, show_outlook
    from orchestrator.planfile import read_plan
    from orchestrator.reuse import assess

    sweep, opened, _, laid_out = _load(sweep_file, store, overrides)
    capacity = None
    if address is not None:
        with Cluster(address) as cluster:
            capacity = cluster.capacity()
    outlook = look_ahead(
        laid_out,
        opened,
        assess(laid_out, opened),
        sweep.resources,
        capacity=capacity,
        last=read_plan(Path("runs") / sweep.name / "plan.json"),
    )
    if as_json:
        print_json(outlook_data(sweep, outlook))
    else:
        show_outlook(sweep, outlook, str(opened.location), console(), every)
    if outlook.obstacles:
        raise typer.Exit(2)


@app.command()
def run(
    sweep_file: SweepFile,
    address: Address = None,
    store: StoreLocation = "store",
    overrides: Overrides = None,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="CPU slots of the embedded cluster.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=0, help="GPUs of the embedded cluster; without it those it finds."),
    ] = None,
    takeover: Annotated[
        bool,
        typer.Option("--takeover", help="Take the run from a driver that seems to live."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a sweep, or resume it: what is in the store is not done again."""
    from orchestrator.execute import Place, execute

    sweep, opened, base, laid_out = _load(sweep_file, store, overrides)
    place = Place(address, cpus, gpus, takeover)
    result = execute(sweep, opened, base, laid_out, place=place, plain=as_json, console=console())
    if as_json:
        print_json(result.data)
    raise typer.Exit(result.status)


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
