"""Small released SpeechLLMs with random weights, as real folders with real processors."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from peft import LoraConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from workers.config import Condition
from workers.released.parts import released_class
from workers.released.processor import open_processor

LAYERS = 4
RATE = 16000
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
TOWER = {
    "d_model": 16,
    "hidden_size": 16,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "encoder_layers": 2,
    "num_mel_bins": 8,
    "max_source_positions": 100,
    "initializer_range": 0.2,
}
MISTRAL_TEMPLATE = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST]{% for c in m['content'] %}"
    "{% if c['type'] == 'audio' %}[BEGIN_AUDIO][AUDIO]{% elif c['type'] == 'text' %}{{ c['text'] }}"
    "{% endif %}{% endfor %}[/INST]{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
GRANITE_TEMPLATE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] "
    "+ '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
TAGS_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'audio' %}AUDIO"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(special: list[str], **roles: str) -> PreTrainedTokenizerFast:
    """Every byte a token, after the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def qwen2_audio(folder: Path, **changes) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]  # fmt: skip
    tokenizer = tiny_tokenizer(special, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    config = hf.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **TOWER},
        text_config=text_config("qwen2", tokenizer, eos=None),
        audio_token_index=3,
        **changes,
    )
    save(hf.Qwen2AudioForConditionalGeneration, config, folder, eos=[0, 2])
    extractor = hf.WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    hf.Qwen2AudioProcessor(extractor, tokenizer).save_pretrained(folder)


def voxtral(folder: Path) -> None:
    """Its processor demands chunks of 30 s and the audio token 24."""
    filler = [f"<SPECIAL_{i}>" for i in range(18)]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[BEGIN_AUDIO]", *filler, "[AUDIO]"]
    tokenizer = tiny_tokenizer(special, bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    tokenizer.chat_template = MISTRAL_TEMPLATE
    tower = {
        "hidden_size": 8,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_mel_bins": 8,
        "initializer_range": 0.2,
    }
    config = hf.VoxtralConfig(
        audio_config={"model_type": "voxtral_encoder", **tower},
        text_config={**text_config("llama", tokenizer, eos=2), "head_dim": 8},
        audio_token_id=24,
    )
    save(hf.VoxtralForConditionalGeneration, config, folder, eos=2)
    tokenizer.save_pretrained(folder)
    hf.WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)


def granite_speech(folder: Path, *, adapter: bool = False, **changes) -> None:
    special = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|audio|>"]
    tokenizer = tiny_tokenizer(special, eos_token="<|end_of_text|>", pad_token="<|end_of_text|>")
    tokenizer.chat_template = GRANITE_TEMPLATE
    text = text_config("granite", tokenizer, eos=0)
    text |= {"embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_scaling": 4.0}
    text |= {"tie_word_embeddings": True}
    config = hf.GraniteSpeechConfig(
        text_config=text,
        encoder_config={
            "input_dim": 16, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "output_dim": 6,
            "context_size": 20, "max_pos_emb": 32, "conv_kernel_size": 3, "feedforward_mult": 2,
        },
        projector_config={
            "model_type": "blip_2_qformer", "hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 24, "encoder_hidden_size": 16,
            "cross_attention_frequency": 1,
        },
        audio_token_index=3,
        has_lora_adapter=adapter,
        **{"downsample_rate": 5, "window_size": 15, **changes},
    )  # fmt: skip
    save(hf.GraniteSpeechForConditionalGeneration, config, folder, eos=0, adapter=adapter)
    tokenizer.save_pretrained(folder)
    # Written out, as the class itself cannot be made without torchaudio.
    extractor = {"feature_extractor_type": "GraniteSpeechFeatureExtractor", "n_mels": 8,
                 "sampling_rate": RATE, "processor_class": "GraniteSpeechProcessor"}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor))


def granite_speech_with_adapter(folder: Path) -> None:
    granite_speech(folder, adapter=True)


def audioflamingo3(folder: Path) -> None:
    tagged(folder, hf.AudioFlamingo3ForConditionalGeneration, hf.AudioFlamingo3Config,
           hf.AudioFlamingo3Processor, {"model_type": "audioflamingo3_encoder", **TOWER})  # fmt: skip


def glmasr(folder: Path) -> None:
    tower = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_mel_bins": 8,
    }  # fmt: skip
    tagged(folder, hf.GlmAsrForConditionalGeneration, hf.GlmAsrConfig, hf.GlmAsrProcessor,
           {"model_type": "glmasr_encoder", **tower}, audio="<|pad|>")  # fmt: skip


def qwen3_asr(folder: Path) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_pad|>", "<|audio_start|>",
               "<|audio_end|>", "<asr_text>"]  # fmt: skip
    named = {
        "audio_token": special[3],
        "audio_bos_token": special[4],
        "audio_eos_token": special[5],
    }
    tokenizer = tiny_tokenizer(
        special, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named
    )
    tower = {
        "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
        "num_mel_bins": 8, "downsample_hidden_size": 4, "output_dim": 32,
    }  # fmt: skip
    config = hf.Qwen3ASRConfig(
        audio_config={"model_type": "qwen3_asr_encoder", **tower},
        text_config={**text_config("qwen3", tokenizer, eos=2), "head_dim": 8},
        audio_token_id=3,
        eos_token_id=2,
        pad_token_id=0,
    )
    save(hf.Qwen3ASRForConditionalGeneration, config, folder, eos=2)
    template = TAGS_TEMPLATE.replace("AUDIO", "<|audio_start|><|audio_pad|><|audio_end|>")
    extractor = hf.Qwen3ASRFeatureExtractor(feature_size=8)
    hf.Qwen3ASRProcessor(extractor, tokenizer, chat_template=template).save_pretrained(folder)


def tagged(folder, model, config, processor, tower, *, audio="<sound>") -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", audio]
    tokenizer = tiny_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    described = config(
        audio_config=tower, text_config=text_config("qwen2", tokenizer, eos=2), audio_token_id=3
    )
    save(model, described, folder, eos=2)
    extractor = hf.WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    template = TAGS_TEMPLATE.replace("AUDIO", audio)
    processor(extractor, tokenizer, chat_template=template).save_pretrained(folder)


def text_config(kind: str, tokenizer: PreTrainedTokenizerFast, eos) -> dict:
    return {
        "model_type": kind,
        "vocab_size": len(tokenizer),
        "eos_token_id": eos,
        "bos_token_id": None,
        "pad_token_id": 0,
        **TEXT,
    }


def save(kind, config, folder: Path, *, eos, adapter: bool = False) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
        model.generation_config = hf.GenerationConfig(
            eos_token_id=eos, pad_token_id=0, do_sample=False
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Tower and projector speak up: with weights of .02 all audio would sound alike. The
                # embedding of padding begins as zeros, and Granite's chats are full of that token.
                if "embed_tokens" in name or not ("language_model" in name or "lm_head" in name):
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        model.save_pretrained(str(folder))
        if adapter:
            model.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=r".*language_model.*(q|v)_proj"))  # fmt: skip
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.5)
            # The class's own way would put peft's names into the base's weights, too.
            hf.PreTrainedModel.save_pretrained(model, str(folder))


MAIN = {"qwen2-audio": qwen2_audio, "voxtral": voxtral, "granite-speech": granite_speech}
FAMILIES = {
    **MAIN,
    "granite-speech-lora": granite_speech_with_adapter,
    "audioflamingo3": audioflamingo3,
    "glmasr": glmasr,
    "qwen3-asr": qwen3_asr,
}


def voice(seconds: float, seed: int = 0) -> np.ndarray:
    """Something that changes over time, as speech does."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    pitch = 120 + 60 * np.sin(2 * np.pi * (0.7 + 0.1 * seed) * t)
    tone = np.sin(2 * np.pi * np.cumsum(pitch) / RATE) * np.sin(2 * np.pi * 2.3 * t)
    return (0.3 * tone + 0.02 * rng.normal(size=len(t))).astype(np.float32)


ASR = Condition(task="asr", source_language="en")
CLIPS = {"a": voice(0.6), "b": voice(1.73, 1), "c": voice(0.94, 2)}
TEXTS = {"a": "the red house", "b": "a dog", "c": "it sleeps"}


def made_when_asked_for(tmp_path_factory) -> Callable[[str], Path]:
    """One folder a family, made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            FAMILIES[family](made[family])
        return made[family]

    return folder


def original(folder):
    """The model and its processor, as a user of transformers has them."""
    config = hf.AutoConfig.from_pretrained(folder)
    model = released_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    return model, open_processor(str(folder))


def original_inputs(processor, prompt, waveform, answer=()):
    """What the processor gives for a prompt (with `{audio}` in it) and a waveform."""
    text = prompt.replace("{audio}", processor.audio_token)
    if hasattr(processor, "_retrieve_input_features"):  # Voxtral: chunks of 30 s, 375 tokens each
        settings = dict(processor.audio_kwargs)
        positions = settings.pop("max_source_positions")
        features = processor._retrieve_input_features([waveform], positions, **settings)
        text = text.replace(processor.audio_token, processor.audio_token * 375 * len(features))
        ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        inputs = {**ids, "input_features": features}
    else:
        inputs = dict(processor(text=[text], audio=[waveform], return_tensors="pt"))
    answer = torch.tensor([list(answer)], dtype=torch.long)
    inputs["input_ids"] = torch.cat([torch.as_tensor(inputs["input_ids"]), answer], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
