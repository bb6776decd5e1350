"""Qwen 3.5 text, dense and with experts: Qwen 3 Next with DeltaNet's projections in plain order. Of the multimodal
checkpoints the text model, whose three-dimensional RoPE is the plain one for text.

Weights: https://huggingface.co/Qwen
"""

from typing import Any

from torchft.models import qwen3_next
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.models.qwen3_next import HUB, Qwen3NextConfig, block, build, mixers_from_hub  # noqa: F401
from torchft.modules.rope import Rope

DENSE, MOE = "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"


def _size(
    dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int, delta_heads: int, **more: Any
) -> Qwen3NextConfig:
    return Qwen3NextConfig(
        vocab_size=248_320, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=256, hidden_dim=hidden_dim, max_seq_len=262_144, norm_eps=1e-6, rope=Rope(base=1e7, partial=0.25),
        is_recurrent=tuple((i + 1) % 4 != 0 for i in range(num_layers)), delta_heads=delta_heads, is_grouped=False,
        **more,
    )  # fmt: skip


def _experts(num_experts: int, top_k: int, expert_dim: int) -> dict[str, Any]:
    return {"num_experts": num_experts, "top_k": top_k, "expert_dim": expert_dim, "shared_dim": expert_dim}


CONFIGS = {
    #                       dim layers heads kv hidden delta heads
    "Qwen3.5-0.8B":      _size(1024, 24,  8, 2,  3_584, 16, tie_embeddings=True),
    "Qwen3.5-2B":        _size(2048, 24,  8, 2,  6_144, 16, tie_embeddings=True),
    "Qwen3.5-4B":        _size(2560, 32, 16, 4,  9_216, 32, tie_embeddings=True),
    "Qwen3.5-9B":        _size(4096, 32, 16, 4, 12_288, 32),
    "Qwen3.5-27B":       _size(5120, 64, 24, 4, 17_408, 48),
    "Qwen3.5-35B-A3B":   _size(2048, 40, 16, 2,    512, 32, **_experts(256, 8, 512)),
    "Qwen3.5-122B-A10B": _size(3072, 48, 32, 2,  1_024, 64, **_experts(256, 8, 1024)),
    "Qwen3.5-397B-A17B": _size(4096, 60, 32, 2,  1_024, 64, **_experts(512, 10, 1024)),
}  # fmt: skip


def from_hub(json: dict[str, Any]) -> Qwen3NextConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Qwen 3.5 does not have."""
    section = json.get("rope_parameters") or {}
    for key in ("mrope_section", "mrope_interleaved"):  # how images' positions are spread; text has one position
        section.get(key)
    for key in ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"):  # not of what is trained
        json.get(key)
    one_of(json, "mlp_only_layers", [], None, default=[])
    one_of(json, "norm_topk_prob", True, default=True)
    one_of(json, "attn_output_gate", True, default=True)
    experts: dict[str, Any] = {}
    if json["architectures"] == [MOE]:
        expert_dim = field(json, "moe_intermediate_size", int, default=512)
        experts = {
            "num_experts": field(json, "num_experts", int, default=field(json, "num_local_experts", int, default=256)),
            "top_k": field(json, "num_experts_per_tok", int, default=8),
            "expert_dim": expert_dim,
            "shared_dim": field(json, "shared_expert_intermediate_size", int, default=512),
        }
    return Qwen3NextConfig(
        **sizes(json, context=32_768, head_dim=256, hidden=experts.get("expert_dim")),  # with experts, of no MLP
        **mixers_from_hub(json),
        **experts,
        rope=rope_from_hub(json, partial=0.25),
        is_grouped=False,
    )


def to_hub(c: Qwen3NextConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    names = (MOE, "qwen3_5_moe_text") if c.num_experts else (DENSE, "qwen3_5_text")
    experts = {
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.top_k,
        "moe_intermediate_size": c.expert_dim,
        "shared_expert_intermediate_size": c.shared_dim,
    }
    return {
        **sizes_to_hub(c, *names),
        **qwen3_next.mixers_to_hub(c),
        **(experts if c.num_experts else {}),
        **rope_to_hub(c.rope),
    }
