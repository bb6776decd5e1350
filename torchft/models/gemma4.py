"""Gemma 4, the dense text model (31B): Gemma 3's layout with plain norm weights, normed values, unscaled scores and a
factor for each layer; layers that see all have wider heads, fewer of them for keys, and keys that serve as values.

Weights: https://huggingface.co/google
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchft.errors import UserError
from torchft.hub_names import HubNames
from torchft.models import gemma2
from torchft.models.config_json import field, one_of, optional, sizes, sizes_to_hub, windows, windows_to_hub
from torchft.models.config_rope import ropes_from_hub, section_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.kv_cache import LayerCache
from torchft.modules.masks import Sight, Visible
from torchft.modules.mlp import GELU_TANH, GatedMLP
from torchft.modules.norms import BareRMSNorm, RMSNorm
from torchft.modules.rope import ProportionalRope, Rope


@dataclass(frozen=True, kw_only=True)
class Gemma4Config(DecoderConfig):
    """``num_kv_heads``, ``head_dim`` and ``local_rope`` are of layers with a window, those with full_ of the others."""

    local_rope: Rope
    full_num_kv_heads: int
    full_head_dim: int
    full_shares_kv: bool  # keys are the values, too
    attention_bias: bool = False
    logit_soft_cap: float | None = None


LOCAL, FULL = Rope(base=10_000.0), ProportionalRope(base=1_000_000.0, partial=0.25)

CONFIGS = {
    "gemma-4-31B": Gemma4Config(
        vocab_size=262_144, dim=5376, num_layers=60, num_heads=32, num_kv_heads=16, head_dim=256, hidden_dim=21_504,
        max_seq_len=262_144, norm_eps=1e-6, rope=FULL, local_rope=LOCAL, tie_embeddings=True,
        windows=tuple(1024 if (i + 1) % 6 else None for i in range(60)), full_num_kv_heads=4, full_head_dim=512,
        full_shares_kv=True, logit_soft_cap=30.0,
    ),
}  # fmt: skip

HUB = HubNames(gemma2.HUB.renamed)


class ValueNormedAttention(Attention):
    """``Attention`` with values normed, in which keys may be the values, too, before they are normed and rotate."""

    def __init__(self, *sizes: int, shares_kv: bool, eps: float, **more: Any) -> None:
        super().__init__(*sizes, **more)
        self.shares_kv, self.v_norm = shares_kv, BareRMSNorm(eps)
        if shares_kv:
            del self.v_proj

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self.q_proj(x), self.k_proj(x)
        v = k if self.shares_kv else self.v_proj(x)
        return q, k, self.v_norm(v.unflatten(-1, (-1, self.head_dim))).flatten(-2)


class ScaledBlock(Block):
    """``Block``, whose output is multiplied by a factor that is not trained."""

    def __init__(self, attn: nn.Module, mlp: nn.Module, **more: Any) -> None:
        super().__init__(attn, mlp, **more)
        self.layer_scalar = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        seen: Visible,
        cache: LayerCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        return super().forward(x, cos, sin, seen, cache, positions) * self.layer_scalar


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Gemma4Config)
    is_full = c.window(i) is None
    head_dim = c.full_head_dim if is_full else c.head_dim
    attn = ValueNormedAttention(
        c.dim,
        c.num_heads,
        c.full_num_kv_heads if is_full else c.num_kv_heads,
        head_dim,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        shares_kv=is_full and c.full_shares_kv,
        eps=c.norm_eps,
        q_norm=RMSNorm(head_dim, c.norm_eps),
        k_norm=RMSNorm(head_dim, c.norm_eps),
        scale=1.0,
    )
    return ScaledBlock(
        attn,
        GatedMLP(c.dim, c.hidden_dim, act=GELU_TANH),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        attn_post_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_post_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope if is_full else c.local_rope,
        sight=Sight(window=c.window(i), head_dim=head_dim),
    )


def build(c: Gemma4Config) -> Decoder:
    norm = RMSNorm(c.dim, c.norm_eps)
    return Decoder(c, block, norm, embed_scale=math.sqrt(c.dim), logit_soft_cap=c.logit_soft_cap)


def from_hub(json: dict[str, Any]) -> Gemma4Config:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Gemma 4 does not have."""
    one_of(json, "hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    one_of(json, "use_bidirectional_attention", None, "vision", default=None)  # of images, not of text
    json.get("vocab_size_per_layer_input")  # without meaning in these sizes
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if (value := json.get(key, 256 if key.startswith("hidden") else 0)) != 0:
            raise UserError(
                f"config.json: {key} is {value!r}: per-layer embeddings and shared keys (Gemma 4 E2B and E4B) are not "
                "supported; gemma-4-31B is"
            )
    for key in ("enable_moe_block", "use_double_wide_mlp"):
        one_of(json, key, False, default=False)
    full, local = ropes_from_hub(json, full=FULL, sliding=LOCAL)
    base = sizes(json, tied=True, context=131_072, head_dim=256)
    shares = field(json, "attention_k_eq_v", bool, default=False)
    layer_windows = windows(json, lambda i: (i + 1) % 6 != 0, size=512)
    num_kv_heads, head_dim = _full_layers(json, [i for i, window in enumerate(layer_windows) if window is None], shares)
    return Gemma4Config(
        **base,
        rope=full,
        local_rope=local,
        windows=layer_windows,
        full_num_kv_heads=num_kv_heads or base["num_kv_heads"],
        full_head_dim=head_dim,
        full_shares_kv=shares,
        attention_bias=field(json, "attention_bias", bool, default=False),
        logit_soft_cap=optional(json, "final_logit_softcapping", float),
    )


def _full_layers(json: dict[str, Any], full: list[int], shares: bool) -> tuple[int | None, int]:
    """Heads for keys (None: as other layers) and head size of the layers ``full``, in either of the two spellings."""
    layers = json.get("per_layer_config")
    if layers is None:  # as released
        few = optional(json, "num_global_key_value_heads", int)
        return few if shares else None, field(json, "global_head_dim", int, default=512)
    found = [layers.get(str(i)) for i in full] if isinstance(layers, dict) else [None]
    first = found[0]
    if len(layers) != len(full) or first is None or any(other != first for other in found):
        raise UserError(
            f"config.json: per_layer_config is {layers!r:.80}, but this family has one head_dim and one "
            "num_key_value_heads for all layers without a window"
        )
    for layer in layers.values():
        layer.get("head_dim"), layer.get("num_key_value_heads")  # read, as all of them are equal
    return optional(first, "num_key_value_heads", int), field(first, "head_dim", int)


def to_hub(c: Gemma4Config) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "Gemma4ForCausalLM", "gemma4_text"),
        **windows_to_hub(c),
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": c.full_shares_kv,
        "num_global_key_value_heads": c.full_num_kv_heads,
        "global_head_dim": c.full_head_dim,
        "attention_bias": c.attention_bias,
        "final_logit_softcapping": c.logit_soft_cap,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {
            "full_attention": section_to_hub(c.rope),
            "sliding_attention": section_to_hub(c.local_rope),
        },
    }
