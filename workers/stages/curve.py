"""The loss curve of a training stage, kept beside its weights."""

from pathlib import Path

import pandas as pd

from workers.training import TrainReport


def write_curve(report: TrainReport, out: Path) -> None:
    """Write `curve.parquet`: step, loss, gradient norm before clipping."""
    pd.DataFrame(
        {
            "step": range(1, report.steps + 1),
            "loss": report.losses,
            "grad_norm": report.grad_norms,
        }
    ).to_parquet(out / "curve.parquet", index=False)
