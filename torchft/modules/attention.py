"""Grouped-query attention (https://arxiv.org/abs/2305.13245)."""

import torch.nn.functional as F
from torch import Tensor, nn

from torchft.modules.kv_cache import LayerCache
from torchft.modules.rope import apply_rope


class Attention(nn.Module):
    """Causal self-attention with RoPE, [b, s, d] -> [b, s, d]."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """``mask`` as in ``attend``; with a ``cache``, ``positions`` [b, s] are the slots to write."""
        b, s, _ = x.shape
        q = self.q_proj(x).view(b, s, -1, self.head_dim)  # [b, s, h, c]
        k = self.k_proj(x).view(b, s, -1, self.head_dim)  # [b, s, k, c]
        v = self.v_proj(x).view(b, s, -1, self.head_dim)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            assert positions is not None
            k, v = cache.update(positions, k, v)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)  # [b, h, s, c]
        return self.o_proj(out.transpose(1, 2).reshape(b, s, -1))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(c)) v for q [b, h, s, c] over k, v [b, k, t, c] -> [b, h, s, c].

    ``mask`` [b or 1, 1, s, t] bool, True = visible; None = causal over the whole row, the fastest kernel.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
