"""Judging the cheap criteria: does a map rank blocks as their damage does?

Damage is what skipping a block really costs, before healing; it needs a run of every block. A
criterion that ranks like it, and whose choice costs no more, can stand for it.
"""

import numpy as np
import pandas as pd

from orchestrator.consensus import mean_rank_correlation
from workers.maps.redundancy import RedundancyMap

VALIDATION = [
    "criterion", "pool", "depth", "spearman", "spearman_without_layer_0", "start", "best_start",
    "regret", "regret_ci_low", "regret_ci_high", "samples",
]  # fmt: skip
RESAMPLES = 1000
PAIR = np.array([0]), np.array([1])
"""Rows of distances that are correlated: the criterion's and damage's."""


def validate(measured: RedundancyMap, damage: RedundancyMap, seed: int = 0) -> pd.DataFrame:
    """Holds every criterion and pool of a map against damage, depth by depth.

    Args:
        measured: the map of the cheap criteria.
        damage: the damage map of the same condition; its utterances may be fewer.
        seed: of the bootstrap.

    Returns:
        Columns of `VALIDATION`, for every depth that has damage and a layer left:

        - `spearman`: rank correlation over starts of distance and mean damage; null with fewer than
          three starts, `spearman_without_layer_0` the same without the block that begins there;
        - `start`, `best_start`: what the criterion would remove, and what does the least damage;
        - `regret`: damage at `start` minus damage at `best_start`, in nats per target token, with
          a 95 % interval (paired bootstrap over the damage's utterances);
        - `samples`: those utterances.
    """
    table = damage.table()
    depths = sorted(set(table.loc[table["depth"] < damage.layers, "depth"]))
    values = damage.measures[next(iter(damage.measures))].rows.astype(np.float64)
    count = len(values)
    draws = np.random.default_rng(seed).multinomial(
        count, np.full(count, 1 / count), size=RESAMPLES
    )
    rows: list[tuple[object, ...]] = []
    for measure in measured.measures:
        for depth in depths:
            columns = [i for i, (_, n) in enumerate(damage.blocks) if n == depth]
            lost = values[:, columns]
            means = lost.mean(axis=0)
            distances = measured.distances(depth, measure.pool, measure.criterion)
            start, best = int(distances.argmin()), int(means.argmin())
            drawn = draws @ (lost[:, start] - lost[:, best]) / count
            low, high = np.percentile(drawn, [2.5, 97.5])
            both = np.stack([distances, means])
            ranks = [mean_rank_correlation(part, *PAIR) for part in (both, both[:, 1:])]
            rows.append(
                (
                    *measure, depth, *ranks, start, best, float(means[start] - means[best]), float(low), float(high), count,
                )
            )  # fmt: skip
    floats = dict.fromkeys(["spearman", "spearman_without_layer_0"], "float64")
    return pd.DataFrame(rows, columns=VALIDATION).astype(floats)
