"""Gemma 3, the text model: Gemma 2's block with normed queries and keys instead of capped scores, five layers with a
window to each that sees all, and a RoPE of its own for each of the two kinds.

Paper: https://arxiv.org/abs/2503.19786. Weights: https://huggingface.co/google
"""

import math
from dataclasses import dataclass
from typing import Any

from torchft.models import gemma2
from torchft.models.config_json import field, one_of, optional, sizes, sizes_to_hub, windows, windows_to_hub
from torchft.models.config_rope import rope_from_hub, ropes_from_hub, section_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.mlp import GELU_TANH, GatedMLP
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import LinearRope, Rope


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(DecoderConfig):
    local_rope: Rope  # of layers with a window
    query_scale: float  # scores are multiplied by its inverse root
    attention_bias: bool = False
    logit_soft_cap: float | None = None


def _size(
    vocab_size: int, dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int, window: int,
    head_dim: int = 256, query_scale: float = 256.0, context: int = 131_072,
) -> Gemma3Config:  # fmt: skip
    rope = LinearRope(base=1_000_000.0, factor=8.0) if context == 131_072 else Rope(base=1_000_000.0)
    return Gemma3Config(
        vocab_size=vocab_size, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, hidden_dim=hidden_dim, max_seq_len=context, norm_eps=1e-6, tie_embeddings=True,
        rope=rope, local_rope=Rope(base=10_000.0), query_scale=query_scale,
        windows=tuple(window if (i + 1) % 6 else None for i in range(num_layers)),
    )  # fmt: skip


CONFIGS = {
    #                         vocab   dim layers heads kv hidden window
    "gemma-3-270m":   _size(262_144,  640, 18,  4,  1,  2_048,  512, context=32_768),
    "gemma-3-1b-pt":  _size(262_144, 1152, 26,  4,  1,  6_912,  512, context=32_768),
    "gemma-3-4b-pt":  _size(262_208, 2560, 34,  8,  4, 10_240, 1024),
    "gemma-3-12b-pt": _size(262_208, 3840, 48, 16,  8, 15_360, 1024),
    "gemma-3-27b-pt": _size(262_208, 5376, 62, 32, 16, 21_504, 1024, head_dim=128, query_scale=168.0),
}  # fmt: skip

HUB = gemma2.HUB


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Gemma3Config)
    attn = Attention(
        c.dim,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        q_norm=RMSNorm(c.head_dim, c.norm_eps, offset=1.0),
        k_norm=RMSNorm(c.head_dim, c.norm_eps, offset=1.0),
        scale=c.query_scale**-0.5,
    )
    return Block(
        attn,
        GatedMLP(c.dim, c.hidden_dim, act=GELU_TANH),
        attn_norm=RMSNorm(c.dim, c.norm_eps, offset=1.0),
        attn_post_norm=RMSNorm(c.dim, c.norm_eps, offset=1.0),
        mlp_norm=RMSNorm(c.dim, c.norm_eps, offset=1.0),
        mlp_post_norm=RMSNorm(c.dim, c.norm_eps, offset=1.0),
        rope=c.rope if c.window(i) is None else c.local_rope,
        sight=Sight(window=c.window(i)),
    )


def build(c: Gemma3Config) -> Decoder:
    norm = RMSNorm(c.dim, c.norm_eps, offset=1.0)
    return Decoder(c, block, norm, embed_scale=math.sqrt(c.dim), logit_soft_cap=c.logit_soft_cap)


def from_hub(json: dict[str, Any]) -> Gemma3Config:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Gemma 3 does not have."""
    one_of(json, "hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    every = field(json, "sliding_window_pattern", int, default=6)
    local = Rope(base=field(json, "rope_local_base_freq", float, default=10_000.0))
    full = Rope(base=1_000_000.0) if json.get("rope_parameters") else rope_from_hub(json, base=1_000_000.0)
    full, local = ropes_from_hub(json, full=full, sliding=local)
    return Gemma3Config(
        **sizes(json, tied=True, context=131_072, head_dim=256),
        rope=full,
        local_rope=local,
        windows=windows(json, lambda i: (i + 1) % every != 0, size=4096),
        attention_bias=field(json, "attention_bias", bool, default=False),
        query_scale=field(json, "query_pre_attn_scalar", float, default=256.0),
        logit_soft_cap=optional(json, "final_logit_softcapping", float),
    )


def to_hub(c: Gemma3Config) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "Gemma3ForCausalLM", "gemma3_text"),
        **windows_to_hub(c),
        "attention_bias": c.attention_bias,
        "query_pre_attn_scalar": c.query_scale,
        "final_logit_softcapping": c.logit_soft_cap,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            "full_attention": section_to_hub(c.rope),
            "sliding_attention": section_to_hub(c.local_rope),
        },
    }
