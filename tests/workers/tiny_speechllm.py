"""Small real SpeechLLMs with random weights, and examples for them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from workers.batches import Example
from workers.config import Condition, LoraSettings, ProjectorConfig
from workers.speechllm import SpeechLLM, SpeechLLMConfig

WORDS = [
    "the", "red", "blue", "house", "car", "dog", "runs", "sleeps", "big", "small", "das", "rote",
    "haus", "hund", "gross", "klein",
]  # fmt: skip
PROMPT_WORDS = [
    "Transcribe", "Translate", "English", "German", "French", "to", ":", "Text", "user", "assistant",
]  # fmt: skip
ENCODER_DIM = 6
ASR = Condition(task="asr", source_language="en")
AST = Condition(task="ast", source_language="de", target_language="en")


def tiny_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {w: i for i, w in enumerate([*special, *PROMPT_WORDS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        unk_token="<unk>",
    )


def tiny_decoder(family: str = "llama", layers: int = 3, seed: int = 0, **changes):
    shape = {
        "vocab_size": 4 + len(PROMPT_WORDS) + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**shape)).eval()
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def tiny_config(**changes) -> SpeechLLMConfig:
    return SpeechLLMConfig(
        encoder_dim=ENCODER_DIM,
        **{
            "projector": ProjectorConfig(stack=2, hidden=16),
            "lora": LoraSettings(rank=4, alpha=8.0),
            **changes,
        },
    )


def tiny_speechllm(
    family: str = "llama",
    layers: int = 3,
    *,
    bos: bool = True,
    seed: int = 0,
    decoder: dict | None = None,
    **changes,
) -> SpeechLLM:
    plain = tiny_decoder(family, layers, seed, **(decoder or {}))
    return SpeechLLM.create(plain, tiny_tokenizer(bos=bos), tiny_config(**changes), seed)


def shake(model: SpeechLLM, seed: int = 1, size: float = 0.1) -> None:
    """Moves adapter and projector away from where they began, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in ("decoder", "projector"):
            for parameter in model.parameters_of(part):
                parameter += size * torch.randn(parameter.shape, generator=generator)


def tiny_examples(count: int = 8, seed: int = 0) -> list[Example]:
    """Utterances of different lengths under two conditions; a word's frames look alike."""
    generator = torch.Generator().manual_seed(seed)
    looks = torch.randn(len(WORDS), ENCODER_DIM, generator=generator)
    examples = []
    for i in range(count):
        number = 2 + int(torch.randint(0, 5, (), generator=generator))
        chosen = torch.randint(0, len(WORDS), (number,), generator=generator).tolist()
        frames = looks[chosen].repeat_interleave(4, dim=0)
        noise = 0.1 * torch.randn(frames.shape, generator=generator)
        text = " ".join(WORDS[c] for c in chosen)
        condition = ASR if i % 2 == 0 else AST
        examples.append(
            Example(
                id=f"u{i}",
                condition=condition,
                frames=frames + noise,
                source_text=text,
                target_text=text if condition is ASR else " ".join(reversed(text.split())),
                duration=0.2 * number,
                words=tuple((WORDS[c], 0.2 * k, 0.2 * (k + 1)) for k, c in enumerate(chosen)),
            )
        )
    return examples
