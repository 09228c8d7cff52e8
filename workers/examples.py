"""From data and encoder features to the examples a SpeechLLM learns from or is tested on."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from workers.batches import Example
from workers.config import Condition
from workers.data import read_utterances, target_text
from workers.features import Features
from workers.manifest import Utterance
from workers.stages import Input


def example_of(utterance: Utterance, condition: Condition, frames: Tensor | None) -> Example:
    """One utterance under one condition; `frames` `[time, encoder_dim]`, None for its transcript."""
    return Example(
        id=utterance.id,
        condition=condition,
        frames=frames,
        source_text=utterance.text,
        target_text=target_text(utterance, condition),
        duration=utterance.duration or 0.0,
        words=utterance.words,
    )


def examples_of(
    utterances: Sequence[Utterance], condition: Condition, features: Features | None
) -> list[Example]:
    """Examples of one condition.

    Args:
        utterances: clips with their texts.
        condition: what is asked of them.
        features: encoder output by utterance id; None for text in place of speech.
    """
    examples = []
    for utterance in utterances:
        if features is None:
            examples.append(example_of(utterance, condition, None))
            continue
        example = example_of(utterance, condition, features[utterance.id])
        if utterance.duration is None:
            example = dataclasses.replace(example, duration=features.seconds(utterance.id))
        examples.append(example)
    return examples


def training_examples(
    conditions: Sequence[Mapping[str, Any]], inputs: Mapping[str, Input]
) -> list[Example]:
    """The training examples of several conditions, in their order.

    Args:
        conditions: fields of `Condition`, and `data`, `features` (roles in `inputs`) and `split`.
        inputs: data and features by role.
    """
    examples: list[Example] = []
    utterances: dict[str, list[Utterance]] = {}
    features: dict[str, Features] = {}
    for entry in conditions:
        data = entry["data"]
        if data not in utterances:
            utterances[data] = read_utterances(Path(inputs[data].path), entry["split"])
            features[data] = Features(Path(inputs[entry["features"]].path))
        condition = Condition(
            task=entry["task"],
            source_language=entry["source_language"],
            target_language=entry["target_language"],
        )
        examples.extend(examples_of(utterances[data], condition, features[data]))
    return examples
