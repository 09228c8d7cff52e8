"""Model and data folders on disk, tiny and real, for commands that open what a user names."""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from tiny_speechllm import ENCODER_DIM, shake, tiny_config, tiny_decoder, tiny_tokenizer
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from workers.encoder import SpeechEncoder
from workers.speechllm import SpeechLLM

RATE = 16_000
SENTENCES = (
    "the red house", "the big dog runs", "blue car", "the small dog sleeps", "red car runs",
    "the house", "big blue house sleeps", "small car",
)  # fmt: skip


def tiny_encoder() -> SpeechEncoder:
    config = Wav2Vec2Config(
        hidden_size=ENCODER_DIM, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        conv_dim=[8] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Wav2Vec2Model(config)
    return SpeechEncoder(model, Wav2Vec2FeatureExtractor(return_attention_mask=True))


def save_causal_lm(folder: Path, family: str = "llama", layers: int = 4, **changes) -> Path:
    tiny_decoder(family, layers, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_speechllm(folder: Path, layers: int = 4) -> Path:
    decoder = tiny_decoder("llama", layers)
    model = SpeechLLM.create(decoder, tiny_tokenizer(), tiny_config(), 0, tiny_encoder())
    shake(model)
    model.save_pretrained(folder)
    return folder


def write_text(path: Path) -> Path:
    path.write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    return path


def write_manifest(path: Path, count: int = len(SENTENCES), **fields) -> Path:
    """Noise of different lengths, with English transcripts and German translations."""
    rng = np.random.default_rng(0)
    rows = []
    for number, text in enumerate(SENTENCES[:count]):
        name = f"{path.stem}-{number}.wav"
        wave = 0.1 * rng.standard_normal(RATE // 4 + 800 * number)
        soundfile.write(path.parent / name, wave, RATE)
        row = {"audio_filepath": name, "text": text, "lang": "en", "text_de": "das rote haus"}
        rows.append({**row, **fields})
    write_rows(path, rows)
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
