"""`damage`: what skipping every block does to the loss on target tokens, under one condition."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.config import DAMAGE_BATCH, DamageSettings
from workers.maps.damage import damage_map
from workers.maps.inputs import example_batches
from workers.stages import Context, Input
from workers.stages.map import mapped_model


def run(
    params: Mapping[str, Any], inputs: Mapping[str, Input], out: Path, context: Context
) -> dict[str, Any]:
    """Measure a damage map.

    Args:
        params: as a map's, with `settings` (`DamageSettings`).
        inputs: as a map's.
        out: receives the map.
        context: the process.

    Returns:
        Layers, samples, and the mean loss with every layer in place.
    """
    settings = DamageSettings.model_validate(params["settings"])
    with mapped_model(params, inputs, context, settings.samples) as (model, encoded):
        measured = damage_map(
            model.decoder,
            example_batches(model, encoded, context.relief.size(DAMAGE_BATCH)),
            settings.depths,
            context.progress,
            samples=len(encoded),
        )
    measured.save(out)
    assert measured.unpruned_loss is not None
    return {
        "layers": measured.layers,
        "samples": len(encoded),
        "unpruned_loss": round(float(measured.unpruned_loss.mean()), 4),
    }
