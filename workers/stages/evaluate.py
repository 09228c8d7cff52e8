"""`evaluate`: decode one test set and score it; every hypothesis is kept."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from workers.base import load_decoder, trained_speechllm
from workers.batches import Example
from workers.config import Condition, DecodeSettings
from workers.data import read_utterances
from workers.decoding import Hypothesis, greedy
from workers.examples import examples_of
from workers.features import Features
from workers.scoring import (
    character_errors,
    runaway,
    runaway_rate,
    score_asr,
    score_ast,
    word_errors,
)
from workers.stages import Context, Input


def run(
    params: Mapping[str, Any], inputs: Mapping[str, Input], out: Path, context: Context
) -> dict[str, Any]:
    """Decode and score.

    Args:
        params: `decoder`, `condition`, `split` and `settings` (`DecodeSettings`).
        inputs: `decoder`, `model` (an `adapt` or `heal` artefact), `data`, `features`.
        out: receives `hypotheses.parquet` and `scores.json`.
        context: the process.

    Returns:
        The scores by metric.
    """
    condition = Condition.model_validate(params["condition"])
    utterances = read_utterances(Path(inputs["data"].path), params["split"])
    examples = examples_of(utterances, condition, Features(Path(inputs["features"].path)))
    resident = load_decoder(inputs["decoder"], params["decoder"], context)
    settings = DecodeSettings.model_validate(params["settings"])
    fitting = settings.model_copy(update={"batch_size": context.relief.size(settings.batch_size)})
    with trained_speechllm(Path(inputs["model"].path), resident) as model:
        hypotheses = greedy(
            model,
            examples,
            fitting,
            checkpoints=context.checkpoints,
        )
    references = [example.target_text for example in examples]
    texts = [hypothesis.text for hypothesis in hypotheses]
    if condition.target_language is None:
        scores = score_asr(references, texts, condition.source_language)
    else:
        scores = score_ast(references, texts, condition.target_language)
    language = condition.target_language or condition.source_language
    table = hypothesis_table(examples, hypotheses, language)
    table.to_parquet(out / "hypotheses.parquet", index=False)
    found = {
        "scores": [dataclasses.asdict(score) for score in scores],
        "runaway_rate": runaway_rate(texts, [h.capped for h in hypotheses]),
    }
    (out / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
    return {score.metric: round(score.value, 3) for score in scores}


def hypothesis_table(
    examples: Sequence[Example], hypotheses: Sequence[Hypothesis], language: str
) -> pd.DataFrame:
    """One row per utterance: texts as they are, errors after normalisation, flags."""
    references = [example.target_text for example in examples]
    texts = [hypothesis.text for hypothesis in hypotheses]
    words = word_errors(references, texts, language)
    characters = character_errors(references, texts, language)
    return pd.DataFrame(
        {
            "id": [example.id for example in examples],
            "reference": references,
            "hypothesis": texts,
            "word_errors": [count.errors for count in words],
            "words": [count.reference_length for count in words],
            "character_errors": [count.errors for count in characters],
            "characters": [count.reference_length for count in characters],
            "seconds": [example.duration for example in examples],
            "tokens": [len(hypothesis.tokens) for hypothesis in hypotheses],
            "capped": [hypothesis.capped for hypothesis in hypotheses],
            "runaway": [runaway(h.text, h.capped) for h in hypotheses],
        }
    )
