"""Layers that read an earlier layer's keys and values, and embeddings of tokens for each layer (Gemma 4).

What a block needs besides its hidden states comes behind them in its input's last dimension, and what others need of it
goes out so: one tensor in and one out, as of any block, so that recomputing, compiling and sharding are as ever.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchft.modules.attend import attend
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.embedding import Embedding
from torchft.modules.kv_cache import LayerCache
from torchft.modules.masks import Visible
from torchft.modules.mlp import GELU_TANH
from torchft.modules.norms import BareRMSNorm, RMSNorm
from torchft.modules.rope import apply_rope


class SharedKVAttention(Attention):
    """``Attention`` with values normed. ``shares_kv``: keys are the values, too, before they are normed and rotate.

    ``reads``: keys and values [b, s, 2 k c] are another layer's, and come behind x, or are in that layer's cache.
    ``stores``: they go out behind what is returned, unless there is a cache.
    """

    def __init__(
        self, *sizes: int, shares_kv: bool, eps: float, reads: bool = False, stores: bool = False, **more: Any
    ) -> None:
        super().__init__(*sizes, **more)
        self.dim, _, num_kv_heads, head_dim = sizes
        self.shares_kv, self.reads, self.stores, self.v_norm = shares_kv, reads, stores, BareRMSNorm(eps)
        self.shared_dim = 2 * num_kv_heads * head_dim
        if shares_kv or reads:
            del self.v_proj
        if reads:
            del self.k_proj, self.k_norm

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        seen: Visible,
        cache: LayerCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        assert cos is not None and sin is not None and self.q_norm is not None
        b, s, _ = x.shape
        x, kv = x.split([self.dim, x.shape[-1] - self.dim], dim=-1)
        q = apply_rope(self.q_norm(self._heads(self.q_proj(x))), cos, sin)  # [b, s, h, c]
        if self.reads:
            k, v = map(self._heads, kv.chunk(2, dim=-1)) if cache is None else cache.held(b)
        else:
            k, v = self._keys_and_values(x, cos, sin)
            kv = torch.cat((k.flatten(2), v.flatten(2)), dim=-1) if self.stores and cache is None else kv
            if cache is not None:
                assert positions is not None
                k, v = cache.update(positions, k, v)
        out = self.o_proj(attend(q, k, v, seen, scale=self.scale).reshape(b, s, -1))
        return torch.cat((out, kv), dim=-1) if self.stores and cache is None else out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[b, s, k, c] each, normed and keys rotated."""
        assert self.k_norm is not None
        k = self._heads(self.k_proj(x))
        v = k if self.shares_kv else self._heads(self.v_proj(x))
        return apply_rope(self.k_norm(k), cos, sin), self.v_norm(v)


class PerLayerBlock(Block):
    """``Block``, then x + norm(project(gelu(gate(x)) * the token's vector for this layer)); all times a fixed factor.

    Its input: x [b, s, d], what its attention reads, the token's vector [b, s, ``input_dim``].
    """

    def __init__(
        self, attn: SharedKVAttention, mlp: nn.Module, *, dim: int, input_dim: int, eps: float, **more: Any
    ) -> None:
        super().__init__(attn, mlp, **more)
        self.input_dim = input_dim
        self.layer_scalar = nn.Parameter(torch.ones(1), requires_grad=False)
        if input_dim:
            self.per_layer_input_gate = nn.Linear(dim, input_dim, bias=False)
            self.per_layer_projection = nn.Linear(input_dim, dim, bias=False)
            self.per_layer_norm = RMSNorm(dim, eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        seen: Visible,
        cache: LayerCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        attn = self.self_attn
        assert isinstance(attn, SharedKVAttention) and self.attn_norm is not None and self.mlp_norm is not None
        assert self.attn_post_norm is not None and self.mlp_post_norm is not None
        shared_dim = attn.shared_dim if attn.reads and cache is None else 0
        x, kv, token = x.split([attn.dim, shared_dim, self.input_dim], dim=-1)
        h = attn(_join(self.attn_norm(x), kv), cos, sin, seen, cache, positions)
        h, kv = h.split([attn.dim, h.shape[-1] - attn.dim], dim=-1)
        x = x + self.attn_post_norm(h)
        x = x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))
        if self.input_dim:
            h = self.per_layer_projection(GELU_TANH(self.per_layer_input_gate(x)) * token)
            x = x + self.per_layer_norm(h)
        return _join(x * self.layer_scalar, kv)


class PerLayerDecoder(Decoder):
    """``Decoder`` of ``PerLayerBlock``s. ``sources``: the layer whose keys and values each one's attention reads."""

    def __init__(
        self,
        config: DecoderConfig,
        block: Callable[[DecoderConfig, int], Block],
        norm: nn.Module,
        *,
        input_dim: int,
        sources: list[int],
        **more: Any,
    ) -> None:
        super().__init__(config, block, norm, **more)
        self.input_dim, self.sources = input_dim, sources
        if input_dim:
            self.embed_tokens_per_layer = Embedding(config.vocab_size, config.num_layers * input_dim)
            self.per_layer_model_projection = nn.Linear(config.dim, config.num_layers * input_dim, bias=False)
            self.per_layer_projection_norm = RMSNorm(input_dim, config.norm_eps)

    def embed(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """tokens [b, s] -> [b, s, d + layers * ``input_dim``]: behind the embedding a vector for each layer."""
        x = super().embed(tokens, positions)
        if not self.input_dim:
            return x
        each = (-1, self.input_dim)
        of_token = self.embed_tokens_per_layer(tokens) * math.sqrt(self.input_dim)
        of_embedding = self.per_layer_model_projection(x) * self.config.dim**-0.5
        both = self.per_layer_projection_norm(of_embedding.unflatten(-1, each)) + of_token.unflatten(-1, each)
        return torch.cat((x, (both * 2**-0.5).flatten(-2)), dim=-1)

    def through(self, i: int, x: Tensor, args: tuple[Any, ...], handed: dict[Any, Tensor]) -> Tensor:
        if i == 0:
            x, handed["inputs"] = x.split([self.config.dim, x.shape[-1] - self.config.dim], dim=-1)
        token = handed["inputs"][..., i * self.input_dim : (i + 1) * self.input_dim]
        is_cached = args[3] is not None
        kv = [handed[self.sources[i]]] if self.sources[i] != i and not is_cached else []
        out = super().through(i, _join(x, *kv, token), args, handed)
        x, handed[i] = out.split([self.config.dim, out.shape[-1] - self.config.dim], dim=-1)
        return x


def _join(*parts: Tensor) -> Tensor:
    """[b, s, ...] each -> one behind the other in the last dimension, what is empty left out."""
    some = [part for part in parts if part.shape[-1]]
    return some[0] if len(some) == 1 else torch.cat(some, dim=-1)
