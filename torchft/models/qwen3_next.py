"""Qwen 3 Next: three layers of gated DeltaNet to one of gated attention, and 512 small experts beside a shared one.

Announcement: https://qwen.ai/blog?id=qwen3-next. Weights: https://huggingface.co/Qwen
"""

from dataclasses import dataclass, replace
from typing import Any

from torchft.errors import UserError
from torchft.hub_names import STACKED, HubNames
from torchft.models import llama3
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.delta_net import GatedDeltaNet
from torchft.modules.mlp import GatedMLP
from torchft.modules.moe import Experts, MoE
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope
from torchft.modules.routers import SoftmaxRouter


@dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig(DecoderConfig):
    """``hidden_dim`` is of MLPs in layers without experts: Qwen 3.5's dense sizes, which have none."""

    is_recurrent: tuple[bool, ...]  # of each layer: gated DeltaNet instead of attention
    delta_heads: int = 32
    delta_key_heads: int = 16
    delta_key_dim: int = 128  # of a head
    delta_value_dim: int = 128
    conv_kernel: int = 4  # taps of the short convolution
    is_grouped: bool = True  # DeltaNet's projections are sorted by key head
    num_experts: int = 0
    top_k: int = 0  # experts per token
    expert_dim: int = 0
    shared_dim: int = 0  # of the expert that all tokens use
    renormalises: bool = True
    attention_bias: bool = False


_80B = Qwen3NextConfig(
    vocab_size=151_936, dim=2048, num_layers=48, num_heads=16, num_kv_heads=2, head_dim=256, hidden_dim=5120,
    max_seq_len=262_144, norm_eps=1e-6, rope=Rope(base=1e7, partial=0.25),
    is_recurrent=tuple((i + 1) % 4 != 0 for i in range(48)), num_experts=512, top_k=10, expert_dim=512, shared_dim=512,
)  # fmt: skip
CONFIGS = {
    "Qwen3-Next-80B-A3B-Instruct": _80B,
    "Qwen3-Next-80B-A3B-Thinking": _80B,
    "Qwen3-Coder-Next": replace(_80B, rope=Rope(base=5e6, partial=0.25)),
}

RENAMED = llama3.HUB.renamed | {
    r"\.self_attn\.(in_proj_\w+|conv1d|A_log|dt_bias|norm|out_proj)\b": r".linear_attn.\1",
    r"\.router\b": ".gate",
    r"\.shared_gate\b": ".shared_expert_gate",
    r"\.shared\b": ".shared_expert",
}
FURTHER: dict[str, Any] = {"predictor": ("mtp.", ""), "predictors": ("mtp_num_hidden_layers",)}
HUB = HubNames(
    RENAMED,
    per_expert=r"\.experts\b",
    split={"gate_up_proj": ("gate_proj", "up_proj")},
    stacked=HubNames(RENAMED | STACKED, **FURTHER),
    **FURTHER,
)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Qwen3NextConfig)
    return Block(
        _delta_net(c) if c.is_recurrent[i] else _attention(c),
        _experts(c) if c.num_experts else GatedMLP(c.dim, c.hidden_dim),
        attn_norm=RMSNorm(c.dim, c.norm_eps, offset=1.0),
        mlp_norm=RMSNorm(c.dim, c.norm_eps, offset=1.0),
        rope=None if c.is_recurrent[i] else c.rope,
    )


def _delta_net(c: Qwen3NextConfig) -> GatedDeltaNet:
    return GatedDeltaNet(
        c.dim,
        c.delta_heads,
        c.delta_key_heads,
        key_dim=c.delta_key_dim,
        value_dim=c.delta_value_dim,
        kernel=c.conv_kernel,
        norm_eps=c.norm_eps,
        is_grouped=c.is_grouped,
    )


def _attention(c: Qwen3NextConfig) -> Attention:
    return Attention(
        c.dim,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        q_norm=RMSNorm(c.head_dim, c.norm_eps, offset=1.0),
        k_norm=RMSNorm(c.head_dim, c.norm_eps, offset=1.0),
        has_gate=True,
    )


def _experts(c: Qwen3NextConfig) -> MoE:
    router = SoftmaxRouter(c.dim, c.num_experts, c.top_k, renormalises=c.renormalises)
    experts = Experts(c.num_experts, c.dim, c.expert_dim)
    return MoE(router, experts, shared=GatedMLP(c.dim, c.shared_dim), has_shared_gate=True)


def build(c: Qwen3NextConfig) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps, offset=1.0))


def from_hub(json: dict[str, Any]) -> Qwen3NextConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Qwen 3 Next does not have."""
    one_of(json, "decoder_sparse_step", 1, default=1)  # experts in every layer
    one_of(json, "mlp_only_layers", [], None, default=[])
    one_of(json, "use_sliding_window", False, default=False)
    return Qwen3NextConfig(
        **sizes(json, context=32_768, head_dim=256),
        **mixers_from_hub(json),
        rope=rope_from_hub(json, partial=0.25),
        num_experts=field(json, "num_experts", int, default=field(json, "num_local_experts", int, default=512)),
        top_k=field(json, "num_experts_per_tok", int, default=10),
        expert_dim=field(json, "moe_intermediate_size", int, default=512),
        shared_dim=field(json, "shared_expert_intermediate_size", int, default=512),
        renormalises=field(json, "norm_topk_prob", bool, default=True),
    )


def mixers_from_hub(json: dict[str, Any]) -> dict[str, Any]:
    """The fields of attention and DeltaNet."""
    one_of(json, "hidden_act", "silu", default="silu")
    num_layers = field(json, "num_hidden_layers", int)
    every = field(json, "full_attention_interval", int, default=4)
    kinds = json.get("layer_types")
    if kinds is None:
        kinds = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(num_layers)]
    known = ("linear_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise UserError(
            f"config.json: layer_types is {kinds!r:.80}, expected 'linear_attention' or 'full_attention' for each of "
            f"{num_layers} layers"
        )
    num_heads = field(json, "linear_num_value_heads", int, default=32)
    num_key_heads = field(json, "linear_num_key_heads", int, default=16)
    if num_heads % num_key_heads:
        raise UserError(
            f"config.json: linear_num_value_heads ({num_heads}) is not a multiple of linear_num_key_heads "
            f"({num_key_heads})"
        )
    return {
        "is_recurrent": tuple(kind == "linear_attention" for kind in kinds),
        "delta_heads": num_heads,
        "delta_key_heads": num_key_heads,
        "delta_key_dim": field(json, "linear_key_head_dim", int, default=128),
        "delta_value_dim": field(json, "linear_value_head_dim", int, default=128),
        "conv_kernel": field(json, "linear_conv_kernel_dim", int, default=4),
        "attention_bias": field(json, "attention_bias", bool, default=False),
    }


def mixers_to_hub(c: Qwen3NextConfig) -> dict[str, Any]:
    """The inverse of ``mixers_from_hub``."""
    return {
        "layer_types": ["linear_attention" if recurrent else "full_attention" for recurrent in c.is_recurrent],
        "linear_num_value_heads": c.delta_heads,
        "linear_num_key_heads": c.delta_key_heads,
        "linear_key_head_dim": c.delta_key_dim,
        "linear_value_head_dim": c.delta_value_dim,
        "linear_conv_kernel_dim": c.conv_kernel,
        "attention_bias": c.attention_bias,
        "hidden_act": "silu",
    }


def to_hub(c: Qwen3NextConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "Qwen3NextForCausalLM", "qwen3_next"),
        **mixers_to_hub(c),
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.top_k,
        "moe_intermediate_size": c.expert_dim,
        "shared_expert_intermediate_size": c.shared_dim,
        "norm_topk_prob": c.renormalises,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **rope_to_hub(c.rope),
    }
