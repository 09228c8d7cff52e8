"""Tiny multimodal models with random weights; encoder and decoder are equally deep."""

import torch
import transformers as hf
from tiny_decoders import LAYERS, tiny_text_config


def gemma3_multimodal():
    config = hf.Gemma3Config(
        text_config=tiny_text_config("gemma3").to_dict(),
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
        },
    )  # fmt: skip
    return seeded(hf.Gemma3ForConditionalGeneration, config)


def qwen2_audio():
    config = hf.Qwen2AudioConfig(
        text_config=tiny_text_config("qwen2").to_dict(),
        audio_config={
            "d_model": 16, "encoder_layers": LAYERS, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16, "num_mel_bins": 8, "max_source_positions": 20,
        },
    )  # fmt: skip
    return seeded(hf.Qwen2AudioForConditionalGeneration, config)


def voxtral():
    config = hf.VoxtralConfig(
        text_config=tiny_text_config("llama").to_dict(),
        audio_config={
            "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
            "intermediate_size": 64, "num_mel_bins": 8, "max_source_positions": 20,
            "vocab_size": 10,
        },
        audio_token_id=39,
    )  # fmt: skip
    return seeded(hf.VoxtralForConditionalGeneration, config)


def granite_speech():
    config = hf.GraniteSpeechConfig(
        text_config=tiny_text_config("granite").to_dict(),
        encoder_config={
            "input_dim": 8, "num_layers": LAYERS, "hidden_dim": 16, "num_heads": 2,
            "output_dim": 6, "context_size": 20, "max_pos_emb": 20, "feedforward_mult": 2,
            "conv_kernel_size": 3,
        },
        projector_config={
            "model_type": "blip_2_qformer", "hidden_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 16, "encoder_hidden_size": 16,
            "vocab_size": 10,
        },
        has_lora_adapter=False, audio_token_index=39, downsample_rate=2, window_size=4,
    )  # fmt: skip
    return seeded(hf.GraniteSpeechForConditionalGeneration, config)


RELEASED = {"qwen2_audio": qwen2_audio, "voxtral": voxtral, "granite_speech": granite_speech}


def seeded(kind, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()
