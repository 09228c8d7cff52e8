"""`heal`: remove a block from the base and repair what is left, in one of the healing modes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.base import load_decoder, note_removed, trained_speechllm
from workers.config import Block, HealSettings
from workers.examples import training_examples
from workers.speechllm import Part
from workers.stages import Context, Input
from workers.stages.curve import write_curve
from workers.surgery.cut import pruned
from workers.training import train

TRAINED: dict[str, set[Part]] = {
    "none": set(),
    "projector": {"projector"},
    "decoder": {"decoder"},
    "joint": {"decoder", "projector"},
}


def run(
    params: Mapping[str, Any], inputs: Mapping[str, Input], out: Path, context: Context
) -> dict[str, Any]:
    """Prune and heal.

    Args:
        params: `decoder`, `mode`, `block` (None: the unpruned control), and for every mode but
            `none` the `settings` (`HealSettings`), `seed` and `conditions`.
        inputs: `decoder`, `base`, and data and features as the conditions name them.
        out: receives projector and adapter of the pruned decoder (layers in their new numbers).
        context: the process.

    Returns:
        Figures of the training.
    """
    layers = Block.model_validate(params["block"]).layers if params["block"] else ()
    trainable = TRAINED[params["mode"]]
    base = Path(inputs["base"].path)
    summary: dict[str, Any] = {"removed": list(layers), "mode": params["mode"]}
    resident = load_decoder(inputs["decoder"], params["decoder"], context)
    with (
        trained_speechllm(base, resident) as model,
        pruned(model.decoder, layers),
    ):
        if trainable:
            report = train(
                model,
                training_examples(params["conditions"], inputs),
                HealSettings.model_validate(params["settings"]),
                seed=params["seed"],
                trainable=trainable,
                progress=context.step,
                checkpoints=context.checkpoints,
                relief=context.relief,
                ranks=context.ranks,
            )
            write_curve(report, out)
            summary |= {
                "steps": report.steps,
                "final_loss": report.losses[-1],
                "seconds": round(report.seconds, 2),
            }
        model.save_trained(out)
        note_removed(out, layers)
    return summary
