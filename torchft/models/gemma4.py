"""Gemma 4, the dense text models (12B, 31B, E2B, E4B): Gemma 3's layout with plain norm weights, normed values,
unscaled scores and a factor for each layer; layers that see all have wider heads, in the large models fewer of them for
keys, which serve as values. E2B and E4B add to each layer a vector of the token, and their last layers read keys and
values of earlier ones.

Weights: https://huggingface.co/google
"""

import math
from dataclasses import dataclass
from typing import Any

from torchft.errors import UserError
from torchft.hub_names import HubNames
from torchft.models import gemma2
from torchft.models.config_json import field, one_of, optional, sizes, sizes_to_hub, windows, windows_to_hub
from torchft.models.config_rope import ropes_from_hub, section_to_hub
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.mlp import GELU_TANH, GatedMLP
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import ProportionalRope, Rope
from torchft.modules.shared_kv import PerLayerBlock, PerLayerDecoder, SharedKVAttention


@dataclass(frozen=True, kw_only=True)
class Gemma4Config(DecoderConfig):
    """``num_kv_heads``, ``head_dim`` and ``local_rope`` are of layers with a window, those with full_ of the others."""

    local_rope: Rope
    full_num_kv_heads: int
    full_head_dim: int
    full_shares_kv: bool  # keys are the values, too
    num_readers: int = 0  # the last layers, which read keys and values of the last layer of their kind before them
    has_wide_readers: bool = False  # their MLPs are twice as wide
    input_dim: int = 0  # of each layer's own vector of a token; 0: none
    attention_bias: bool = False
    logit_soft_cap: float | None = None

    def source(self, i: int) -> int:
        """The layer whose keys and values layer ``i`` reads; ``i`` where they are its own."""
        first = self.num_layers - self.num_readers
        same = [j for j in range(first) if (self.window(j) is None) == (self.window(i) is None)]
        return i if i < first else same[-1]


LOCAL, FULL = Rope(base=10_000.0), ProportionalRope(base=1_000_000.0, partial=0.25)


def _elastic(dim: int, num_layers: int, every: int, num_kv_heads: int, hidden_dim: int, readers: int) -> Gemma4Config:
    return Gemma4Config(
        vocab_size=262_144, dim=dim, num_layers=num_layers, num_heads=8, num_kv_heads=num_kv_heads, head_dim=256,
        hidden_dim=hidden_dim, max_seq_len=131_072, norm_eps=1e-6, rope=FULL, local_rope=LOCAL, tie_embeddings=True,
        windows=tuple(512 if (i + 1) % every else None for i in range(num_layers)), full_num_kv_heads=num_kv_heads,
        full_head_dim=512, full_shares_kv=False, num_readers=readers, has_wide_readers=every == 5, input_dim=256,
        logit_soft_cap=30.0,
    )  # fmt: skip


def _large(
    dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int, full_num_kv_heads: int
) -> Gemma4Config:
    return Gemma4Config(
        vocab_size=262_144, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=256, hidden_dim=hidden_dim, max_seq_len=262_144, norm_eps=1e-6, rope=FULL, local_rope=LOCAL,
        tie_embeddings=True, windows=tuple(1024 if (i + 1) % 6 else None for i in range(num_layers)),
        full_num_kv_heads=full_num_kv_heads, full_head_dim=512, full_shares_kv=True, logit_soft_cap=30.0,
    )  # fmt: skip


CONFIGS = {
    #                        dim layers full kv hidden readers
    "gemma-4-E2B": _elastic(1536, 35, 5, 1, 6144, 20),
    "gemma-4-E4B": _elastic(2560, 42, 6, 2, 10_240, 18),
    "gemma-4-12B": _large(3840, 48, 16, 8, 15_360, 1),
    "gemma-4-31B": _large(5376, 60, 32, 16, 21_504, 4),
}  # fmt: skip

HUB = HubNames(
    gemma2.HUB.renamed | {r"\.per_layer_norm\b": ".post_per_layer_input_norm"},
    unread=r"\.self_attn\.[kv]_(proj|norm)\.",  # released files have them all the same
)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Gemma4Config)
    is_full, reads = c.window(i) is None, c.source(i) != i
    head_dim = c.full_head_dim if is_full else c.head_dim
    attn = SharedKVAttention(
        c.dim,
        c.num_heads,
        c.full_num_kv_heads if is_full else c.num_kv_heads,
        head_dim,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        shares_kv=is_full and c.full_shares_kv,
        reads=reads,
        stores=not reads and any(c.source(j) == i for j in range(i + 1, c.num_layers)),
        eps=c.norm_eps,
        q_norm=RMSNorm(head_dim, c.norm_eps),
        k_norm=RMSNorm(head_dim, c.norm_eps),
        scale=1.0,
    )
    return PerLayerBlock(
        attn,
        GatedMLP(c.dim, c.hidden_dim * (2 if reads and c.has_wide_readers else 1), act=GELU_TANH),
        dim=c.dim,
        input_dim=c.input_dim,
        eps=c.norm_eps,
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        attn_post_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_post_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope if is_full else c.local_rope,
        sight=Sight(window=c.window(i), head_dim=head_dim),
    )


def build(c: Gemma4Config) -> Decoder:
    return PerLayerDecoder(
        c,
        block,
        RMSNorm(c.dim, c.norm_eps),
        input_dim=c.input_dim,
        sources=[c.source(i) for i in range(c.num_layers)],
        embed_scale=math.sqrt(c.dim),
        logit_soft_cap=c.logit_soft_cap,
    )


def from_hub(json: dict[str, Any]) -> Gemma4Config:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Gemma 4 does not have."""
    one_of(json, "hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    one_of(json, "use_bidirectional_attention", None, "vision", default=None)  # of images, not of text
    one_of(json, "enable_moe_block", False, default=False)
    full, local = ropes_from_hub(json, full=FULL, sliding=LOCAL)
    if type(full) is Rope and full.partial != 1.0:
        raise UserError(
            "config.json: rope_parameters.full_attention has a partial_rotary_factor, which Gemma 4 reads of rope_type "
            "'proportional' alone"
        )
    num_layers = field(json, "num_hidden_layers", int)
    base = sizes(json, tied=True, context=131_072, head_dim=256)
    shares = field(json, "attention_k_eq_v", bool, default=False)
    layer_windows = windows(json, lambda i: (i + 1) % 6 != 0 and i + 1 < num_layers, size=512)
    num_kv_heads, head_dim = _full_layers(json, [i for i, window in enumerate(layer_windows) if window is None], shares)
    if num_kv_heads and base["num_heads"] % num_kv_heads:
        raise UserError(
            f"config.json: num_attention_heads ({base['num_heads']}) is not a multiple of num_global_key_value_heads "
            f"({num_kv_heads})"
        )
    return Gemma4Config(
        **base,
        rope=full,
        local_rope=local,
        windows=layer_windows,
        full_num_kv_heads=num_kv_heads or base["num_kv_heads"],
        full_head_dim=head_dim,
        full_shares_kv=shares,
        **_elastic_from_hub(json, base["vocab_size"], layer_windows),
        attention_bias=field(json, "attention_bias", bool, default=False),
        logit_soft_cap=optional(json, "final_logit_softcapping", float),
    )


def _elastic_from_hub(json: dict[str, Any], vocab_size: int, layer_windows: tuple[int | None, ...]) -> dict[str, Any]:
    """The fields of E2B and E4B; transformers' defaults are those of neither."""
    num_layers, num_rows = field(json, "num_hidden_layers", int), json.get("vocab_size_per_layer_input", 262_144)
    has_inputs = json.get("architectures") != ["Gemma4UnifiedForCausalLM"]  # 12B's, whose config does not speak of them
    readers = json.get("num_kv_shared_layers", 0)
    input_dim = json.get("hidden_size_per_layer_input", 256 if has_inputs else 0)
    kinds = [window is None for window in layer_windows or (None,) * num_layers]
    if readers not in range(num_layers) or {*kinds[num_layers - readers :]} - {*kinds[: num_layers - readers]}:
        raise UserError(
            f"config.json: num_kv_shared_layers is {readers!r}, but before these layers there must be one of each kind "
            "among them"
        )
    if input_dim and num_rows != vocab_size:
        raise UserError(f"config.json: vocab_size_per_layer_input is {num_rows!r}, not vocab_size ({vocab_size})")
    return {
        "num_readers": readers,
        "has_wide_readers": field(json, "use_double_wide_mlp", bool, default=False),
        "input_dim": field(json, "hidden_size_per_layer_input", int, default=256) if input_dim else 0,
    }


def _full_layers(json: dict[str, Any], full: list[int], shares: bool) -> tuple[int | None, int]:
    """Heads for keys (None: as other layers) and head size of the layers ``full``, in either of the two spellings."""
    layers = json.get("per_layer_config")
    if layers is None:  # as released
        few = optional(json, "num_global_key_value_heads", int)
        return few if shares else None, field(json, "global_head_dim", int, default=512)
    if layers == {}:
        return None, field(json, "head_dim", int, default=256)  # no layer differs
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
        "hidden_size_per_layer_input": c.input_dim,
        "vocab_size_per_layer_input": c.vocab_size,
        "num_kv_shared_layers": c.num_readers,
        "use_double_wide_mlp": c.has_wide_readers,
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
