"""Multi-head latent attention (DeepSeek V2, https://arxiv.org/abs/2405.04434, section 2.1).

Shapes: b batch, s sequence, d model dim, h heads; of a head's queries and keys n channels do not rotate and r do, its
values have c; l is the width of the latent from which all heads make their keys and values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.modules.attend import attend
from torchft.modules.kv_cache import LayerCache
from torchft.modules.masks import Visible
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import apply_rope

EPS = 1e-6  # of the norms of latents, whatever the model's own


class LatentAttention(nn.Module):
    """Causal self-attention, [b, s, d] -> [b, s, d], whose keys and values come from a latent [b, s, l] and one rotated
    key [b, s, r] that all heads share; these two are what a cache keeps.

    ``query_latent``: width of the queries' own latent; None: they are projected at once. ``scale`` as in ``attend``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        plain_dim: int,
        rope_dim: int,
        value_dim: int,
        latent: int,
        query_latent: int | None,
        scale: float,
        interleaved: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.plain_dim, self.rope_dim, self.value_dim = num_heads, plain_dim, rope_dim, value_dim
        self.latent, self.scale, self.interleaved = latent, scale, interleaved
        query_dim = num_heads * (plain_dim + rope_dim)
        if query_latent is None:
            self.q_proj = nn.Linear(dim, query_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(dim, query_latent, bias=bias)
            self.q_a_norm = RMSNorm(query_latent, EPS)
            self.q_b_proj = nn.Linear(query_latent, query_dim, bias=False)
        self.has_query_latent = query_latent is not None
        self.kv_a_proj = nn.Linear(dim, latent + rope_dim, bias=bias)
        self.kv_a_norm = RMSNorm(latent, EPS)
        self.kv_b_proj = nn.Linear(latent, num_heads * (plain_dim + value_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * value_dim, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        seen: Visible,
        cache: LayerCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """In a ``cache``, ``positions`` [b, s] are the slots to write."""
        assert cos is not None and sin is not None
        b, s, _ = x.shape
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if self.has_query_latent else self.q_proj(x)
        q = q.view(b, s, self.num_heads, -1)  # [b, s, h, n + r]
        plain, rotated = q.split((self.plain_dim, self.rope_dim), dim=-1)
        q = torch.cat((plain, apply_rope(rotated, cos, sin, interleaved=self.interleaved)), dim=-1)

        latent, key = self.kv_a_proj(x).split((self.latent, self.rope_dim), dim=-1)
        latent = self.kv_a_norm(latent)[:, :, None]  # [b, s, 1, l]
        key = apply_rope(key[:, :, None], cos, sin, interleaved=self.interleaved)  # [b, s, 1, r]
        if cache is not None:
            assert positions is not None
            latent, key = (y[:, : cache.seen] for y in cache.update(positions, latent, key))
            if seen.cu_seqlens is not None:  # where rows of so many slots start
                seen = seen._replace(cu_seqlens_k=seen.cu_seqlens * latent.shape[1])
        t = latent.shape[1]
        kv = self.kv_b_proj(latent).view(b, t, self.num_heads, -1)  # [b, t, h, n + c]
        plain, v = kv.split((self.plain_dim, self.value_dim), dim=-1)
        k = torch.cat((plain, key.expand(-1, -1, self.num_heads, -1)), dim=-1)  # [b, t, h, n + r]

        if seen.kernel != "dense":  # the fused kernels want values as wide as keys
            v = F.pad(v, (0, k.shape[-1] - self.value_dim))
        out = attend(q, k, v, seen, scale=self.scale)[..., : self.value_dim]  # [b, s, h, c]
        return self.o_proj(out.reshape(b, s, -1))
