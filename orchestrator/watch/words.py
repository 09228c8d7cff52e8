"""Times, names and lines of a log as a person reads them: one line each, no control characters."""

import re
from pathlib import Path

from rich.cells import cell_len, set_cell_size

from orchestrator.attempt_log import log_tail

ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])")
STAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


def one_line(text: object) -> str:
    """Text from a log, an exception or data: one line that cannot move the cursor or colour."""
    return " ".join(CONTROLS.sub(" ", ESCAPES.sub("", str(text))).split())


def last_line(log: str | Path) -> str:
    """The last line of a log file that says something, without its time; "" if there is none."""
    lines = log_tail(log).splitlines()
    said = (STAMP.sub("", one_line(line)) for line in reversed(lines))
    return next((line for line in said if line), "")


def span(seconds: float) -> str:
    """A measured time: `8 s`, `3 min 20 s`, `5 h 20 min`, `2 days 3 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _pair(whole, 60, "min", 1, "s")
    if whole < 48 * 3600:
        return _pair(whole, 3600, "h", 60, "min")
    return _pair(whole, 86400, "days", 3600, "h")


def about(seconds: float) -> str:
    """A guessed time, no finer than a guess is: `about 40 s`, `about 12 min`, `about 3 days`."""
    if seconds < 95:
        return f"about {max(10, round(seconds / 10) * 10)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} min"
    if seconds < 36 * 3600:
        return "about " + _pair(round(seconds / 600) * 600, 3600, "h", 60, "min")
    return f"about {round(seconds / 86400)} days"


def _pair(whole: int, large: int, large_name: str, small: int, small_name: str) -> str:
    first, rest = divmod(whole, large)
    second = rest // small
    return f"{first} {large_name}" + (f" {second} {small_name}" if second else "")


def shortened(text: str, width: int, gap: str = "…") -> str:
    """Text in at most `width` terminal cells; its end says most, so what goes lies before it."""
    if cell_len(text) <= width:
        return text
    if width <= len(gap) + 1:
        return set_cell_size(text, max(0, width))
    head = (width - len(gap)) // 3
    tail = width - len(gap) - head
    end = text[::-1]
    return set_cell_size(text, head) + gap + set_cell_size(end, tail)[::-1]


def clipped(text: str, width: int, gap: str = "…") -> str:
    """Text in at most `width` terminal cells, its end cut off."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(0, width - len(gap))).rstrip() + gap
