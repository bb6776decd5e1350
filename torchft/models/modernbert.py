"""ModernBERT: an encoder with Llama's kind of block: pre-norm, RoPE, gated GELU; two of three layers see 64 tokens to
each side and have a RoPE of their own. The first layer's attention takes the normed embeddings as they are.

Paper: https://arxiv.org/abs/2412.13663. Weights: https://huggingface.co/answerdotai
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from torchft.errors import UserError
from torchft.hub_names import HubNames
from torchft.models.config_json import field, one_of, sizes
from torchft.models.config_rope import ropes_from_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block
from torchft.modules.encoder import ClassHead, Encoder, EncoderConfig
from torchft.modules.masks import Sight
from torchft.modules.mlp import GatedMLP
from torchft.modules.rope import Rope


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig(EncoderConfig):
    local_rope: Rope  # of layers with a window
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    classifier_bias: bool = False  # of a head's first weight


def _size(dim: int, num_layers: int, num_heads: int, hidden_dim: int) -> ModernBertConfig:
    return ModernBertConfig(
        vocab_size=50_368, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads,
        head_dim=dim // num_heads, hidden_dim=hidden_dim, max_seq_len=8192, norm_eps=1e-5, rope=Rope(base=160_000.0),
        local_rope=Rope(base=10_000.0), windows=tuple(65 if i % 3 else None for i in range(num_layers)),
    )  # fmt: skip


CONFIGS = {
    #                         dim layers heads hidden
    "ModernBERT-base":  _size( 768, 22, 12, 1152),
    "ModernBERT-large": _size(1024, 28, 16, 2624),
}  # fmt: skip

HUB = HubNames(
    renamed={
        r"^embed_tokens\.": "embeddings.tok_embeddings.",
        r"^embed_norm\.": "embeddings.norm.",
        r"^norm\.": "final_norm.",
        r"\.self_attn\.": ".attn.",
        r"\.attn\.o_proj\.": ".attn.Wo.",
        r"\.mlp\.down_proj\.": ".mlp.Wo.",
        r"^lm_head\.(dense|norm)\.": r"head.\1.",
        r"^lm_head\.": "classifier.",
    },
    fused={"Wqkv": ("q_proj", "k_proj", "v_proj"), "Wi": ("gate_proj", "up_proj")},
    headed=(headed := {r"^(?!(head|classifier)\.)": "model."}),
    also=headed,
    ignored=r"^(head|decoder|classifier)\.",
)

WITHOUT_EFFECT = (  # of heads and of how it was trained
    "cls_token_id", "decoder_bias",
    "deterministic_flash_attn", "initializer_cutoff_factor", "layer_norm_eps", "reference_compile",
    "repad_logits_with_grad", "sparse_pred_ignore_index", "sparse_prediction", "gradient_checkpointing",
    "tie_word_embeddings",
)  # fmt: skip


def block(c: EncoderConfig, i: int) -> Block:
    assert isinstance(c, ModernBertConfig)
    bias = c.attention_bias
    return Block(
        Attention(c.dim, c.num_heads, c.num_kv_heads, c.head_dim, bias=bias, out_bias=bias),
        GatedMLP(c.dim, c.hidden_dim, act=F.gelu, bias=c.mlp_bias),
        attn_norm=_norm(c) if i else None,
        mlp_norm=_norm(c),
        rope=c.rope if c.window(i) is None else c.local_rope,
        sight=Sight(window=c.window(i), causal=False),
    )


def build(c: ModernBertConfig) -> Encoder:
    def head(num_scores: int) -> ClassHead:
        return ClassHead(c.dim, num_scores, act=F.gelu, bias=c.classifier_bias, norm=_norm(c))

    return Encoder(c, block, norm=_norm(c), embed_norm=_norm(c), head=head)


def _norm(c: ModernBertConfig) -> nn.LayerNorm:
    return nn.LayerNorm(c.dim, c.norm_eps, bias=c.norm_bias)


def from_hub(json: dict[str, Any]) -> ModernBertConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what ModernBERT does not have."""
    one_of(json, "hidden_activation", "gelu", default="gelu")
    one_of(json, "position_embedding_type", "absolute", "sans_pos", default="absolute")  # a word that nobody reads
    for key in ("attention_dropout", "embedding_dropout", "mlp_dropout", *WITHOUT_EFFECT):
        json.get(key)
    full, local = (
        Rope(base=field(json, key, float, default=base))
        for key, base in (("global_rope_theta", 160_000.0), ("local_rope_theta", 10_000.0))
    )
    full, local = ropes_from_hub(json, full=full, sliding=local)
    one_of(json, "classifier_activation", "gelu", default="gelu")
    biases = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")
    return ModernBertConfig(
        **sizes(json, eps=1e-5, eps_key="norm_eps", context=8192) | {"tie_embeddings": True},
        rope=full,
        local_rope=local,
        windows=_windows(json),
        pooling=one_of(json, "classifier_pooling", "cls", "mean", default="cls"),
        **{key: field(json, key, bool, default=False) for key in biases},
    )


def _windows(json: dict[str, Any]) -> tuple[int | None, ...]:
    """Of ``local_attention`` tokens half to each side, and the query's own."""
    num_layers, window = field(json, "num_hidden_layers", int), field(json, "local_attention", int, default=128) // 2
    every = field(json, "global_attn_every_n_layers", int, default=3)
    kinds = json.get("layer_types") or [
        "sliding_attention" if i % every else "full_attention" for i in range(num_layers)
    ]
    if len(kinds) != num_layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise UserError(
            f"config.json: layer_types must name num_hidden_layers ({num_layers}) times 'full_attention' or "
            f"'sliding_attention', found {kinds!r:.80}"
        )
    return tuple(window + 1 if kind == "sliding_attention" else None for kind in kinds)


def to_hub(c: ModernBertConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    window = next((w for w in c.windows if w), 65) - 1
    return {
        "architectures": ["ModernBertModel"],
        "model_type": "modernbert",
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.hidden_dim,
        "max_position_embeddings": c.max_seq_len,
        "norm_eps": c.norm_eps,
        "hidden_activation": "gelu",
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "norm_bias": c.norm_bias,
        "classifier_bias": c.classifier_bias,
        "classifier_pooling": c.pooling,
        "local_attention": 2 * window,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in c.windows],
        "global_rope_theta": c.rope.base,
        "local_rope_theta": c.local_rope.base,
    }
