"""Ministral 3, the text model: Mistral's block with YaRN, and queries that grow with the position.

Paper: https://arxiv.org/abs/2601.08584. Weights: https://huggingface.co/mistralai
"""

from dataclasses import dataclass
from typing import Any

from torchft.models import llama3
from torchft.models.config_json import field, one_of, section, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, section_to_hub
from torchft.modules.attention import Attention, QueryGrowth
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.mlp import GatedMLP
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import YarnRope


@dataclass(frozen=True, kw_only=True)
class Ministral3Config(DecoderConfig):
    growth: QueryGrowth


def _size(dim: int, num_layers: int, hidden_dim: int, base: float, tied: bool) -> Ministral3Config:
    rope = YarnRope(base=base, factor=16.0, original_max_seq_len=16_384, attention_factor=1.0)
    return Ministral3Config(
        vocab_size=131_072, dim=dim, num_layers=num_layers, num_heads=32, num_kv_heads=8, head_dim=128,
        hidden_dim=hidden_dim, max_seq_len=262_144, rope=rope, tie_embeddings=tied,
        growth=QueryGrowth(beta=0.1, every=rope.original_max_seq_len),
    )  # fmt: skip


CONFIGS = {
    #                                        dim layers hidden base tied
    "Ministral-3-3B-Base-2512":      _size(3072, 26,  9_216, 1e6, True),
    "Ministral-3-8B-Base-2512":      _size(4096, 34, 14_336, 1e6, False),
    "Ministral-3-14B-Base-2512":     _size(5120, 40, 16_384, 1e9, False),
}  # fmt: skip

HUB = llama3.HUB


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Ministral3Config)
    return Block(
        Attention(c.dim, c.num_heads, c.num_kv_heads, c.head_dim, growth=c.growth),
        GatedMLP(c.dim, c.hidden_dim),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
    )


def build(c: Ministral3Config) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> Ministral3Config:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Ministral 3 does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    one_of(json, "sliding_window", None, default=None)
    rope = section(json, "rope_parameters")
    rope.get("max_position_embeddings")  # said twice
    return Ministral3Config(
        **sizes(json, eps=1e-5, context=262_144, head_dim=128),
        rope=rope_from_hub(json),
        growth=QueryGrowth(
            beta=0.0 if rope.get("llama_4_scaling_beta") == 0 else field(rope, "llama_4_scaling_beta", float),
            every=field(rope, "original_max_position_embeddings", int),
        ),
    )


def to_hub(c: Ministral3Config) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "Ministral3ForCausalLM", "ministral3"),
        "hidden_act": "silu",
        "rope_parameters": section_to_hub(c.rope) | {"llama_4_scaling_beta": c.growth.beta},
    }
