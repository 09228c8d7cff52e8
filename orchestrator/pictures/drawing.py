"""What all pictures share: style, file formats, and bytes that depend on the data alone.

matplotlib is imported when something is drawn, and without pyplot: no window system, no global
state.
"""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from workers.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rest = ParamSpec("Rest")
SUFFIXES = (".png", ".svg", ".pdf")
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 10.5, "axes.labelsize": 10,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "figure.titlesize": 12,
    "savefig.dpi": 150, "svg.hashsalt": "layersweep", "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}  # fmt: skip


def styled(draw: Callable[Rest, Path]) -> Callable[Rest, Path]:
    """Draw with our fonts and sizes, and leave matplotlib's settings as they were."""

    @functools.wraps(draw)
    def drawn(*args: Rest.args, **kwargs: Rest.kwargs) -> Path:
        from matplotlib import rc_context

        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def check_picture(out: Path) -> None:
    """Refuse a file that could not be drawn to, before any work is done.

    Raises:
        InvalidInput: a suffix that is none of `SUFFIXES`, or no folder to put it into.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise InvalidInput(
            f"no picture is called {out.name!r}", str(out), f"end it in {', '.join(SUFFIXES)}"
        )
    if not out.parent.is_dir():
        raise InvalidInput("no such folder", str(out.parent), "make it first")


def new_figure(size: tuple[float, float], title: str) -> "Figure":
    """An empty figure of a size in inches whose parts find their places by themselves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    if title:
        figure.suptitle(title)
    return figure


def whole_ticks(axis: Any) -> None:
    """Layers are counted: no tick between two of them."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def save(figure: "Figure", out: Path) -> Path:
    """Write a figure, without a date or a version in it.

    Raises:
        InvalidInput: the file cannot be written.
    """
    kind = out.suffix.lower()[1:]
    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, metadata=undated[kind])
    try:
        out.write_bytes(drawn.getvalue())
    except OSError as error:
        raise InvalidInput(f"cannot be written: {error.strerror}", str(out)) from error
    return out
