"""Phi 3, 3.5 (mini, medium) and 4 (also mini and reasoning): Llama's block; on the Hub q, k, v and gate, up are one
matrix each. The long-context ones rotate by LongRoPE, Phi 4 mini only three quarters of a head.

Papers: https://arxiv.org/abs/2404.14219, https://arxiv.org/abs/2503.01743. Weights: https://huggingface.co/microsoft
"""

from typing import Any

from torchft.hub_names import HubNames
from torchft.models import llama3, mistral
from torchft.models.config_json import one_of, sizes, sizes_to_hub, windows, windows_to_hub
from torchft.models.config_rope import longrope_scale, rope_from_hub, rope_to_hub
from torchft.modules.decoder import DecoderConfig
from torchft.modules.rope import LongRope, Rope


def _size(
    vocab_size: int, dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int, context: int,
    rope: Rope, window: int | None = None, tied: bool = False,
) -> DecoderConfig:  # fmt: skip
    return DecoderConfig(
        vocab_size=vocab_size, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=dim // num_heads, hidden_dim=hidden_dim, max_seq_len=context, rope=rope, tie_embeddings=tied,
        windows=() if window is None else (window,) * num_layers,
    )  # fmt: skip


# LongRoPE's factors, one for each pair of channels.
# fmt: off
PHI_35_SHORT = (
    1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705, *(1.0499999523162842,) * 5, 1.0699999332427979,
    1.0999999046325684, 1.1099998950958252, 1.1599998474121094, 1.1599998474121094, 1.1699998378753662,
    1.2899998426437378, 1.339999794960022, 1.679999828338623, 1.7899998426437378, 1.8199998140335083,
    1.8499997854232788, 1.8799997568130493, 1.9099997282028198, 1.9399996995925903, 1.9899996519088745,
    *(2.0199997425079346,) * 6, *(2.0299997329711914,) * 9, 2.0799996852874756, 2.0899996757507324, 2.189999580383301,
    2.2199995517730713, 2.5899994373321533, 2.729999542236328, 2.749999523162842, 2.8399994373321533,
)
PHI_35_LONG = (
    1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115,
    1.600000023841858, 1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863,
    4.789999961853027, 7.400000095367432, 7.700000286102295, 9.09000015258789, 12.199999809265137, 17.670000076293945,
    24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523, 32.590003967285156,
    32.93000411987305, 42.320003509521484, 44.96000289916992, 50.340003967285156, 50.45000457763672, 57.55000305175781,
    57.93000411987305, 58.21000289916992, 60.1400032043457, 62.61000442504883, 62.62000274658203, 62.71000289916992,
    63.1400032043457, 63.1400032043457, 63.77000427246094, 63.93000411987305, 63.96000289916992, 63.970001220703125,
    64.02999877929688, 64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938, 64.4800033569336,
    64.51000213623047, 64.52999877929688, 64.83999633789062,
)
PHI_4_LONG = (
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
    6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215,
    18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64,
    32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
)
# fmt: on


def _long(short: tuple[float, ...], long: tuple[float, ...], partial: float = 1.0) -> LongRope:
    """From 4k to 128k tokens."""
    return LongRope(
        partial=partial,
        short_factors=short,
        long_factors=long,
        original_max_seq_len=4096,
        attention_factor=longrope_scale(131_072 / 4096, 4096),
    )


PLAIN, PHI_4 = Rope(), Rope(base=250_000.0)
PHI_35 = _long(PHI_35_SHORT, PHI_35_LONG)
PHI_4_MINI = _long((1.0,) * 48, PHI_4_LONG, partial=0.75)

CONFIGS = {
    #                                    vocab   dim layers heads kv hidden context  rope  window
    "Phi-3-mini-4k-instruct":   _size( 32_064, 3072, 32, 32, 32,  8_192,   4_096, PLAIN, 2047),
    "Phi-3-medium-4k-instruct": _size( 32_064, 5120, 40, 40, 10, 17_920,   4_096, PLAIN, 2047),
    "phi-4":                    _size(100_352, 5120, 40, 40, 10, 17_920,  16_384, PHI_4),
    "Phi-3.5-mini-instruct":    _size( 32_064, 3072, 32, 32, 32,  8_192, 131_072, PHI_35, 262_144),
    "Phi-4-mini-instruct":      _size(200_064, 3072, 32, 24,  8,  8_192, 131_072, PHI_4_MINI, 262_144, tied=True),
}  # fmt: skip

HUB = HubNames(
    llama3.HUB.renamed,
    fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
)


block, build = mistral.block, mistral.build


def from_hub(json: dict[str, Any]) -> DecoderConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Phi does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    json.get("original_max_position_embeddings")  # LongRoPE's, and without effect otherwise
    one_of(json, "full_attn_mod", 1, default=1)
    one_of(json, "interpolate_factor", 1, default=1)
    rope = rope_from_hub(json)
    return DecoderConfig(
        **sizes(json, eps=1e-5, context=4096),
        rope=rope,
        windows=windows(json, lambda i: True),
    )


def to_hub(c: DecoderConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    context = c.rope.original_max_seq_len if isinstance(c.rope, LongRope) else c.max_seq_len
    return {
        **sizes_to_hub(c, "Phi3ForCausalLM", "phi3"),
        "sliding_window": windows_to_hub(c)["sliding_window"],
        "original_max_position_embeddings": context,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }
