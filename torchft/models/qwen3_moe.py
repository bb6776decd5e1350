"""Qwen 3 MoE, its 2507 and Coder releases: Qwen 3 with a mixture of experts in place of every MLP.

Paper: https://arxiv.org/abs/2505.09388. Weights: https://huggingface.co/Qwen
"""

from dataclasses import dataclass
from typing import Any

from torchft.hub_names import STACKED, HubNames
from torchft.models import llama3
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.moe import Experts, MoE
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope
from torchft.modules.routers import SoftmaxRouter


@dataclass(frozen=True, kw_only=True)
class Qwen3MoEConfig(DecoderConfig):
    """``hidden_dim`` is of MLPs that no released size has."""

    num_experts: int
    top_k: int  # experts per token
    expert_dim: int
    renormalises: bool = True
    attention_bias: bool = False


def _size(
    dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int, num_experts: int, expert_dim: int,
    context: int, base: float,
) -> Qwen3MoEConfig:  # fmt: skip
    return Qwen3MoEConfig(
        vocab_size=151_936, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=128, hidden_dim=hidden_dim, max_seq_len=context, norm_eps=1e-6, rope=Rope(base=base),
        num_experts=num_experts, top_k=8, expert_dim=expert_dim,
    )  # fmt: skip


CONFIGS = {
    #                                        dim layers heads kv hidden experts width context base
    "Qwen3-30B-A3B-Base":              _size(2048, 48, 32, 4,  6_144, 128,   768,  32_768, 1e6),
    "Qwen3-30B-A3B":                   _size(2048, 48, 32, 4,  6_144, 128,   768,  40_960, 1e6),
    "Qwen3-30B-A3B-Instruct-2507":     _size(2048, 48, 32, 4,  6_144, 128,   768, 262_144, 1e7),
    "Qwen3-30B-A3B-Thinking-2507":     _size(2048, 48, 32, 4,  6_144, 128,   768, 262_144, 1e7),
    "Qwen3-Coder-30B-A3B-Instruct":    _size(2048, 48, 32, 4,  5_472, 128,   768, 262_144, 1e7),
    "Qwen3-235B-A22B":                 _size(4096, 94, 64, 4, 12_288, 128, 1_536,  40_960, 1e6),
    "Qwen3-235B-A22B-Instruct-2507":   _size(4096, 94, 64, 4, 12_288, 128, 1_536, 262_144, 5e6),
    "Qwen3-235B-A22B-Thinking-2507":   _size(4096, 94, 64, 4, 12_288, 128, 1_536, 262_144, 5e6),
    "Qwen3-Coder-480B-A35B-Instruct":  _size(6144, 62, 96, 8,  8_192, 160, 2_560, 262_144, 1e7),
}  # fmt: skip

RENAMED = llama3.HUB.renamed | {r"\.router\b": ".gate"}
HUB = HubNames(
    RENAMED,
    per_expert=r"\.experts\b",
    split={"gate_up_proj": ("gate_proj", "up_proj")},
    stacked=HubNames(RENAMED | STACKED),
)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Qwen3MoEConfig)
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
    router = SoftmaxRouter(c.dim, c.num_experts, c.top_k, renormalises=c.renormalises)
    return Block(
        attn,
        MoE(router, Experts(c.num_experts, c.dim, c.expert_dim)),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
    )


def build(c: Qwen3MoEConfig) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> Qwen3MoEConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Qwen 3 MoE does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    one_of(json, "use_sliding_window", False, default=False)
    for key in ("sliding_window", "max_window_layers"):  # without meaning then
        json.get(key)
    one_of(json, "use_qk_norm", True, default=True)
    one_of(json, "decoder_sparse_step", 1, default=1)  # experts in every layer
    one_of(json, "mlp_only_layers", [], None, default=[])
    return Qwen3MoEConfig(
        **sizes(json, context=32_768),
        rope=rope_from_hub(json),
        num_experts=field(json, "num_experts", int, default=field(json, "num_local_experts", int, default=128)),
        top_k=field(json, "num_experts_per_tok", int, default=8),
        expert_dim=field(json, "moe_intermediate_size", int, default=768),
        renormalises=field(json, "norm_topk_prob", bool, default=False),
        attention_bias=field(json, "attention_bias", bool, default=False),
    )


def to_hub(c: Qwen3MoEConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "Qwen3MoeForCausalLM", "qwen3_moe"),
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.top_k,
        "moe_intermediate_size": c.expert_dim,
        "norm_topk_prob": c.renormalises,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": c.attention_bias,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
