"""GLM 4.5 (Air too) and 4.6: DeepSeek V3's mixture of experts in blocks with grouped-query attention; the first layers
are dense, half of each head rotates.

Paper: https://arxiv.org/abs/2508.06471. Weights: https://huggingface.co/zai-org
"""

from dataclasses import dataclass
from typing import Any

from torchft.hub_names import STACKED, HubNames
from torchft.models import llama3
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.mlp import GatedMLP
from torchft.modules.moe import Experts, MoE
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope
from torchft.modules.routers import GroupedRouter


@dataclass(frozen=True, kw_only=True)
class Glm4MoEConfig(DecoderConfig):
    """``hidden_dim`` is of the dense layers' MLPs."""

    num_experts: int
    top_k: int  # experts per token
    expert_dim: int
    num_shared: int = 1  # experts that all tokens use, as one MLP
    num_dense: int  # layers without experts, the first ones
    num_groups: int = 1
    top_groups: int = 1
    renormalises: bool = True
    expert_scale: float  # of the weights
    attention_bias: bool = True
    has_qk_norm: bool = False


def _size(
    dim: int, num_layers: int, hidden_dim: int, num_experts: int, expert_dim: int, num_dense: int, expert_scale: float,
    context: int, has_qk_norm: bool,
) -> Glm4MoEConfig:  # fmt: skip
    return Glm4MoEConfig(
        vocab_size=151_552, dim=dim, num_layers=num_layers, num_heads=96, num_kv_heads=8, head_dim=128,
        hidden_dim=hidden_dim, max_seq_len=context, rope=Rope(base=1e6, partial=0.5), num_experts=num_experts, top_k=8,
        expert_dim=expert_dim, num_dense=num_dense, expert_scale=expert_scale, has_qk_norm=has_qk_norm,
    )  # fmt: skip


_AIR = _size(4096, 46, 10_944, 128, 1408, 1, 1.0, 131_072, False)
_355B = _size(5120, 92, 12_288, 160, 1536, 3, 2.5, 131_072, True)
CONFIGS = {
    #                        dim layers hidden experts width dense scale context qk norm
    "GLM-4.5-Air":      _AIR,
    "GLM-4.5-Air-Base": _AIR,
    "GLM-4.5":          _355B,
    "GLM-4.5-Base":     _355B,
    "GLM-4.6":          _size(5120, 92, 12_288, 160, 1536, 3, 2.5, 202_752, True),
}  # fmt: skip

RENAMED = llama3.HUB.renamed | {
    r"\.router\.correction$": ".gate.e_score_correction_bias",
    r"\.router\b": ".gate",
    r"\.shared\b": ".shared_experts",
}
# Layers behind the last one predict further tokens, for faster decoding; nobody trains them here.
FURTHER = r"\.rotary_emb\.inv_freq$|^model\.layers\.{num_layers}\."
HUB = HubNames(
    RENAMED,
    per_expert=r"\.experts\b",
    split={"gate_up_proj": ("gate_proj", "up_proj")},
    keeps_dtype=r"\.correction$",
    ignored=FURTHER,
    stacked=HubNames(RENAMED | STACKED, keeps_dtype=r"\.correction$", ignored=FURTHER),
)


def mlp(c: Glm4MoEConfig, i: int) -> GatedMLP | MoE:
    if i < c.num_dense:
        return GatedMLP(c.dim, c.hidden_dim)
    router = GroupedRouter(
        c.dim,
        c.num_experts,
        c.top_k,
        num_groups=c.num_groups,
        top_groups=c.top_groups,
        renormalises=c.renormalises,
        scale=c.expert_scale,
    )
    return MoE(router, Experts(c.num_experts, c.dim, c.expert_dim), shared=GatedMLP(c.dim, c.num_shared * c.expert_dim))


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Glm4MoEConfig)
    attn = Attention(
        c.dim,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        bias=c.attention_bias,
        q_norm=RMSNorm(c.head_dim, c.norm_eps) if c.has_qk_norm else None,
        k_norm=RMSNorm(c.head_dim, c.norm_eps) if c.has_qk_norm else None,
    )
    return Block(
        attn, mlp(c, i), attn_norm=RMSNorm(c.dim, c.norm_eps), mlp_norm=RMSNorm(c.dim, c.norm_eps), rope=c.rope
    )


def build(c: Glm4MoEConfig) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> Glm4MoEConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what GLM 4.5 does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    return Glm4MoEConfig(
        **sizes(json, eps=1e-5, context=131_072),
        rope=rope_from_hub(json, partial=0.5),
        **experts_from_hub(json, num_experts=128, num_dense=1, scale=1.0, groups=(1, 1)),
        attention_bias=field(json, "attention_bias", bool, default=False),
        has_qk_norm=field(json, "use_qk_norm", bool, default=False),
    )


def experts_from_hub(
    json: dict[str, Any], *, num_experts: int, num_dense: int, scale: float, groups: tuple[int, int]
) -> dict[str, Any]:
    """The fields of the experts, as DeepSeek V3 spells them too; what config.json may leave out."""
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):  # these layers are left out
        json.get(key)
    experts = {
        "num_experts": field(json, "n_routed_experts", int, default=num_experts),
        "top_k": field(json, "num_experts_per_tok", int, default=8),
        "expert_dim": field(json, "moe_intermediate_size", int),
        "num_shared": field(json, "n_shared_experts", int, default=1),
        "num_dense": num_dense if json.get("first_k_dense_replace") is None else json["first_k_dense_replace"],
        "num_groups": field(json, "n_group", int, default=groups[0]),
        "top_groups": field(json, "topk_group", int, default=groups[1]),
        "renormalises": field(json, "norm_topk_prob", bool, default=True),
        "expert_scale": field(json, "routed_scaling_factor", float, default=scale),
    }
    one_of(json, "first_k_dense_replace", *range(field(json, "num_hidden_layers", int) + 1), default=num_dense)
    one_of(json, "n_group", *(n for n in range(1, 65) if experts["num_experts"] % n == 0), default=groups[0])
    return experts


def experts_to_hub(c: Any) -> dict[str, Any]:
    """The inverse of ``experts_from_hub``."""
    return {
        "n_routed_experts": c.num_experts,
        "num_experts_per_tok": c.top_k,
        "moe_intermediate_size": c.expert_dim,
        "n_shared_experts": c.num_shared,
        "first_k_dense_replace": c.num_dense,
        "n_group": c.num_groups,
        "topk_group": c.top_groups,
        "norm_topk_prob": c.renormalises,
        "routed_scaling_factor": c.expert_scale,
        "num_nextn_predict_layers": 0,
    }


def to_hub(c: Glm4MoEConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "Glm4MoeForCausalLM", "glm4_moe"),
        **experts_to_hub(c),
        "attention_bias": c.attention_bias,
        "use_qk_norm": c.has_qk_norm,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
