"""The encoder that BERT's descendants build on: a decoder whose tokens see all of their document, without an output
weight, so that what it gives are hidden states, or the scores of a head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.kv_cache import LayerCache
from torchft.modules.masks import Visible


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(DecoderConfig):
    """With ``tie_embeddings``: there is no output weight. A window counts to both sides, the query's own token too."""

    tie_embeddings: bool = True
    num_positions: int = 0  # rows of the table of absolute positions; 0: there is none
    first_position: int = 0  # row of a document's first token
    num_types: int = 0  # rows of the table of token types; 0: there is none
    separator: int | None = None  # the token behind which a document's second text begins, which is of type 1
    pooling: Literal["cls", "mean"] = "cls"  # which hidden states of a document a head reads


class PostNormBlock(Block):
    """norm(x + attn(x)), then norm(x + mlp(x)) (https://arxiv.org/abs/1706.03762); the norms are the post norms."""

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        seen: Visible,
        cache: LayerCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        assert self.attn_post_norm is not None and self.mlp_post_norm is not None
        x = self.attn_post_norm(x + self.self_attn(x, cos, sin, seen, cache, positions))
        return self.mlp_post_norm(x + self.mlp(x))


class ClassHead(nn.Linear):
    """[..., d] in any dtype -> scores [..., k] fp32: a linear layer of norm(act(dense(x)))."""

    def __init__(
        self,
        dim: int,
        num_scores: int,
        *,
        act: Callable[[Tensor], Tensor],
        bias: bool = True,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, num_scores)
        self.dense = nn.Linear(dim, dim, bias=bias)
        self.act = act
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(self.act(self.dense(x.float()))))


class Encoder(Decoder):
    """tokens [b, s] -> hidden states [b, s, d].

    Padding would be seen: of padded rows ``positions`` must restart at 0 where it begins, so that it is a document of
    its own. Without them each row is one document.
    """

    def __init__(
        self,
        config: EncoderConfig,
        block: Callable[[EncoderConfig, int], Block],
        *,
        norm: nn.Module,
        embed_norm: nn.Module,
        head: Callable[[int], ClassHead],
    ) -> None:
        """``head``: makes one of so many scores, which adapters/score.py puts in."""
        super().__init__(config, block, norm)  # type: ignore[arg-type]  # it calls block with this very config
        self.first_position, self.separator = config.first_position, config.separator
        self.make_head = head
        self.embed_positions = nn.Embedding(config.num_positions, config.dim) if config.num_positions else None
        self.embed_types = nn.Embedding(config.num_types, config.dim) if config.num_types else None
        self.embed_norm = embed_norm

    def embed(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        x = self.embed_tokens(tokens)
        if self.embed_positions is not None:
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            x = x + self.embed_positions(positions + self.first_position)
        if self.embed_types is not None:
            x = x + self._types(tokens, positions)
        return self.embed_norm(x)

    def _types(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """Of each token, the row of the table of types: [d] or [b, s, d]."""
        assert self.embed_types is not None
        if self.separator is None:
            return self.embed_types.weight[0]
        ends = (tokens == self.separator).long()
        before = ends.cumsum(1) - ends  # separators in the row before each token
        if positions is not None:  # less those before its document
            starts = torch.arange(tokens.shape[1], device=tokens.device) - positions
            before = before - before.gather(1, starts)
        types: Tensor = self.embed_types(before.clamp(max=1))
        return types

    def project(self, x: Tensor) -> Tensor:
        """The hidden states as they are, or what a head in place of the output weight makes of them."""
        return x if self.lm_head is None else self.lm_head(x)
