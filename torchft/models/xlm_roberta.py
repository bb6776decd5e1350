"""XLM-RoBERTa: BERT in a hundred languages, with one token type and positions that begin behind the padding token's.

Paper: https://arxiv.org/abs/1911.02116. Weights: https://huggingface.co/FacebookAI
"""

from dataclasses import replace
from typing import Any

from torchft.models import bert
from torchft.models.config_json import field
from torchft.modules.encoder import EncoderConfig

FIRST = 2  # row of a document's first position: the padding token's id, 1, and 1


def _size(dim: int, num_layers: int, num_heads: int, hidden_dim: int, num_positions: int = 514) -> EncoderConfig:
    return bert.size(
        250_002, dim, num_layers, num_heads, hidden_dim, eps=1e-5, num_positions=num_positions, first_position=FIRST,
        num_types=1,
    )  # fmt: skip


CONFIGS = {
    #                              dim layers heads hidden
    "xlm-roberta-base":      _size( 768, 12, 12, 3072),
    "xlm-roberta-large":     _size(1024, 24, 16, 4096),
    "multilingual-e5-base":  _size( 768, 12, 12, 3072),
    "multilingual-e5-large": _size(1024, 24, 16, 4096),
    "bge-m3":                _size(1024, 24, 16, 4096, num_positions=8194),
    "bge-reranker-v2-m3":    _size(1024, 24, 16, 4096, num_positions=8194),
}  # fmt: skip

HUB = bert.names("roberta.", dense="classifier.dense.", out="classifier.out_proj.")

block = bert.block
build = bert.build


def from_hub(json: dict[str, Any]) -> EncoderConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what XLM-R does not have."""
    found = bert.from_hub(json, first_position=1 + field(json, "pad_token_id", int, default=1))
    return replace(found, separator=None)  # its second texts are of the same type


def to_hub(c: EncoderConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return bert.to_hub(c, "XLMRobertaModel", "xlm-roberta") | {"pad_token_id": c.first_position - 1}
