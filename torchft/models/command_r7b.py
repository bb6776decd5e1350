"""Command R7B: attention and MLP side by side behind one LayerNorm; three layers with a window and interleaved RoPE to
each that sees all and has no positions.

Paper: https://arxiv.org/abs/2504.00698. Weights: https://huggingface.co/CohereLabs
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from torchft.hub_names import HubNames
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub, windows, windows_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig, ParallelBlock
from torchft.modules.masks import Sight
from torchft.modules.mlp import GatedMLP
from torchft.modules.rope import Rope


@dataclass(frozen=True, kw_only=True)
class CommandR7BConfig(DecoderConfig):
    logit_scale: float
    attention_bias: bool = False


CONFIGS = {
    "c4ai-command-r7b-12-2024": CommandR7BConfig(
        vocab_size=256_000, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, hidden_dim=14_336,
        max_seq_len=132_096, rope=Rope(base=50_000.0), tie_embeddings=True, logit_scale=0.25,
        windows=tuple(4096 if (i + 1) % 4 else None for i in range(32)),
    ),
}  # fmt: skip

HUB = HubNames({r"^(?!lm_head)": "model.", r"\.attn_norm\b": ".input_layernorm"})


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, CommandR7BConfig)
    attn = Attention(
        c.dim,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        interleaved=True,
    )
    return ParallelBlock(
        attn,
        GatedMLP(c.dim, c.hidden_dim),
        attn_norm=nn.LayerNorm(c.dim, c.norm_eps, bias=False),
        mlp_norm=None,
        rope=None if c.window(i) is None else c.rope,
        sight=Sight(window=c.window(i)),
    )


def build(c: CommandR7BConfig) -> Decoder:
    return Decoder(c, block, nn.LayerNorm(c.dim, c.norm_eps, bias=False), logit_scale=c.logit_scale)


# What the released file says in words of its own, about what all of the family do.
SAID = {
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_qk_norm": False,
}


def from_hub(json: dict[str, Any]) -> CommandR7BConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Command R7B does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    json.get("use_parallel_embedding")  # how it was trained
    for key, value in SAID.items():
        one_of(json, key, value, default=value)
    every = field(json, "sliding_window_pattern", int, default=field(json, "layer_switch", int, default=4))
    return CommandR7BConfig(
        **sizes(json, eps=1e-5, eps_key="layer_norm_eps", tied=True, context=8192),
        rope=rope_from_hub(json),
        windows=windows(json, lambda i: (i + 1) % every != 0, size=4096),
        logit_scale=field(json, "logit_scale", float, default=0.0625),
        attention_bias=field(json, "attention_bias", bool, default=False),
    )


def to_hub(c: CommandR7BConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    json = sizes_to_hub(c, "Cohere2ForCausalLM", "cohere2")
    eps = json.pop("rms_norm_eps")
    return {
        **json,
        **windows_to_hub(c),
        "layer_norm_eps": eps,
        "logit_scale": c.logit_scale,
        "attention_bias": c.attention_bias,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
