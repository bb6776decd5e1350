"""The decoder that every text family builds on: embed, blocks, norm, project."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchft.modules.kv_cache import KVCache, LayerCache
from torchft.modules.masks import Sight, Visible, visible, visible_in_cache
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope, rope_cos_sin
from torchft.ranks import copy_part

Head = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
WHOLE_DOCUMENT = Sight()


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes that every family sets. A number of one family only belongs to that family's subclass."""

    vocab_size: int  # rows of the embedding
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int  # of the MLP
    max_seq_len: int  # tokens the released model was trained for
    norm_eps: float = 1e-5
    rope: Rope = field(default_factory=Rope)
    tie_embeddings: bool = False


class Block(nn.Module):
    """Pre-norm residual block: x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        attn: nn.Module,
        mlp: nn.Module,
        *,
        attn_norm: nn.Module,
        mlp_norm: nn.Module,
        sight: Sight = WHOLE_DOCUMENT,
    ) -> None:
        super().__init__()
        self.self_attn, self.mlp = attn, mlp
        self.attn_norm, self.mlp_norm = attn_norm, mlp_norm
        self.sight = sight

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        seen: Visible,
        cache: LayerCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        x = x + self.self_attn(self.attn_norm(x), cos, sin, seen, cache, positions)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """tokens -> logits. Holds parameters only: positions, masks and caches are inputs, computed once per batch."""

    def __init__(self, config: DecoderConfig, block: Callable[[DecoderConfig, int], Block], norm: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        blocks = [block(config, i) for i in range(config.num_layers)]
        self.layers = nn.ModuleList(blocks)
        self.sights = [b.sight for b in blocks]
        self.norm = norm
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.hub_format: Any = None  # names and config.json, set by models.build, read by hub.py
        self.recompute = 0.0  # share of the blocks that keep only their input and run again in backward
        self.activations: AbstractContextManager = nullcontext()  # in which the blocks run: training/offload.py
        self.replay: Callable[..., Tensor] | None = None  # in place of ``hidden`` in training: training/graphs.py

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        head: Head | None = None,
        cache: KVCache | None = None,
        documents: tuple[int, int] | None = None,
    ) -> Tensor:
        """tokens [b, s] -> logits [b, s, v], or whatever ``head(hidden [b, s, d], project)`` returns.

        ``positions`` [b, s] restart at 0 with each packed document; None: each row is one document, padding only after
        it. ``documents`` of packed rows: how many the batch holds and the tokens of the longest; None: read from the
        positions, for which the host waits for the GPU. ``head`` runs inside this forward because FSDP has the output
        weight gathered only here, and because a loss that projects chunk by chunk never holds all logits (32k tokens x
        128k words x 4 bytes = 16 GiB).
        """
        x = self.embed_tokens(tokens)  # [b, s, d]
        if self.replay is not None and cache is None and self.training and torch.is_grad_enabled():
            x = self.replay(x, positions, documents)
        else:
            x = self.hidden(x, positions, documents, cache)
        return self.project(x) if head is None else head(x, self.project)

    def hidden(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        documents: tuple[int, int] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Embeddings [b, s, d] -> what the head reads, [b, s, d]; arguments as in ``forward``."""
        seen = self._visible(x, positions, documents, cache)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        cos, sin = rope_cos_sin(self.config.rope, positions, self.config.head_dim)  # [b, s, 1, c / 2]
        with self.activations:
            for i, layer in enumerate(self.layers):
                sees = seen[self.sights[i]]
                if cache is not None:
                    x = layer(x, cos, sin, sees, cache.layers[i], positions)
                elif self.training and self._recomputed(i):
                    x = checkpoint(layer, x, cos, sin, sees, use_reentrant=False)
                else:
                    x = layer(x, cos, sin, sees)
        return self.norm(x)

    def project(self, x: Tensor) -> Tensor:
        """Hidden states [..., d] -> logits [..., v], in the dtype of x."""
        return F.linear(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)

    def _recomputed(self, i: int) -> bool:
        """Whether block ``i`` is one of the share ``recompute``, which is spread evenly."""
        n = len(self.layers)
        k = round(self.recompute * n)
        return (i + 1) * k // n > i * k // n

    def _visible(
        self, x: Tensor, positions: Tensor | None, documents: tuple[int, int] | None, cache: KVCache | None
    ) -> dict[Sight, Visible]:
        """What each kind of layer sees of this batch."""
        kinds = set(self.sights)
        if cache is not None:
            assert positions is not None, "a cache needs positions"
            return {sight: visible_in_cache(positions, cache.num_slots, sight) for sight in kinds}
        return {sight: visible(x, self.config.head_dim, sight, positions, documents) for sight in kinds}


@torch.no_grad()
def init_weights(model: nn.Module, std: float = 0.02) -> None:
    """Random weights for training from scratch: normal with ``std``, norms one, biases zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            w = module.weight  # of a sharded model each rank draws all: how many they are decides nothing
            copy_part(w, nn.init.normal_(torch.empty(w.shape, dtype=w.dtype, device=w.device), std=std))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            module.reset_parameters()
