"""OLMo 3: OLMo 2's block with a window in three layers of four; long contexts by YaRN in the others alone.

Paper: https://arxiv.org/abs/2512.13961. Weights: https://huggingface.co/allenai
"""

from dataclasses import dataclass
from typing import Any

from torchft.models import olmo2
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub, windows, windows_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub, ropes_from_hub
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope, YarnRope


@dataclass(frozen=True, kw_only=True)
class Olmo3Config(olmo2.Olmo2Config):
    local_rope: Rope  # of layers with a window


ROPE = Rope(base=500_000.0)
YARN = YarnRope(base=500_000.0, factor=8.0, original_max_seq_len=8192, attention_factor=1.2079441541679836)


def _size(dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int) -> Olmo3Config:
    return Olmo3Config(
        vocab_size=100_278, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=128, hidden_dim=hidden_dim, max_seq_len=65_536, norm_eps=1e-6, rope=YARN, local_rope=ROPE,
        windows=tuple(4096 if (i + 1) % 4 else None for i in range(num_layers)),
    )  # fmt: skip


CONFIGS = {
    #                            dim layers heads kv hidden
    "Olmo-3-1025-7B":    _size(4096, 32, 32, 32, 11_008),
    "Olmo-3-1125-32B":   _size(5120, 64, 40,  8, 27_648),
}  # fmt: skip

HUB = olmo2.HUB


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Olmo3Config)
    made = olmo2.block(c, i)
    made.sight = Sight(window=c.window(i))
    made.rope = c.rope if c.window(i) is None else c.local_rope
    return made


def build(c: Olmo3Config) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> Olmo3Config:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what OLMo 3 does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    local = Rope(base=field(json, "rope_theta", float, default=500_000.0))
    full = local if json.get("rope_parameters") else rope_from_hub(json, base=500_000.0)
    full, local = ropes_from_hub(json, full=full, sliding=local)
    return Olmo3Config(
        **sizes(json, eps=1e-5, context=2048),
        rope=full,
        local_rope=local,
        windows=windows(json, lambda i: (i + 1) % 4 != 0, size=4096),
        attention_bias=field(json, "attention_bias", bool, default=False),
    )


def to_hub(c: Olmo3Config) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    assert c.rope.base == c.local_rope.base
    return {
        **sizes_to_hub(c, "Olmo3ForCausalLM", "olmo3"),
        **windows_to_hub(c),
        "attention_bias": c.attention_bias,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
