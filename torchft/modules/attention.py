"""Grouped-query attention (https://arxiv.org/abs/2305.13245)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchft.modules.attend import attend
from torchft.modules.kv_cache import LayerCache
from torchft.modules.masks import Visible
from torchft.modules.rope import apply_rope


@dataclass(frozen=True, kw_only=True)
class QueryGrowth:
    """Queries at position p are multiplied by 1 + beta ln(1 + floor((p + first) / every)): far contexts stay sharp."""

    beta: float
    every: int  # tokens
    first: int = 0  # position that the first token counts as: Llama 4 counts from 1

    def factors(self, positions: Tensor) -> Tensor:
        """[b, s, 1, 1] fp32 for ``positions`` [b, s]."""
        return 1 + self.beta * torch.log1p(((positions + self.first) // self.every).float())[..., None, None]


class Attention(nn.Module):
    """Causal self-attention, [b, s, d] -> [b, s, d]. ``scale``, ``soft_cap``, sinks as in ``attend``.

    ``q_norm`` and ``k_norm`` act on [b, s, h, c], before RoPE. ``interleaved``: RoPE's convention, as the weights are.
    ``has_gate``: q_proj gives each head's queries and behind them a gate, whose sigmoid scales what it found (Qwen).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        out_bias: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        interleaved: bool = False,
        growth: QueryGrowth | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        has_sinks: bool = False,
        has_gate: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim, self.scale, self.soft_cap = head_dim, scale, soft_cap
        self.interleaved, self.growth = interleaved, growth
        self.has_gate = has_gate
        self.q_proj = nn.Linear(dim, num_heads * head_dim * (2 if has_gate else 1), bias=bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=out_bias)
        self.q_norm, self.k_norm = q_norm, k_norm
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if has_sinks else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        seen: Visible,
        cache: LayerCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Without cos and sin nothing rotates (NoPE). In a ``cache``, ``positions`` [b, s] are the slots to write."""
        b, s, _ = x.shape
        q, k, v = (y.view(b, s, -1, self.head_dim) for y in self.qkv(x))  # [b, s, h, c], and k heads twice
        q, gate = (q[:, :, ::2], q[:, :, 1::2]) if self.has_gate else (q, None)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if cos is not None and sin is not None:
            q, k = (apply_rope(y, cos, sin, interleaved=self.interleaved) for y in (q, k))
        if self.growth is not None:
            assert positions is not None
            q = q * self.growth.factors(positions).to(q.dtype)
        if cache is not None:
            assert positions is not None
            k, v = cache.update(positions, k, v)
        out = attend(q, k, v, seen, scale=self.scale, soft_cap=self.soft_cap, sinks=self.sinks)  # [b, s, h, c]
        if gate is not None:
            out = out * torch.sigmoid(gate)
        return self.o_proj(out.reshape(b, s, -1))

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (and gates) [b, s, h * c], keys and values [b, s, k * c]."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)
