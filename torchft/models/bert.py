"""BERT: an encoder with the first transformer's block, absolute positions and token types; many sentence encoders.

Without dropout, which the released files ask for: as the other families, it is trained without. Heads of pretraining
are left out; the pooler is the first half of a head that gives scores. Paper: https://arxiv.org/abs/1810.04805.
Weights: https://huggingface.co/google-bert
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torchft.hub_names import HubNames
from torchft.models.config_json import field, one_of, sizes
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block
from torchft.modules.encoder import ClassHead, Encoder, EncoderConfig, PostNormBlock
from torchft.modules.masks import Sight
from torchft.modules.mlp import MLP

DISREGARDED = (  # dropout, and sizes of what is left out
    "attention_probs_dropout_prob", "hidden_dropout_prob", "directionality", "gradient_checkpointing",
    "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
    "output_past",
)  # fmt: skip


def size(
    vocab_size: int, dim: int, num_layers: int, num_heads: int, hidden_dim: int, *, eps: float = 1e-12,
    num_positions: int = 512, first_position: int = 0, num_types: int = 2,
) -> EncoderConfig:  # fmt: skip
    return EncoderConfig(
        vocab_size=vocab_size, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads,
        head_dim=dim // num_heads, hidden_dim=hidden_dim, max_seq_len=num_positions - first_position, norm_eps=eps,
        num_positions=num_positions, first_position=first_position, num_types=num_types,
    )  # fmt: skip


CONFIGS = {
    #                              vocab   dim layers heads hidden
    "bert-base-uncased":       size( 30_522,  768, 12, 12, 3072),
    "bert-base-cased":         size( 28_996,  768, 12, 12, 3072),
    "bert-large-uncased":      size( 30_522, 1024, 24, 16, 4096),
    "bert-large-cased":        size( 28_996, 1024, 24, 16, 4096),
    "all-MiniLM-L6-v2":        size( 30_522,  384,  6, 12, 1536),
    "all-MiniLM-L12-v2":       size( 30_522,  384, 12, 12, 1536),
    "ms-marco-MiniLM-L6-v2":   size( 30_522,  384,  6, 12, 1536),
    "multilingual-e5-small":   size(250_037,  384, 12, 12, 1536),
    "bge-small-en-v1.5":       size( 30_522,  384, 12, 12, 1536),
    "bge-base-en-v1.5":        size( 30_522,  768, 12, 12, 3072),
    "bge-large-en-v1.5":       size( 30_522, 1024, 24, 16, 4096),
}  # fmt: skip


def names(prefix: str, *, dense: str, out: str) -> HubNames:
    """``prefix``: what stands before the names of a model that has a head, which is ``dense`` and ``out``."""
    headed = {r"^(?!classifier\.)": prefix}
    return HubNames(
        renamed={
            r"^embed_tokens\.": "embeddings.word_embeddings.",
            r"^embed_positions\.": "embeddings.position_embeddings.",
            r"^embed_types\.": "embeddings.token_type_embeddings.",
            r"^embed_norm\.": "embeddings.LayerNorm.",
            r"^layers\.": "encoder.layer.",
            r"\.self_attn\.q_proj": ".attention.self.query",
            r"\.self_attn\.k_proj": ".attention.self.key",
            r"\.self_attn\.v_proj": ".attention.self.value",
            r"\.self_attn\.o_proj": ".attention.output.dense",
            r"\.attn_post_norm": ".attention.output.LayerNorm",
            r"\.mlp\.up_proj": ".intermediate.dense",
            r"\.mlp\.down_proj": ".output.dense",
            r"\.mlp_post_norm": ".output.LayerNorm",
            r"^lm_head\.dense\.": dense,
            r"^lm_head\.": out,
        },
        headed=headed,
        also={**headed, r"LayerNorm\.weight$": "LayerNorm.gamma", r"LayerNorm\.bias$": "LayerNorm.beta"},
        ignored=r"(^|\.)pooler\.|^cls\.|^lm_head\.|^classifier\.|\.position_ids$",
    )


HUB = names("bert.", dense="pooler.dense.", out="classifier.")


def block(c: EncoderConfig, i: int) -> Block:
    return PostNormBlock(
        Attention(c.dim, c.num_heads, c.num_kv_heads, c.head_dim, bias=True, out_bias=True),
        MLP(c.dim, c.hidden_dim, act=F.gelu),
        attn_norm=None,
        mlp_norm=None,
        attn_post_norm=nn.LayerNorm(c.dim, c.norm_eps),
        mlp_post_norm=nn.LayerNorm(c.dim, c.norm_eps),
        rope=None,
        sight=Sight(causal=False),
    )


def build(c: EncoderConfig) -> Encoder:
    head = partial(ClassHead, c.dim, act=torch.tanh)
    return Encoder(c, block, norm=nn.Identity(), embed_norm=nn.LayerNorm(c.dim, c.norm_eps), head=head)


def from_hub(json: dict[str, Any], *, first_position: int = 0, eps: float = 1e-12) -> EncoderConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what BERT does not have."""
    one_of(json, "hidden_act", "gelu", default="gelu")
    one_of(json, "position_embedding_type", "absolute", default="absolute")
    for key in ("is_decoder", "add_cross_attention"):
        one_of(json, key, False, default=False)
    for key in DISREGARDED:
        json.get(key)
    num_positions = field(json, "max_position_embeddings", int, default=512)
    common = sizes(json, eps=eps, eps_key="layer_norm_eps", tied=True) | {"tie_embeddings": True}
    return EncoderConfig(
        **common | {"max_seq_len": num_positions - first_position},
        num_positions=num_positions,
        first_position=first_position,
        num_types=field(json, "type_vocab_size", int, default=2),
        separator=json.get("sep_token_id"),
    )


def to_hub(c: EncoderConfig, architecture: str = "BertModel", model_type: str = "bert") -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.hidden_dim,
        "max_position_embeddings": c.num_positions,
        "type_vocab_size": c.num_types,
        "layer_norm_eps": c.norm_eps,
        "hidden_act": "gelu",
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    }
