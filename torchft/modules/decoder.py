"""The decoder that every text family builds on: embed, blocks, norm, project."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchft.documents import Documents
from torchft.modules.embedding import Embedding
from torchft.modules.kv_cache import KVCache, LayerCache
from torchft.modules.masks import Sight, Visible, visible, visible_in_cache
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope, rope_cos_sin
from torchft.ranks import copy_part
from torchft.token_shards import TokenShards

Project = Callable[[Tensor], Tensor]
Head = Callable[[Tensor, Project], Tensor]
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
    windows: tuple[int | None, ...] = ()  # of each layer: the last tokens that it sees; () or None: all of them

    def window(self, i: int) -> int | None:
        """Of layer ``i``."""
        return self.windows[i] if self.windows else None


class Block(nn.Module):
    """Residual block: x + attn(norm(x)), then x + mlp(norm(x)).

    With ``attn_post_norm`` and ``mlp_post_norm`` what is added is normed too (sandwich), or only that (norms None).
    ``rope``: None for a layer without positions. ``residual_scale`` multiplies what is added (Granite).
    """

    def __init__(
        self,
        attn: nn.Module,
        mlp: nn.Module,
        *,
        attn_norm: nn.Module | None,
        mlp_norm: nn.Module | None,
        rope: Rope | None,
        attn_post_norm: nn.Module | None = None,
        mlp_post_norm: nn.Module | None = None,
        sight: Sight = WHOLE_DOCUMENT,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.self_attn, self.mlp = attn, mlp
        self.attn_norm, self.attn_post_norm = attn_norm, attn_post_norm
        self.mlp_norm, self.mlp_post_norm = mlp_norm, mlp_post_norm
        self.rope, self.sight, self.residual_scale = rope, sight, residual_scale

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        seen: Visible,
        cache: LayerCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        h = x if self.attn_norm is None else self.attn_norm(x)
        h = self.self_attn(h, cos, sin, seen, cache, positions)
        x = self._add(x, h if self.attn_post_norm is None else self.attn_post_norm(h))
        h = self.mlp(x if self.mlp_norm is None else self.mlp_norm(x))
        return self._add(x, h if self.mlp_post_norm is None else self.mlp_post_norm(h))

    def _add(self, x: Tensor, update: Tensor) -> Tensor:
        return x + update if self.residual_scale == 1.0 else x + self.residual_scale * update


class ParallelBlock(Block):
    """x + attn(norm(x)) + mlp(norm(x)), with one norm for both (Command R)."""

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        seen: Visible,
        cache: LayerCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        assert self.attn_norm is not None
        h = self.attn_norm(x)
        return x + self.self_attn(h, cos, sin, seen, cache, positions) + self.mlp(h)


class Decoder(nn.Module):
    """tokens -> logits. Holds parameters only: positions, masks and caches are inputs, computed once per batch."""

    def __init__(
        self,
        config: DecoderConfig,
        block: Callable[[DecoderConfig, int], Block],
        norm: nn.Module,
        *,
        embed_scale: float = 1.0,
        logit_scale: float = 1.0,
        logit_soft_cap: float | None = None,
    ) -> None:
        """Embeddings are multiplied by ``embed_scale``, logits by ``logit_scale``, then bounded: cap tanh(x / cap)."""
        super().__init__()
        self.config = config
        self.embed_scale, self.logit_scale, self.logit_soft_cap = embed_scale, logit_scale, logit_soft_cap
        self.embed_tokens = Embedding(config.vocab_size, config.dim)
        blocks = [block(config, i) for i in range(config.num_layers)]
        self.layers = nn.ModuleList(blocks)
        self.sights = [b.sight for b in blocks]
        self.ropes = [b.rope for b in blocks]
        self.sources = list(range(config.num_layers))  # of each block: the layer whose cache it looks into
        self.norm = norm
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.hub_format: Any = None  # names and config.json, set by models.build, read by hub.py
        self.recompute = 0.0  # share of the blocks that keep only their input and run again in backward
        self.activations: AbstractContextManager = nullcontext()  # in which the blocks run: training/offload.py
        self.replay: Callable[..., Tensor] | None = None  # in place of ``hidden`` in training: training/graphs.py
        self.shards: TokenShards | None = None  # several ranks share a row: training/distributed.py

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        head: Head | None = None,
        cache: KVCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """tokens [b, s] -> logits [b, s, v], or whatever ``head(hidden [b, s, d], project)`` returns.

        ``positions`` [b, s] restart at 0 with each packed document, and tell answers that share their prompt
        (torchft/documents.py); None: each row is one document, padding only after it. ``documents`` of packed rows:
        None: read from the positions, for which the host waits for the GPU. ``head`` runs inside this forward because
        FSDP has the output weight gathered only here, and because a loss that projects chunk by chunk never holds all
        logits (32k tokens x 128k words x 4 bytes = 16 GiB).

        Where ranks share rows (``shards``), tokens and hidden states are this rank's, positions those of whole rows.
        """
        x = self.embed(tokens, positions)  # [b, s, d]
        if self.replay is not None and cache is None and self.training and torch.is_grad_enabled():
            x = self.replay(x, positions, documents)
        else:
            x = self.hidden(x, positions, documents, cache)
        return self.project(x) if head is None else head(x, self.project)

    def embed(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """tokens [b, s] -> [b, s, d]."""
        x = self.embed_tokens(tokens)
        if self.embed_scale != 1.0:
            x = x * torch.tensor(self.embed_scale, dtype=x.dtype).item()  # rounded as Gemma was trained
        return x

    def hidden(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Embeddings [b, s, d] -> what the head reads, [b, s, d]; arguments as in ``forward``."""
        shards = self.shards if cache is None else None
        seen = self._visible(x, positions, documents, cache)
        if positions is None:
            seq_len = x.shape[1] * (shards.count if shards else 1)
            positions = torch.arange(seq_len, device=x.device).expand(x.shape[0], -1)
        dims = [sight.head_dim or self.config.head_dim for sight in self.sights]
        kinds = {(rope, dim) for rope, dim in zip(self.ropes, dims) if rope is not None}
        reach = None if cache is None else cache.reach
        rotations = {kind: rope_cos_sin(kind[0], positions, kind[1], reach) for kind in kinds}
        if shards is not None:
            rotations = {kind: (shards.rows(cos), shards.rows(sin)) for kind, (cos, sin) in rotations.items()}
            positions = shards.rows(positions)
        handed: dict[Any, Tensor] = {}
        with self.activations:
            for i in range(len(self.layers)):
                rope = self.ropes[i]
                cos, sin = (None, None) if rope is None else rotations[rope, dims[i]]  # [b, s, 1, c / 2]
                args = (cos, sin, seen[self.sights[i]], cache and cache.layers[self.sources[i]], positions)
                x = self.through(i, x, args, handed)
        return self.norm(x)

    def through(self, i: int, x: Tensor, args: tuple[Any, ...], handed: dict[Any, Tensor]) -> Tensor:
        """x behind block ``i``. ``handed`` is for what the blocks of a family hand on to later ones besides."""
        cache = args[3]
        if cache is None and self.training and self._recomputed(i):
            recomputed: Tensor = checkpoint(self.layers[i], x, *args, use_reentrant=False)
            return recomputed
        out: Tensor = self.layers[i](x, *args)
        return out

    def project(self, x: Tensor) -> Tensor:
        """Hidden states [..., d] -> logits [..., v], in the dtype of x."""
        logits = self.embed_tokens.project(x) if self.lm_head is None else self.lm_head(x)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_soft_cap is not None:
            logits = torch.tanh(logits / self.logit_soft_cap) * self.logit_soft_cap
        return logits

    def _recomputed(self, i: int) -> bool:
        """Whether block ``i`` is one of the share ``recompute``, which is spread evenly."""
        n = len(self.layers)
        k = round(self.recompute * n)
        return (i + 1) * k // n > i * k // n

    def _visible(
        self, x: Tensor, positions: Tensor | None, documents: Documents | None, cache: KVCache | None
    ) -> dict[Sight, Visible]:
        """What each kind of layer sees of this batch."""
        kinds, dim = set(self.sights), self.config.head_dim
        if cache is not None and cache.num_slots is not None:
            assert positions is not None, "a cache needs positions"
            slots = (cache.num_slots, cache.reach or cache.num_slots)
            return {sight: visible_in_cache(x, sight.head_dim or dim, sight, positions, *slots) for sight in kinds}
        shards = self.shards if cache is None else None
        return {sight: visible(x, sight.head_dim or dim, sight, positions, documents, shards) for sight in kinds}


@torch.no_grad()
def init_weights(model: nn.Module, std: float = 0.02) -> None:
    """Random weights for training from scratch: normal with ``std``, norms and factors one, biases and such zero."""
    for module in model.modules():
        if isinstance(module, (RMSNorm, nn.LayerNorm)):
            module.reset_parameters()
            continue
        for name, p in module.named_parameters(recurse=False):
            if name == "weight":  # of a sharded model each rank draws all: how many they are decides nothing
                copy_part(p, nn.init.normal_(torch.empty(p.shape, dtype=p.dtype, device=p.device), std=std))
            else:
                nn.init.constant_(p, 1.0 if name == "layer_scalar" else 0.0)
