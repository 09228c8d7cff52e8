"""Errors a user can mend. What the driver does about each class is the driver's business."""

from collections.abc import Iterable


class InvalidInput(Exception):
    """Bad input, configuration or data: trying again cannot help.

    Args:
        problem: what is wrong, in one sentence.
        where: the dotted path in the sweep file, or a file and line.
        remedy: what the user can do about it.
    """

    def __init__(self, problem: str, where: str = "", remedy: str = "") -> None:
        super().__init__(problem, where, remedy)
        self.problem, self.where, self.remedy = problem, where, remedy

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        mend = f" ({self.remedy})" if self.remedy else ""
        return f"{place}{self.problem}{mend}"


class NotFinite(InvalidInput):
    """A loss, a distance or a weight became NaN or infinite; names the step, layer or sample."""


class Stopped(Exception):
    """Asked to stop: what is needed to go on is kept, and nothing was committed."""


def refuse_missing(weights: Iterable[object], where: str) -> None:
    """Refuses a model that was opened without some of its weights: they are random then.

    Args:
        weights: names that the files lack.
        where: the model.

    Raises:
        InvalidInput: there are any.
    """
    missing = sorted(map(str, weights))
    if missing:
        raise InvalidInput(
            f"{len(missing)} weights are missing, such as {missing[0]}", where, "repair the file"
        )


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
