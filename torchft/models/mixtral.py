"""Mixtral: Mistral's block with a mixture of 8 experts, 2 of them for each token, in place of the MLP.

Paper: https://arxiv.org/abs/2401.04088. Weights: https://huggingface.co/mistralai
"""

from dataclasses import dataclass
from typing import Any

from torchft.hub_names import STACKED, HubNames
from torchft.models import llama3
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub, windows, windows_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.moe import Experts, MoE
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope
from torchft.modules.routers import SoftmaxRouter


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(DecoderConfig):
    """``hidden_dim`` is an expert's."""

    num_experts: int
    top_k: int  # experts per token


def _size(vocab: int, dim: int, num_layers: int, num_heads: int, hidden_dim: int, context: int) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=vocab, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=8, head_dim=128,
        hidden_dim=hidden_dim, max_seq_len=context, rope=Rope(base=1e6), num_experts=8, top_k=2,
    )  # fmt: skip


CONFIGS = {
    #                               vocab   dim layers heads hidden context
    "Mixtral-8x7B-v0.1":           _size(32_000, 4096, 32, 32, 14_336, 32_768),
    "Mixtral-8x7B-Instruct-v0.1":  _size(32_000, 4096, 32, 32, 14_336, 32_768),
    "Mixtral-8x22B-v0.1":          _size(32_000, 6144, 56, 48, 16_384, 65_536),
    "Mixtral-8x22B-Instruct-v0.1": _size(32_768, 6144, 56, 48, 16_384, 65_536),
}  # fmt: skip

HUB = HubNames(
    llama3.HUB.renamed
    | {
        r"\.mlp\b": ".block_sparse_moe",
        r"\.router\b": ".gate",
        r"\.gate_proj\b": ".w1",
        r"\.down_proj\b": ".w2",
        r"\.up_proj\b": ".w3",
    },
    per_expert=r"\.experts\b",
    split={"gate_up_proj": ("gate_proj", "up_proj")},
    stacked=HubNames(llama3.HUB.renamed | {r"\.router\b": ".gate"} | STACKED),
)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, MixtralConfig)
    return Block(
        Attention(c.dim, c.num_heads, c.num_kv_heads, c.head_dim),
        MoE(SoftmaxRouter(c.dim, c.num_experts, c.top_k), Experts(c.num_experts, c.dim, c.hidden_dim)),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
        sight=Sight(window=c.window(i)),
    )


def build(c: MixtralConfig) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> MixtralConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Mixtral does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    one_of(json, "router_jitter_noise", 0.0, None, default=0.0)
    return MixtralConfig(
        **sizes(json, eps=1e-5, context=131_072),
        rope=rope_from_hub(json, base=1e6),
        windows=windows(json, lambda i: True),
        num_experts=field(json, "num_local_experts", int, default=8),
        top_k=field(json, "num_experts_per_tok", int, default=2),
    )


def to_hub(c: MixtralConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "MixtralForCausalLM", "mixtral"),
        "sliding_window": windows_to_hub(c)["sliding_window"],
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.top_k,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
