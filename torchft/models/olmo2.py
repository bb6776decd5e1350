"""OLMo 2: norms after attention and MLP instead of before, queries and keys normed over all heads together.

Paper: https://arxiv.org/abs/2501.00656. Weights: https://huggingface.co/allenai
"""

from dataclasses import dataclass
from typing import Any

from torchft.hub_names import HubNames
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.mlp import GatedMLP
from torchft.modules.norms import RMSNorm, WholeRMSNorm
from torchft.modules.rope import Rope


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(DecoderConfig):
    attention_bias: bool = False


def _size(dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int) -> Olmo2Config:
    return Olmo2Config(
        vocab_size=100_352, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=128, hidden_dim=hidden_dim, max_seq_len=4096, norm_eps=1e-6, rope=Rope(base=500_000.0),
    )  # fmt: skip


CONFIGS = {
    #                            dim layers heads kv hidden
    "OLMo-2-0425-1B":    _size(2048, 16, 16, 16,  8_192),
    "OLMo-2-1124-7B":    _size(4096, 32, 32, 32, 11_008),
    "OLMo-2-1124-13B":   _size(5120, 40, 40, 40, 13_824),
    "OLMo-2-0325-32B":   _size(5120, 64, 40,  8, 27_648),
}  # fmt: skip

HUB = HubNames(
    {
        r"^(?!lm_head)": "model.",
        r"\.attn_post_norm\b": ".post_attention_layernorm",
        r"\.mlp_post_norm\b": ".post_feedforward_layernorm",
    }
)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Olmo2Config)
    attn = Attention(
        c.dim,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        q_norm=WholeRMSNorm(c.num_heads * c.head_dim, c.norm_eps),
        k_norm=WholeRMSNorm(c.num_kv_heads * c.head_dim, c.norm_eps),
    )
    return Block(
        attn,
        GatedMLP(c.dim, c.hidden_dim),
        attn_norm=None,
        attn_post_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=None,
        mlp_post_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
    )


def build(c: Olmo2Config) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> Olmo2Config:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what OLMo 2 does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    return Olmo2Config(
        **sizes(json, eps=1e-5, context=2048),
        rope=rope_from_hub(json),
        attention_bias=field(json, "attention_bias", bool, default=False),
    )


def to_hub(c: Olmo2Config) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "Olmo2ForCausalLM", "olmo2"),
        "attention_bias": c.attention_bias,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
