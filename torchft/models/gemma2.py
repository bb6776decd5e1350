"""Gemma 2: norms before and after each part with weight - 1 stored, capped scores and logits, a window in every other
layer, scaled embeddings, GELU.

Paper: https://arxiv.org/abs/2408.00118. Weights: https://huggingface.co/google
"""

import math
from dataclasses import dataclass
from typing import Any

from torchft.hub_names import HubNames
from torchft.models.config_json import field, one_of, optional, sizes, sizes_to_hub, windows, windows_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.mlp import GELU_TANH, GatedMLP
from torchft.modules.norms import RMSNorm


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(DecoderConfig):
    query_scale: float  # scores are multiplied by its inverse root
    attention_bias: bool = False
    score_soft_cap: float | None = 50.0
    logit_soft_cap: float | None = 30.0


def _size(
    dim: int, num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int, hidden_dim: int, query_scale: float
) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=256_000, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, hidden_dim=hidden_dim, max_seq_len=8192, norm_eps=1e-6, tie_embeddings=True,
        query_scale=query_scale, windows=tuple(None if i % 2 else 4096 for i in range(num_layers)),
    )  # fmt: skip


CONFIGS = {
    #                     dim layers heads kv head hidden  query
    "gemma-2-2b":  _size(2304, 26,  8,  4, 256,  9_216, 256.0),
    "gemma-2-9b":  _size(3584, 42, 16,  8, 256, 14_336, 256.0),
    "gemma-2-27b": _size(4608, 46, 32, 16, 128, 36_864, 144.0),
}  # fmt: skip

HUB = HubNames(
    {
        r"^(?!lm_head)": "model.",
        r"\.attn_norm\b": ".input_layernorm",
        r"\.attn_post_norm\b": ".post_attention_layernorm",
        r"\.mlp_norm\b": ".pre_feedforward_layernorm",
        r"\.mlp_post_norm\b": ".post_feedforward_layernorm",
    }
)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Gemma2Config)
    attn = Attention(
        c.dim,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        scale=c.query_scale**-0.5,
        soft_cap=c.score_soft_cap,
    )
    return Block(
        attn,
        GatedMLP(c.dim, c.hidden_dim, act=GELU_TANH),
        attn_norm=RMSNorm(c.dim, c.norm_eps, offset=1.0),
        attn_post_norm=RMSNorm(c.dim, c.norm_eps, offset=1.0),
        mlp_norm=RMSNorm(c.dim, c.norm_eps, offset=1.0),
        mlp_post_norm=RMSNorm(c.dim, c.norm_eps, offset=1.0),
        rope=c.rope,
        sight=Sight(window=c.window(i), soft_cap=c.score_soft_cap is not None),
    )


def build(c: Gemma2Config) -> Decoder:
    norm = RMSNorm(c.dim, c.norm_eps, offset=1.0)
    return Decoder(c, block, norm, embed_scale=math.sqrt(c.dim), logit_soft_cap=c.logit_soft_cap)


def from_hub(json: dict[str, Any]) -> Gemma2Config:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Gemma 2 does not have."""
    one_of(json, "hidden_act", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")  # not read by transformers
    one_of(json, "hidden_activation", "gelu_pytorch_tanh", None, default="gelu_pytorch_tanh")
    return Gemma2Config(
        **sizes(json, tied=True, context=8192, head_dim=256),
        rope=rope_from_hub(json),
        windows=windows(json, lambda i: i % 2 == 0, size=4096),
        attention_bias=field(json, "attention_bias", bool, default=False),
        query_scale=field(json, "query_pre_attn_scalar", float, default=256.0),
        score_soft_cap=optional(json, "attn_logit_softcapping", float, default=50.0),
        logit_soft_cap=optional(json, "final_logit_softcapping", float, default=30.0),
    )


def to_hub(c: Gemma2Config) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "Gemma2ForCausalLM", "gemma2"),
        **windows_to_hub(c),
        "attention_bias": c.attention_bias,
        "query_pre_attn_scalar": c.query_scale,
        "attn_logit_softcapping": c.score_soft_cap,
        "final_logit_softcapping": c.logit_soft_cap,
        "hidden_activation": "gelu_pytorch_tanh",
        **rope_to_hub(c.rope),
    }
