"""Model folders as people have them, and what a model without some layers should say."""

import torch
from safetensors.torch import load_file
from tiny_decoders import token_ids
from tiny_speechllm import tiny_tokenizer

from workers.surgery.decoder_parts import decoder_layers


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def skipping(model, layers) -> torch.Tensor:
    """Logits with layers made the identity, the model otherwise untouched."""

    def skip(module, args, kwargs, output):
        del module, output
        return args[0] if args else kwargs["hidden_states"]

    handles = [
        decoder_layers(model)[i].register_forward_hook(skip, with_kwargs=True) for i in layers
    ]
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


def saved(model, folder, shards="40KB"):
    """Several weight files, a tokenizer beside them."""
    model.save_pretrained(folder, max_shard_size=shards)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tensors(folder) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
