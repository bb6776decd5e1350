"""Tiny random checkpoints in the Hub's format, made by transformers."""

import json

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from torchft import models

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "pad_token_id": None,  # transformers gives a padding token's embedding no gradient
}


def rope(kind="default", base=10_000.0, **more):
    return {"rope_type": kind, "rope_theta": base, **more}


# Scaled from 64 positions on, so that 100 tokens see kept, blended and stretched waves.
LLAMA3_ROPE = rope(
    "llama3", 500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


def random_(theirs, std=0.2):
    """Random weights for a model of transformers, large enough that a mistake shows in every logit."""
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        base = p.detach() if "norm" in name else 0.0  # some families store norms around 1, some around 0
        p.data.copy_(base + std * torch.randn(p.shape))
    for name, buffer in theirs.named_buffers():
        if name in theirs.state_dict():  # Gemma 4's layer_scalar
            buffer.add_(std * torch.randn(buffer.shape))
    return theirs.eval()


def transformers_model(architectures, *, std=0.2, **changes):
    """transformers' model of this architecture, of ``SIZES`` and with random weights."""
    cls = getattr(transformers, architectures[0])
    config = cls.config_class(**(SIZES | changes))
    config._attn_implementation = "eager"
    return random_(cls(config), std)


def llama(*, dtype=torch.float32, std=0.2, **changes):
    """transformers' Llama with random weights."""
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | changes), attn_implementation="eager"))
    return random_(model, std).to(dtype)


def decoder(**changes):
    """Our Llama with such weights, in training mode."""
    torch.manual_seed(0)
    model = models.build(SIZES | {"architectures": ["LlamaForCausalLM"]} | changes, device="cpu")
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def checkpoint(folder, *, max_shard_size="5GB", **changes):
    """Save a random Llama in ``folder``; returns transformers' model."""
    model = llama(**changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def edit_config(folder, *remove, **changes):
    """Change fields of a folder's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def tokens(rows=2, length=100, vocab_size=101, seed=0):
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
