"""DeepSeek V3, its later releases and R1; Kimi K2 and Moonlight: latent attention, and many experts chosen by corrected
sigmoids from some of their groups. Weights in blocks of FP8 are dequantised when they are read.

Paper: https://arxiv.org/abs/2412.19437. Weights: https://huggingface.co/deepseek-ai, https://huggingface.co/moonshotai
"""

from dataclasses import dataclass, replace
from typing import Any

from torchft.hub_names import HubNames
from torchft.models import glm4_moe
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub, yarn_scale
from torchft.models.glm4_moe import Glm4MoEConfig, experts_from_hub, experts_to_hub, mlp
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.mla import LatentAttention
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope, YarnRope


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(Glm4MoEConfig):
    """``head_dim`` is of queries and keys: ``rope.partial`` of it rotates. GLM's fields of the experts."""

    value_dim: int = 128  # of a head
    latent: int = 512  # that keys and values of all heads come from
    query_latent: int | None = 1536
    interleaved: bool = True  # RoPE's convention
    mscale: float = 0.0  # YaRN's weights for the rotation's amplitude, 0 as if absent, and
    mscale_all_dim: float = 0.0  # for that of whole queries and keys
    attention_bias: bool = False

    @property
    def rope_dim(self) -> int:
        return self.rope.rotary_dim(self.head_dim)


def _size(
    vocab: int, dim: int, num_layers: int, num_heads: int, hidden_dim: int, num_experts: int, expert_dim: int,
    num_dense: int, expert_scale: float, context: int, rope: Rope, **more: Any,
) -> DeepseekV3Config:  # fmt: skip
    return DeepseekV3Config(
        vocab_size=vocab, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads, head_dim=192,
        hidden_dim=hidden_dim, max_seq_len=context, norm_eps=1e-6, num_experts=num_experts, top_k=more.pop("top_k", 8),
        expert_dim=expert_dim, num_dense=num_dense, expert_scale=expert_scale, rope=rope, **more,
    )  # fmt: skip


def _yarn(base: float, factor: float, fast: float) -> YarnRope:
    return YarnRope(
        base=base, partial=1 / 3, factor=factor, original_max_seq_len=4096, fast=fast, slow=1.0, attention_factor=1.0
    )


MSCALES: dict[str, Any] = {"mscale": 1.0, "mscale_all_dim": 1.0}
_V3 = _size(
    129_280, 7168, 61, 128, 18_432, 256, 2048, 3, 2.5, 163_840, _yarn(1e4, 40.0, 32.0), num_groups=8, top_groups=4,
    **MSCALES,
)  # fmt: skip
_K2_SIZES = (163_840, 7168, 61, 64, 18_432, 384, 2048, 1, 2.827)
_K2 = _size(*_K2_SIZES, 131_072, _yarn(5e4, 32.0, 1.0), **MSCALES)
_MOONLIGHT = _size(
    163_840, 2048, 27, 16, 11_264, 64, 1408, 1, 2.446, 8_192, Rope(base=5e4, partial=1 / 3), top_k=6, num_shared=2,
    query_latent=None,
)  # fmt: skip
CONFIGS = {
    **dict.fromkeys(["DeepSeek-V3-Base", "DeepSeek-V3", "DeepSeek-V3-0324", "DeepSeek-R1", "DeepSeek-R1-0528"], _V3),
    **dict.fromkeys(["DeepSeek-V3.1-Base", "DeepSeek-V3.1"], _V3),
    **dict.fromkeys(["Kimi-K2-Base", "Kimi-K2-Instruct"], _K2),
    "Kimi-K2-Instruct-0905": _size(*_K2_SIZES, 262_144, _yarn(5e4, 64.0, 1.0), **MSCALES),
    **dict.fromkeys(["Moonlight-16B-A3B", "Moonlight-16B-A3B-Instruct"], replace(_MOONLIGHT, norm_eps=1e-5)),
}


def _names(names: HubNames) -> HubNames:
    latent = {r"\.(q|kv)_a_norm\b": r".\1_a_layernorm", r"\.kv_a_proj\b": ".kv_a_proj_with_mqa"}
    return replace(names, renamed=names.renamed | latent, stacked=names.stacked and _names(names.stacked))


HUB = _names(glm4_moe.HUB)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, DeepseekV3Config)
    scale = c.head_dim**-0.5
    if isinstance(c.rope, YarnRope) and c.mscale_all_dim:
        scale *= yarn_scale(c.rope.factor, c.mscale_all_dim) ** 2
    attn = LatentAttention(
        c.dim,
        c.num_heads,
        plain_dim=c.head_dim - c.rope_dim,
        rope_dim=c.rope_dim,
        value_dim=c.value_dim,
        latent=c.latent,
        query_latent=c.query_latent,
        scale=scale,
        interleaved=c.interleaved,
        bias=c.attention_bias,
    )
    return Block(
        attn,
        mlp(c, i),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
        sight=Sight(head_dim=c.head_dim),
    )


def build(c: DeepseekV3Config) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> DeepseekV3Config:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what DeepSeek V3 does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    one_of(json, "scoring_func", "sigmoid", default="sigmoid")
    one_of(json, "topk_method", "noaux_tc", default="noaux_tc")
    one_of(json, "moe_layer_freq", 1, default=1)
    rope_dim = field(json, "qk_rope_head_dim", int, default=64)
    head_dim = field(json, "qk_nope_head_dim", int, default=128) + rope_dim
    for key in ("head_dim", "qk_head_dim"):  # as transformers writes them, from the two above
        one_of(json, key, rope_dim, head_dim, None, default=None)
    section = json.get("rope_parameters") or json.get("rope_scaling") or {}
    has_query_latent = "q_lora_rank" not in json or json.get("q_lora_rank") is not None
    shape = sizes(json, context=4096, head_dim=head_dim) | {"head_dim": head_dim}
    return DeepseekV3Config(
        **shape,
        rope=rope_from_hub(json, partial=rope_dim / head_dim),
        **experts_from_hub(json, num_experts=256, num_dense=3, scale=2.5, groups=(8, 4)),
        value_dim=field(json, "v_head_dim", int, default=128),
        latent=field(json, "kv_lora_rank", int, default=512),
        query_latent=field(json, "q_lora_rank", int, default=1536) if has_query_latent else None,
        interleaved=field(json, "rope_interleave", bool, default=True),
        mscale=field(section, "mscale", float) if section.get("mscale") else 0.0,
        mscale_all_dim=field(section, "mscale_all_dim", float) if section.get("mscale_all_dim") else 0.0,
        attention_bias=field(json, "attention_bias", bool, default=False),
    )


def to_hub(c: DeepseekV3Config) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    rope = rope_to_hub(replace(c.rope, partial=1.0))
    if c.mscale:
        rope["rope_scaling"] |= {"mscale": c.mscale, "mscale_all_dim": c.mscale_all_dim}
    fields = sizes_to_hub(c, "DeepseekV3ForCausalLM", "deepseek_v3")
    del fields["head_dim"]
    return {
        **fields,
        **experts_to_hub(c),
        "qk_rope_head_dim": c.rope_dim,
        "qk_nope_head_dim": c.head_dim - c.rope_dim,
        "v_head_dim": c.value_dim,
        "kv_lora_rank": c.latent,
        "q_lora_rank": c.query_latent,
        "rope_interleave": c.interleaved,
        "attention_bias": c.attention_bias,
        "hidden_act": "silu",
        **rope,
    }
