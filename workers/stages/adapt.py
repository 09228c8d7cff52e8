"""`adapt`: train projector and LoRA on the unpruned decoder, which gives the base SpeechLLM."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.alignment import align_projector
from workers.base import load_decoder, untrained_speechllm
from workers.config import AdaptSettings, ProjectorConfig, PromptSettings
from workers.examples import training_examples
from workers.features import Features
from workers.speechllm import SpeechLLMConfig
from workers.stages import Context, Input
from workers.stages.curve import write_curve
from workers.training import resumable, train

ALIGNMENT_SHARE = 0.1
"""Part of the progress bar that the projector's warm-up gets."""


def run(
    params: Mapping[str, Any], inputs: Mapping[str, Input], out: Path, context: Context
) -> dict[str, Any]:
    """Adapt a decoder to speech.

    Args:
        params: `decoder`, `projector`, `prompts`, `settings` (`AdaptSettings`) and `conditions`.
        inputs: `decoder`, and data and features as the conditions name them.
        out: receives the projector, the adapter and the loss curve.
        context: the process.

    Returns:
        Figures of the training.
    """
    settings = AdaptSettings.model_validate(params["settings"])
    resident = load_decoder(inputs["decoder"], params["decoder"], context)
    examples = training_examples(params["conditions"], inputs)
    first = params["conditions"][0]["features"]
    config = SpeechLLMConfig(
        encoder_dim=Features(Path(inputs[first].path)).dim,
        projector=ProjectorConfig.model_validate(params["projector"]),
        lora=settings.lora,
        prompts=PromptSettings.model_validate(params["prompts"]),
    )
    with untrained_speechllm(resident, config, settings.seed) as model:
        # A checkpoint holds a projector that was aligned before.
        if settings.alignment_steps and not resumable(model, context.checkpoints, context.ranks):
            align_projector(
                model,
                examples,
                steps=settings.alignment_steps,
                lr=settings.alignment_lr,
                batch_size=settings.batch_size,
                seed=settings.seed,
            )
            context.progress(ALIGNMENT_SHARE, "projector aligned to words")
        report = train(
            model,
            examples,
            settings,
            seed=settings.seed,
            trainable={"projector", "decoder"},
            progress=context.step,
            checkpoints=context.checkpoints,
            relief=context.relief,
            ranks=context.ranks,
        )
        model.save_trained(out)
    write_curve(report, out)
    return {
        "examples": len(examples),
        "steps": report.steps,
        "final_loss": report.losses[-1],
        "seconds": round(report.seconds, 2),
    }
