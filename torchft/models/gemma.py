"""Gemma 1: Llama's block with weight - 1 stored in norms, wide heads, scaled embeddings and GELU.

Paper: https://arxiv.org/abs/2403.08295. Weights: https://huggingface.co/google
"""

import math
from dataclasses import dataclass
from typing import Any

from torchft.models import llama3
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.mlp import GELU_TANH, GatedMLP
from torchft.modules.norms import RMSNorm


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(DecoderConfig):
    attention_bias: bool = False


def _size(dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int) -> GemmaConfig:
    return GemmaConfig(
        vocab_size=256_000, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=256, hidden_dim=hidden_dim, max_seq_len=8192, norm_eps=1e-6, tie_embeddings=True,
    )  # fmt: skip


CONFIGS = {
    #                  dim layers heads kv hidden
    "gemma-2b": _size(2048, 18,  8,  1, 16_384),
    "gemma-7b": _size(3072, 28, 16, 16, 24_576),
}  # fmt: skip

HUB = llama3.HUB


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, GemmaConfig)
    return Block(
        Attention(c.dim, c.num_heads, c.num_kv_heads, c.head_dim, bias=c.attention_bias, out_bias=c.attention_bias),
        GatedMLP(c.dim, c.hidden_dim, act=GELU_TANH),
        attn_norm=RMSNorm(c.dim, c.norm_eps, offset=1.0),
        mlp_norm=RMSNorm(c.dim, c.norm_eps, offset=1.0),
        rope=c.rope,
    )


def build(c: GemmaConfig) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps, offset=1.0), embed_scale=math.sqrt(c.dim))


def from_hub(json: dict[str, Any]) -> GemmaConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Gemma does not have."""
    for key in ("hidden_act", "hidden_activation"):  # "gelu" in the first releases means tanh's, which they trained
        one_of(json, key, "gelu_pytorch_tanh", "gelu", None, default=None)
    return GemmaConfig(
        **sizes(json, tied=True, context=8192, head_dim=256),
        rope=rope_from_hub(json),
        attention_bias=field(json, "attention_bias", bool, default=False),
    )


def to_hub(c: GemmaConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "GemmaForCausalLM", "gemma"),
        "attention_bias": c.attention_bias,
        "hidden_act": "gelu_pytorch_tanh",
        **rope_to_hub(c.rope),
    }
