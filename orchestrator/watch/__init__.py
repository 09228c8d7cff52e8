"""What a person sees of a run while it runs: a live table on a terminal, plain lines elsewhere.

`board` knows how far each cell is, `table` draws that, `live` and `plain` listen to the driver.
What a run folder tells afterwards is in `orchestrator.status`.
"""

import contextlib
from collections.abc import Iterator

from rich.console import Console

from orchestrator.graph import Plan
from orchestrator.watch.live import LiveWatch
from orchestrator.watch.plain import PlainWatch, QuietWatch

__all__ = ["LiveWatch", "PlainWatch", "QuietWatch", "watching"]


@contextlib.contextmanager
def watching(
    console: Console, plan: Plan, quiet: bool = False
) -> Iterator[PlainWatch | QuietWatch]:
    """The watch that suits where the output goes.

    Args:
        console: where to.
        plan: what is run.
        quiet: whether to say nothing.
    """
    if quiet:
        yield QuietWatch()
    elif console.is_terminal and not console.is_dumb_terminal:
        with LiveWatch(console, plan) as live:
            yield live
    else:
        yield PlainWatch(console, plan)
