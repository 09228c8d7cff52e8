"""Selectors: from maps (or from none) to the block that is removed."""

import random
from collections.abc import Sequence

import pandas as pd

from orchestrator.consensus import shared_start
from orchestrator.graph import Choice


def choose_start(choice: Choice, maps: Sequence[pd.DataFrame]) -> int:
    """First layer of the block a selector chooses.

    Args:
        choice: selector, criterion, depth, pool and layers.
        maps: the map tables of `choice.maps`, in order.

    Returns:
        `own` and `consensus`: the start with the smallest largest regret over the maps (for one map
        its best block); `last`: the last `depth` layers; `random`: the same draw for every
        condition at a seed and depth; `fixed`: as given.
    """
    match choice.selector:
        case "own" | "consensus":
            return shared_start(maps, choice.depth, choice.pool, choice.criterion)
        case "last":
            return choice.layers - choice.depth
        case "random":
            draw = random.Random(f"{choice.seed}/{choice.depth}/{choice.layers}")
            return draw.randint(0, choice.layers - choice.depth)
        case "fixed":
            assert choice.start is not None
            return choice.start
    raise ValueError(choice.selector)
