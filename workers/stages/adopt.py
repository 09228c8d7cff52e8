"""`adopt`: a released SpeechLLM as it is, with a fresh adapter: the base, without any training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.base import load_decoder
from workers.config import Condition, LoraSettings, PromptSettings
from workers.stages import Context, Input


def run(
    params: Mapping[str, Any], inputs: Mapping[str, Input], out: Path, context: Context
) -> dict[str, Any]:
    """Take a released SpeechLLM over.

    Args:
        params: `decoder`, `prompts`, `conditions` (fields of `Condition`), `lora`
            (`LoraSettings`) and `seed`.
        inputs: `decoder`, the released model.
        out: receives its projector, an adapter that changes nothing yet, and its prompts.
        context: the process.

    Returns:
        The width of its frames, and frames and embeddings per window of its projector.
    """
    resident = load_decoder(inputs["decoder"], params["decoder"], context)
    released = resident.released
    assert released is not None
    resident.release()
    resident.model = released.speechllm(
        [Condition.model_validate(condition) for condition in params["conditions"]],
        PromptSettings.model_validate(params["prompts"]),
        LoraSettings.model_validate(params["lora"]),
        params["seed"],
    )
    resident.model.save_trained(out)
    projector = resident.model.projector
    return {
        "frame_dim": resident.model.config.encoder_dim,
        "window": projector.stack,
        "per_window": projector.per_window,
    }
