"""GLM 4 (9B) and its 0414 releases (9B, 32B): neighbouring channels of half a head rotate; on the Hub gate and up are
one matrix; 0414 norms what is added to the residual, too.

Paper: https://arxiv.org/abs/2406.12793. Weights: https://huggingface.co/zai-org
"""

from dataclasses import dataclass
from typing import Any

from torchft.hub_names import HubNames
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.mlp import GatedMLP
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope


@dataclass(frozen=True, kw_only=True)
class Glm4Config(DecoderConfig):
    is_sandwich: bool  # 0414: a norm behind attention and MLP, too
    attention_bias: bool = True


ROPE = Rope(partial=0.5)


def _size(
    dim: int, num_layers: int, num_heads: int, hidden_dim: int, context: int, eps: float, **more: Any
) -> Glm4Config:
    return Glm4Config(
        vocab_size=151_552, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=2, head_dim=128,
        hidden_dim=hidden_dim, max_seq_len=context, norm_eps=eps, rope=ROPE, **more,
    )  # fmt: skip


CONFIGS = {
    #                             dim layers heads hidden context   eps
    "glm-4-9b-hf":        _size(4096, 40, 32, 13_696,   8_192, 1.5625e-7, is_sandwich=False),
    "glm-4-9b-chat-hf":   _size(4096, 40, 32, 13_696, 131_072, 1.5625e-7, is_sandwich=False),
    "GLM-4-9B-0414":      _size(4096, 40, 32, 13_696,  32_768, 1e-5, is_sandwich=True),
    "GLM-Z1-9B-0414":     _size(4096, 40, 32, 13_696,  32_768, 1e-5, is_sandwich=True),
    "GLM-4-32B-Base-0414": _size(6144, 61, 48, 23_040, 32_768, 1e-5, is_sandwich=True, attention_bias=False),
    "GLM-4-32B-0414":     _size(6144, 61, 48, 23_040,  32_768, 1e-5, is_sandwich=True, attention_bias=False),
    "GLM-Z1-32B-0414":    _size(6144, 61, 48, 23_040,  32_768, 1e-5, is_sandwich=True, attention_bias=False),
}  # fmt: skip

HUB = HubNames(
    {
        r"^(?!lm_head)": "model.",
        r"\.attn_norm\b": ".input_layernorm",
        r"\.attn_post_norm\b": ".post_self_attn_layernorm",
        r"\.mlp_norm\b": ".post_attention_layernorm",
        r"\.mlp_post_norm\b": ".post_mlp_layernorm",
    },
    fused={"gate_up_proj": ("gate_proj", "up_proj")},
)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Glm4Config)
    return Block(
        Attention(c.dim, c.num_heads, c.num_kv_heads, c.head_dim, bias=c.attention_bias, interleaved=True),
        GatedMLP(c.dim, c.hidden_dim),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        attn_post_norm=RMSNorm(c.dim, c.norm_eps) if c.is_sandwich else None,
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_post_norm=RMSNorm(c.dim, c.norm_eps) if c.is_sandwich else None,
        rope=c.rope,
    )


def build(c: Glm4Config) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> Glm4Config:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what GLM 4 does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    return Glm4Config(
        **sizes(json, eps=1.5625e-7, context=131_072, head_dim=128),
        rope=rope_from_hub(json, partial=0.5),
        attention_bias=field(json, "attention_bias", bool, default=True),
        is_sandwich=json["architectures"] == ["Glm4ForCausalLM"],
    )


def to_hub(c: Glm4Config) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, *(("Glm4ForCausalLM", "glm4") if c.is_sandwich else ("GlmForCausalLM", "glm"))),
        "attention_bias": c.attention_bias,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
