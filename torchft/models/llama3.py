"""Llama 3, 3.1, 3.2 (text) and 3.3: the reference family, whose Hub names are ours but for the norms.

Paper: https://arxiv.org/abs/2407.21783. Weights: https://huggingface.co/meta-llama
"""

from dataclasses import dataclass
from typing import Any

from torchft.hub import HubNames
from torchft.models.config_json import field, heads, one_of, rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.mlp import GatedMLP
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Llama3Rope, Rope

MODEL_TYPE = "llama"  # in config.json


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    attention_bias: bool = False
    mlp_bias: bool = False


ROPE_3 = Rope(base=500_000.0)
ROPE_31 = Llama3Rope(base=500_000.0, factor=8.0)
ROPE_32 = Llama3Rope(base=500_000.0, factor=32.0)


def _size(dim: int, num_layers: int, num_heads: int, hidden_dim: int, rope: Rope, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128_256, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=8,
        head_dim=dim // num_heads, hidden_dim=hidden_dim, max_seq_len=8_192 if rope is ROPE_3 else 131_072,
        rope=rope, **more,
    )  # fmt: skip


CONFIGS = {
    #                            dim layers heads hidden  rope
    "Meta-Llama-3-8B":   _size( 4096,  32,  32, 14_336, ROPE_3),
    "Meta-Llama-3-70B":  _size( 8192,  80,  64, 28_672, ROPE_3),
    "Llama-3.1-8B":      _size( 4096,  32,  32, 14_336, ROPE_31),
    "Llama-3.1-70B":     _size( 8192,  80,  64, 28_672, ROPE_31),
    "Llama-3.1-405B":    _size(16384, 126, 128, 53_248, ROPE_31),
    "Llama-3.2-1B":      _size( 2048,  16,  32,  8_192, ROPE_32, tie_embeddings=True),
    "Llama-3.2-3B":      _size( 3072,  28,  24,  8_192, ROPE_32, tie_embeddings=True),
    "Llama-3.3-70B-Instruct": _size(8192, 80, 64, 28_672, ROPE_31),
}  # fmt: skip

HUB = HubNames(
    {
        r"^(?!lm_head)": "model.",
        r"\.attn_norm\b": ".input_layernorm",
        r"\.mlp_norm\b": ".post_attention_layernorm",
    }
)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, LlamaConfig)
    return Block(
        Attention(c.dim, c.num_heads, c.num_kv_heads, c.head_dim, bias=c.attention_bias),
        GatedMLP(c.dim, c.hidden_dim, bias=c.mlp_bias),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
    )


def build(c: LlamaConfig) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> LlamaConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Llama does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    num_heads, num_kv_heads, head_dim = heads(json)
    return LlamaConfig(
        vocab_size=field(json, "vocab_size", int),
        dim=field(json, "hidden_size", int),
        num_layers=field(json, "num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_dim=field(json, "intermediate_size", int),
        max_seq_len=field(json, "max_position_embeddings", int, default=2048),
        norm_eps=field(json, "rms_norm_eps", float, default=1e-6),
        rope=rope_from_hub(json),
        tie_embeddings=field(json, "tie_word_embeddings", bool, default=False),
        attention_bias=field(json, "attention_bias", bool, default=False),
        mlp_bias=field(json, "mlp_bias", bool, default=False),
    )


def to_hub(c: LlamaConfig) -> dict[str, Any]:
    """The config.json of a model that was built from a row of ``CONFIGS``; the inverse of ``from_hub``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.hidden_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        **rope_to_hub(c.rope),
    }
