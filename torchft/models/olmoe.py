"""OLMoE: 64 small experts, 8 for each token, their weights not renormalised; queries and keys normed over all heads.

Paper: https://arxiv.org/abs/2409.02060. Weights: https://huggingface.co/allenai
"""

from dataclasses import dataclass
from typing import Any

from torchft.models.config_json import field, one_of, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.models.qwen3_moe import HUB  # noqa: F401  the same names
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.moe import Experts, MoE
from torchft.modules.norms import RMSNorm, WholeRMSNorm
from torchft.modules.routers import SoftmaxRouter


@dataclass(frozen=True, kw_only=True)
class OlmoeConfig(DecoderConfig):
    """``hidden_dim`` is an expert's."""

    num_experts: int = 64
    top_k: int = 8  # experts per token
    renormalises: bool = False
    attention_bias: bool = False


_SIZE = OlmoeConfig(
    vocab_size=50_304, dim=2048, num_layers=16, num_heads=16, num_kv_heads=16, head_dim=128, hidden_dim=1024,
    max_seq_len=4096,
)  # fmt: skip

CONFIGS = dict.fromkeys(
    ["OLMoE-1B-7B-0924", "OLMoE-1B-7B-0924-Instruct", "OLMoE-1B-7B-0125", "OLMoE-1B-7B-0125-Instruct"], _SIZE
)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, OlmoeConfig)
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
    router = SoftmaxRouter(c.dim, c.num_experts, c.top_k, renormalises=c.renormalises)
    return Block(
        attn,
        MoE(router, Experts(c.num_experts, c.dim, c.hidden_dim)),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
    )


def build(c: OlmoeConfig) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> OlmoeConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what OLMoE does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    one_of(json, "clip_qkv", None, default=None)
    return OlmoeConfig(
        **sizes(json, eps=1e-5, context=4096),
        rope=rope_from_hub(json),
        num_experts=field(json, "num_experts", int, default=field(json, "num_local_experts", int, default=64)),
        top_k=field(json, "num_experts_per_tok", int, default=8),
        renormalises=field(json, "norm_topk_prob", bool, default=False),
        attention_bias=field(json, "attention_bias", bool, default=False),
    )


def to_hub(c: OlmoeConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "OlmoeForCausalLM", "olmoe"),
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.top_k,
        "norm_topk_prob": c.renormalises,
        "attention_bias": c.attention_bias,
        "clip_qkv": None,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
