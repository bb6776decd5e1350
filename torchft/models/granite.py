"""Granite 3 (dense): Llama's block with four multipliers: of embeddings, scores, what is added, and logits.

Paper: https://github.com/ibm-granite/granite-3.0-language-models. Weights: https://huggingface.co/ibm-granite
"""

from dataclasses import dataclass
from typing import Any

from torchft.models import llama3
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.mlp import GatedMLP
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(DecoderConfig):
    embed_scale: float
    score_scale: float
    residual_scale: float
    logit_divisor: float
    attention_bias: bool = False
    mlp_bias: bool = False


def _size(
    vocab_size: int, dim: int, head_dim: int, hidden_dim: int, context: int, base: float, score_scale: float,
    logit_divisor: float,
) -> GraniteConfig:  # fmt: skip
    return GraniteConfig(
        vocab_size=vocab_size, dim=dim, num_layers=40, num_heads=32, num_kv_heads=8, head_dim=head_dim,
        hidden_dim=hidden_dim, max_seq_len=context, rope=Rope(base=base), tie_embeddings=True, embed_scale=12.0,
        score_scale=score_scale, residual_scale=0.22, logit_divisor=logit_divisor,
    )  # fmt: skip


CONFIGS = {
    #                                vocab   dim head hidden context base  scores   logits
    "granite-3.0-2b-base":     _size(49_155, 2048,  64,  8_192,   4_096, 1e4, 1 / 64,   8.0),
    "granite-3.0-8b-base":     _size(49_155, 4096, 128, 12_800,   4_096, 1e4, 1 / 128, 16.0),
    "granite-3.1-2b-base":     _size(49_155, 2048,  64,  8_192, 131_072, 5e6, 1 / 64,   8.0),
    "granite-3.1-8b-base":     _size(49_155, 4096, 128, 12_800, 131_072, 1e7, 1 / 128, 16.0),
    "granite-3.3-2b-instruct": _size(49_159, 2048,  64,  8_192, 131_072, 1e7, 1 / 64,   8.0),
    "granite-3.3-8b-instruct": _size(49_159, 4096, 128, 12_800, 131_072, 1e7, 1 / 128, 16.0),
}  # fmt: skip

HUB = llama3.HUB


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, GraniteConfig)
    attn = Attention(
        c.dim,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        scale=c.score_scale,
    )
    return Block(
        attn,
        GatedMLP(c.dim, c.hidden_dim, bias=c.mlp_bias),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
        residual_scale=c.residual_scale,
    )


def build(c: GraniteConfig) -> Decoder:
    norm = RMSNorm(c.dim, c.norm_eps)
    return Decoder(c, block, norm, embed_scale=c.embed_scale, logit_scale=1 / c.logit_divisor)


def from_hub(json: dict[str, Any]) -> GraniteConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Granite does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    one_of(json, "attention_dropout", 0.0, 0.1, default=0.0)  # 0.1 in the first releases; nobody fine-tunes with it
    return GraniteConfig(
        **sizes(json, context=2048),
        rope=rope_from_hub(json),
        embed_scale=field(json, "embedding_multiplier", float, default=1.0),
        score_scale=field(json, "attention_multiplier", float, default=1.0),
        residual_scale=field(json, "residual_multiplier", float, default=1.0),
        logit_divisor=field(json, "logits_scaling", float, default=1.0),
        attention_bias=field(json, "attention_bias", bool, default=False),
        mlp_bias=field(json, "mlp_bias", bool, default=False),
    )


def to_hub(c: GraniteConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "GraniteForCausalLM", "granite"),
        "embedding_multiplier": c.embed_scale,
        "attention_multiplier": c.score_scale,
        "residual_multiplier": c.residual_scale,
        "logits_scaling": c.logit_divisor,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
