"""SmolLM 3: Llama's block, without positions in every fourth layer (NoPE, https://arxiv.org/abs/2501.18795).

Paper: https://huggingface.co/blog/smollm3. Weights: https://huggingface.co/HuggingFaceTB
"""

from dataclasses import dataclass
from typing import Any

from torchft.errors import UserError
from torchft.models import llama3
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub, windows, windows_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.mlp import GatedMLP
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope


@dataclass(frozen=True, kw_only=True)
class SmolLM3Config(DecoderConfig):
    has_rope: tuple[bool, ...]  # of each layer
    attention_bias: bool = False
    mlp_bias: bool = False


def _size(context: int, base: float) -> SmolLM3Config:
    return SmolLM3Config(
        vocab_size=128_256, dim=2048, num_layers=36, num_heads=16, num_kv_heads=4, head_dim=128, hidden_dim=11_008,
        max_seq_len=context, norm_eps=1e-6, rope=Rope(base=base), tie_embeddings=True,
        has_rope=tuple((i + 1) % 4 != 0 for i in range(36)),
    )  # fmt: skip


CONFIGS = {
    #                       context       base
    "SmolLM3-3B-Base": _size(65_536, 5_000_000.0),
    "SmolLM3-3B":      _size(65_536, 5_000_000.0),
}  # fmt: skip

HUB = llama3.HUB


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, SmolLM3Config)
    return Block(
        Attention(c.dim, c.num_heads, c.num_kv_heads, c.head_dim, bias=c.attention_bias, out_bias=c.attention_bias),
        GatedMLP(c.dim, c.hidden_dim, bias=c.mlp_bias),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope if c.has_rope[i] else None,
        sight=Sight(window=c.window(i)),
    )


def build(c: SmolLM3Config) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> SmolLM3Config:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what SmolLM 3 does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    json.get("max_window_layers")  # Qwen's word, without meaning here
    has_rope = layers_with_rope(json)
    slides = field(json, "use_sliding_window", bool, default=False)  # counts where there are no layer_types
    return SmolLM3Config(
        **sizes(json, tied=True, context=32_768),
        rope=rope_from_hub(json, base=2_000_000.0),
        windows=windows(json, lambda i: slides and not has_rope[i]),
        has_rope=has_rope,
        attention_bias=field(json, "attention_bias", bool, default=False),
        mlp_bias=field(json, "mlp_bias", bool, default=False),
    )


def layers_with_rope(json: dict[str, Any]) -> tuple[bool, ...]:
    """``no_rope_layers``, in which 1 means that a layer has RoPE; else all but each ``no_rope_layer_interval``-th."""
    num_layers = field(json, "num_hidden_layers", int)
    every = field(json, "no_rope_layer_interval", int, default=4)
    marks = json.get("no_rope_layers")
    if marks is None:
        return tuple((i + 1) % every != 0 for i in range(num_layers))
    if not isinstance(marks, list) or len(marks) < num_layers or any(mark not in (0, 1) for mark in marks):
        raise UserError(
            f"config.json: no_rope_layers is {marks!r:.80}, expected a 0 or 1 for each of {num_layers} layers"
        )
    return tuple(mark == 1 for mark in marks[:num_layers])


def to_hub(c: SmolLM3Config) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "SmolLM3ForCausalLM", "smollm3"),
        **windows_to_hub(c),
        "use_sliding_window": bool(c.windows),
        "no_rope_layers": [int(has) for has in c.has_rope],
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
