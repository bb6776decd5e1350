"""gpt-oss: sinks in the attention's softmax, a window in every other layer, YaRN, biases everywhere, and experts whose
gated units are clamped. Their weights come in MXFP4 and are dequantised when they are read.

Paper: https://arxiv.org/abs/2508.10925. Weights: https://huggingface.co/openai
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchft.hub_names import HubNames
from torchft.models import llama3
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub, windows, windows_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.moe import Experts, MoE
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import YarnRope
from torchft.modules.routers import ChosenSoftmaxRouter


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(DecoderConfig):
    """``hidden_dim`` is an expert's."""

    num_experts: int
    top_k: int = 4  # experts per token
    attention_bias: bool = True
    alpha: float = 1.702  # sigmoid(alpha * gate), near GELU
    limit: float = 7.0  # of gates, and of the other half on both sides


def _size(num_layers: int, num_experts: int) -> GptOssConfig:
    return GptOssConfig(
        vocab_size=201_088, dim=2880, num_layers=num_layers, num_heads=64, num_kv_heads=8, head_dim=64,
        hidden_dim=2880, max_seq_len=131_072, num_experts=num_experts,
        rope=YarnRope(
            base=150_000.0, factor=32.0, original_max_seq_len=4096, attention_factor=1.3465735902799727, truncate=False
        ),
        windows=tuple(None if i % 2 else 128 for i in range(num_layers)),
    )  # fmt: skip


CONFIGS = {
    #              layers experts
    "gpt-oss-20b":  _size(24, 32),
    "gpt-oss-120b": _size(36, 128),
}  # fmt: skip

HUB = HubNames(
    llama3.HUB.renamed | {r"(\.experts\.\w+)\.weight$": r"\1", r"(\.experts\.\w+)\.bias$": r"\1_bias"},
    transposed=r"\.experts\.\w+\.weight$",
)


def clamped_swiglu(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate) of [..., 2 f], gates and ups in turn and bounded -> [..., f]."""
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, GptOssConfig)
    attn = Attention(
        c.dim, c.num_heads, c.num_kv_heads, c.head_dim, bias=c.attention_bias, out_bias=c.attention_bias, has_sinks=True
    )
    act = partial(clamped_swiglu, alpha=c.alpha, limit=c.limit)
    return Block(
        attn,
        MoE(
            ChosenSoftmaxRouter(c.dim, c.num_experts, c.top_k, bias=True),
            Experts(c.num_experts, c.dim, c.hidden_dim, act=act, bias=True),
        ),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
        sight=Sight(window=c.window(i)),
    )


def build(c: GptOssConfig) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> GptOssConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what gpt-oss does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    for key in ("initial_context_length", "experts_per_token"):  # said by rope_scaling and num_experts_per_tok, too
        json.get(key)
    return GptOssConfig(
        **sizes(json, eps=1e-5, context=131_072, head_dim=64),
        rope=rope_from_hub(json, base=150_000.0),
        windows=windows(json, lambda i: i % 2 == 0, size=128),
        num_experts=field(json, "num_local_experts", int, default=128),
        top_k=field(json, "num_experts_per_tok", int, default=4),
        attention_bias=field(json, "attention_bias", bool, default=True),
        alpha=field(json, "swiglu_alpha", float, default=1.702),
        limit=field(json, "swiglu_limit", float, default=7.0),
    )


def to_hub(c: GptOssConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "GptOssForCausalLM", "gpt_oss"),
        **windows_to_hub(c),
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.top_k,
        "attention_bias": c.attention_bias,
        "swiglu_limit": c.limit,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
