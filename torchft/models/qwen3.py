"""Qwen 3 (dense) and its 2507 releases: Llama's block with normed queries and keys, and heads wider than dim / heads.

Paper: https://arxiv.org/abs/2505.09388. Weights: https://huggingface.co/Qwen
"""

from dataclasses import dataclass
from typing import Any

from torchft.models import llama3
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub, windows_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.models.qwen2 import optional_windows
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.mlp import GatedMLP
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    attention_bias: bool = False


def _size(
    dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int, context: int, base: float, tied: bool
) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=128, hidden_dim=hidden_dim, max_seq_len=context, norm_eps=1e-6, rope=Rope(base=base),
        tie_embeddings=tied,
    )  # fmt: skip


CONFIGS = {
    #                             dim layers heads kv hidden context   base  tied
    "Qwen3-0.6B-Base":     _size(1024, 28, 16, 8,  3_072,  32_768, 1e6, True),
    "Qwen3-1.7B-Base":     _size(2048, 28, 16, 8,  6_144,  32_768, 1e6, True),
    "Qwen3-4B-Base":       _size(2560, 36, 32, 8,  9_728,  32_768, 1e6, True),
    "Qwen3-8B-Base":       _size(4096, 36, 32, 8, 12_288,  32_768, 1e6, False),
    "Qwen3-14B-Base":      _size(5120, 40, 40, 8, 17_408,  32_768, 1e6, False),
    "Qwen3-0.6B":          _size(1024, 28, 16, 8,  3_072,  40_960, 1e6, True),
    "Qwen3-1.7B":          _size(2048, 28, 16, 8,  6_144,  40_960, 1e6, True),
    "Qwen3-4B":            _size(2560, 36, 32, 8,  9_728,  40_960, 1e6, True),
    "Qwen3-8B":            _size(4096, 36, 32, 8, 12_288,  40_960, 1e6, False),
    "Qwen3-14B":           _size(5120, 40, 40, 8, 17_408,  40_960, 1e6, False),
    "Qwen3-32B":           _size(5120, 64, 64, 8, 25_600,  40_960, 1e6, False),
    "Qwen3-4B-Instruct-2507": _size(2560, 36, 32, 8, 9_728, 262_144, 5e6, True),
    "Qwen3-4B-Thinking-2507": _size(2560, 36, 32, 8, 9_728, 262_144, 5e6, True),
}  # fmt: skip

HUB = llama3.HUB


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Qwen3Config)
    attn = Attention(
        c.dim,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        q_norm=RMSNorm(c.head_dim, c.norm_eps),
        k_norm=RMSNorm(c.head_dim, c.norm_eps),
    )
    return Block(
        attn,
        GatedMLP(c.dim, c.hidden_dim),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
        sight=Sight(window=c.window(i)),
    )


def build(c: Qwen3Config) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> Qwen3Config:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Qwen 3 does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    return Qwen3Config(
        **sizes(json, context=32_768, head_dim=128),
        rope=rope_from_hub(json),
        windows=optional_windows(json, from_layer=28),
        attention_bias=field(json, "attention_bias", bool, default=False),
    )


def to_hub(c: Qwen3Config) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "Qwen3ForCausalLM", "qwen3"),
        **windows_to_hub(c),
        "use_sliding_window": bool(c.windows),
        "attention_bias": c.attention_bias,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
