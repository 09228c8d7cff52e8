"""What the commands share: the application, options that mean the same everywhere, and printing."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    name="layersweep",
    help="How much of a SpeechLLM's decoder do you need? Plan, run and read pruning sweeps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SweepFile = Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep file (YAML).")]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's name (or its folder), as in runs/RUN.")
]
StoreLocation = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="PLACE",
        help="Where artefacts are kept: a folder, or s3://bucket/prefix.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Change one setting of the sweep; repeatable."),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster: auto or host:port; without it Ray starts on this machine."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
ModelReference = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model: a local folder (what it may hold: the docs) or a hub id."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub repository.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model repository's own code run.")
]


def console() -> Console:
    """Where people read: folded to the terminal, and never folded in a pipe."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def error_console() -> Console:
    """Where progress and warnings go, so that standard output holds results alone."""
    return Console(highlight=False, stderr=True)


def quiet_libraries() -> None:
    """Keeps the model libraries' own bars and hints off the terminal; errors still show."""
    import warnings

    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        disable_progress_bars()


def print_json(data: Any) -> None:
    """Plain data for programs, on standard output."""
    print(json.dumps(data, indent=1, ensure_ascii=False))
