"""Mistral 7B, Nemo and Small: Llama's block, in 7B v0.1 with a window in every layer, from Nemo on with narrow heads.

Paper: https://arxiv.org/abs/2310.06825. Weights: https://huggingface.co/mistralai
"""

from typing import Any

from torchft.models import llama3
from torchft.models.config_json import one_of, sizes, sizes_to_hub, windows, windows_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.mlp import GatedMLP
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope


def _size(
    vocab_size: int, dim: int, num_layers: int, num_heads: int, hidden_dim: int, context: int, base: float,
    window: int | None = None,
) -> DecoderConfig:  # fmt: skip
    return DecoderConfig(
        vocab_size=vocab_size, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=8, head_dim=128,
        hidden_dim=hidden_dim, max_seq_len=context, norm_eps=1e-5, rope=Rope(base=base),
        windows=() if window is None else (window,) * num_layers,
    )  # fmt: skip


CONFIGS = {
    #                                          vocab   dim layers heads hidden context base window
    "Mistral-7B-v0.1":                 _size( 32_000, 4096, 32, 32, 14_336,  32_768, 1e4, 4096),
    "Mistral-7B-Instruct-v0.2":        _size( 32_000, 4096, 32, 32, 14_336,  32_768, 1e6),
    "Mistral-7B-v0.3":                 _size( 32_768, 4096, 32, 32, 14_336,  32_768, 1e6),
    "Mistral-Nemo-Base-2407":          _size(131_072, 5120, 40, 32, 14_336, 131_072, 1e6),
    "Mistral-Small-Instruct-2409":     _size( 32_768, 6144, 56, 48, 16_384,  32_768, 1e6),
    "Mistral-Small-24B-Base-2501":     _size(131_072, 5120, 40, 32, 32_768,  32_768, 1e8),
    "Mistral-Small-3.1-24B-Base-2503": _size(131_072, 5120, 40, 32, 32_768, 131_072, 1e9),
    "Mistral-Small-3.2-24B-Instruct-2506": _size(131_072, 5120, 40, 32, 32_768, 131_072, 1e9),
}  # fmt: skip

HUB = llama3.HUB


def block(c: DecoderConfig, i: int) -> Block:
    return Block(
        Attention(c.dim, c.num_heads, c.num_kv_heads, c.head_dim),
        GatedMLP(c.dim, c.hidden_dim),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
        sight=Sight(window=c.window(i)),
    )


def build(c: DecoderConfig) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> DecoderConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Mistral does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    return DecoderConfig(
        **sizes(json, context=131_072), rope=rope_from_hub(json), windows=windows(json, lambda i: True, size=4096)
    )


def to_hub(c: DecoderConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    window = windows_to_hub(c)["sliding_window"]  # one for all layers: no layer_types
    return {
        **sizes_to_hub(c, "MistralForCausalLM", "mistral"),
        "sliding_window": window,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
