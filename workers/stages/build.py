"""`build`: a small decoder, encoder or data set made on the spot, from a `lab:` name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from workers.lab.catalogue import CATALOGUE
from workers.stages import Context, Input


def run(
    params: Mapping[str, Any], inputs: Mapping[str, Input], out: Path, context: Context
) -> dict[str, Any]:
    """Make what `params["name"]` stands for.

    Args:
        params: `name` (a `lab:` name), `seed`, and `language` for data.
        inputs: for encoders, the speech data by language.
        out: the folder to fill.
        context: the process.

    Returns:
        Figures of the build, such as held-out accuracy.
    """
    item, seed = CATALOGUE[params["name"]], params["seed"]
    torch.manual_seed(seed)
    if item.role == "data":
        from workers.lab.speech import build_speech

        return build_speech(params["language"], item.size, seed, out, context.progress)
    if item.role == "decoder":
        from workers.lab.decoders import Family, build_decoder

        family = cast(Family, item.kind)
        return build_decoder(family, item.size, seed, out, context.progress)
    from workers.lab.encoders import Kind, build_encoder

    speech = {language: Path(data.path) for language, data in inputs.items()}
    return build_encoder(cast(Kind, item.kind), item.size, seed, speech, out, context.progress)
