"""Qwen 2 and 2.5: Llama's block with biases on queries, keys and values.

Paper: https://arxiv.org/abs/2412.15115. Weights: https://huggingface.co/Qwen
"""

from typing import Any

from torchft.models import llama3
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub, windows, windows_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.mlp import GatedMLP
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope

ROPE = Rope(base=1_000_000.0)


def _size(
    vocab_size: int, dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int, context: int,
    eps: float = 1e-6,
) -> DecoderConfig:  # fmt: skip
    return DecoderConfig(
        vocab_size=vocab_size, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=dim // num_heads, hidden_dim=hidden_dim, max_seq_len=context, norm_eps=eps, rope=ROPE,
        tie_embeddings=dim <= 2048,
    )  # fmt: skip


CONFIGS = {
    #                                vocab   dim layers heads kv hidden context   eps
    "Qwen2-0.5B":            _size(151_936,  896, 24, 14, 2,  4_864, 131_072),
    "Qwen2-1.5B":            _size(151_936, 1536, 28, 12, 2,  8_960, 131_072),
    "Qwen2-7B":              _size(152_064, 3584, 28, 28, 4, 18_944, 131_072),
    "Qwen2-72B":             _size(152_064, 8192, 80, 64, 8, 29_568, 131_072, 1e-5),
    "Qwen2-0.5B-Instruct":   _size(151_936,  896, 24, 14, 2,  4_864,  32_768),
    "Qwen2-1.5B-Instruct":   _size(151_936, 1536, 28, 12, 2,  8_960,  32_768),
    "Qwen2-7B-Instruct":     _size(152_064, 3584, 28, 28, 4, 18_944,  32_768),
    "Qwen2-72B-Instruct":    _size(152_064, 8192, 80, 64, 8, 29_568,  32_768),
    "Qwen2.5-0.5B":          _size(151_936,  896, 24, 14, 2,  4_864,  32_768),
    "Qwen2.5-1.5B":          _size(151_936, 1536, 28, 12, 2,  8_960, 131_072),
    "Qwen2.5-3B":            _size(151_936, 2048, 36, 16, 2, 11_008,  32_768),
    "Qwen2.5-7B":            _size(152_064, 3584, 28, 28, 4, 18_944, 131_072),
    "Qwen2.5-14B":           _size(152_064, 5120, 48, 40, 8, 13_824, 131_072, 1e-5),
    "Qwen2.5-32B":           _size(152_064, 5120, 64, 40, 8, 27_648, 131_072, 1e-5),
    "Qwen2.5-72B":           _size(152_064, 8192, 80, 64, 8, 29_568, 131_072, 1e-5),
    "Qwen2.5-0.5B-Instruct": _size(151_936,  896, 24, 14, 2,  4_864,  32_768),
    "Qwen2.5-1.5B-Instruct": _size(151_936, 1536, 28, 12, 2,  8_960,  32_768),
    "Qwen2.5-3B-Instruct":   _size(151_936, 2048, 36, 16, 2, 11_008,  32_768),
    "Qwen2.5-7B-Instruct":   _size(152_064, 3584, 28, 28, 4, 18_944,  32_768),
    "Qwen2.5-14B-Instruct":  _size(152_064, 5120, 48, 40, 8, 13_824,  32_768),
    "Qwen2.5-32B-Instruct":  _size(152_064, 5120, 64, 40, 8, 27_648,  32_768),
    "Qwen2.5-72B-Instruct":  _size(152_064, 8192, 80, 64, 8, 29_568,  32_768),
}  # fmt: skip

HUB = llama3.HUB


def block(c: DecoderConfig, i: int) -> Block:
    return Block(
        Attention(c.dim, c.num_heads, c.num_kv_heads, c.head_dim, bias=True),
        GatedMLP(c.dim, c.hidden_dim),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
        sight=Sight(window=c.window(i)),
    )


def build(c: DecoderConfig) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> DecoderConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Qwen 2 does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    return DecoderConfig(
        **sizes(json, context=32_768), rope=rope_from_hub(json), windows=optional_windows(json, from_layer=28)
    )


def optional_windows(json: dict[str, Any], *, from_layer: int) -> tuple[int | None, ...]:
    """Qwen's windows, which no release switches on: in layers from ``max_window_layers`` on."""
    first = field(json, "max_window_layers", int, default=from_layer)
    found = windows(json, lambda i: i >= first, size=4096)
    return found if field(json, "use_sliding_window", bool, default=False) else ()


def to_hub(c: DecoderConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "Qwen2ForCausalLM", "qwen2"),
        **windows_to_hub(c),
        "use_sliding_window": bool(c.windows),
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
