"""Rows of tokens to their experts, and in the same pass each row's product with its expert's narrow matrix.

Rows lie in the order of experts here, so a program holds one expert's matrix; each token's row is read k times, half of
them from the L2 cache. ``rows.py`` is for rows that need no product.

Legend: t tokens, k experts per token, n = t k rows sorted by expert, e experts, d columns, r rank; ``offsets`` [e]
int32: expert i has the rows from offsets[i - 1] to offsets[i].
"""

from typing import Any

import torch
from torch import Tensor

from torchft.kernels.expert_tiles import has_kernels, padded_sizes, row_ranges, tile_finder

# Rows x columns that a program holds: the fastest of 16 settings on one H200 for 131,072 rows of 128 experts, 2048
# wide, rank 16 (0.23 ms; 0.17 for the rows alone, and 0.18 for the dense product of all experts).
TILE, LAUNCH = (64, 128), {"num_warps": 4, "num_stages": 2}

kernels: dict[str, Any] = {}  # compiled on first use: triton exists on machines with a GPU only


@torch.library.custom_op("torchft::expert_spread", mutates_args=())
def expert_spread(x: Tensor, narrow: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """x [t, d] -> row i is that of token order[i] // k, [n, d]; and its product with narrow^T of its expert, [n, r].

    Args:
        narrow: [e, r, d].
        order: [n], of all t k rows; every row belongs to an expert.
        offsets: where each expert's rows end.

    Both are in x's dtype, the product is summed in fp32 or wider.
    """
    (t, d), (num_experts, r, _), n = x.shape, narrow.shape, len(order)
    if not has_kernels(x):
        rows = x[order // (n // t)]
        wide, inner = torch.promote_types(x.dtype, torch.float32), x.new_zeros(n, r)
        for expert, (start, stop) in enumerate(row_ranges(offsets)):
            inner[start:stop] = rows[start:stop].to(wide) @ narrow[expert].to(wide).t()
        return rows, inner
    rows, inner = x.new_empty(n, d), x.new_empty(n, r)
    tensors = (y.contiguous() for y in (x, narrow, order, offsets))
    grid, padded = (-(-n // TILE[0]) + num_experts,), padded_sizes(num_experts, r)
    _kernels()["spread"][grid](*tensors, rows, inner, d, n // t, r, num_experts, *padded, *TILE, **LAUNCH)
    return rows, inner


@expert_spread.register_fake
def _(x: Tensor, narrow: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(order.shape[0], x.shape[1]), x.new_empty(order.shape[0], narrow.shape[1])


def _kernels() -> dict[str, Any]:
    if not kernels:
        import triton
        import triton.language as tl

        find = tile_finder()

        @triton.jit
        def spread(  # type: ignore[no-untyped-def]  # Triton has no types for its pointers
                   X, A, ORDER, OFFSETS, ROWS, INNER, d, k, r, e,
                   E: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr):  # fmt: skip
            expert, first, end = find(OFFSETS, tl.program_id(0), e, E, T)
            if first >= end:
                return
            rows = first + tl.arange(0, T)
            rank = tl.arange(0, R)
            row_ok, rank_ok = rows[:, None] < end, rank[None, :] < r
            token = (tl.load(ORDER + rows, mask=rows < end, other=0) // k).to(tl.int64)[:, None]
            wide = rows[:, None].to(tl.int64)
            a_mine = A + expert.to(tl.int64) * r * d
            total = tl.zeros((T, R), tl.float32)
            for start in range(0, d, N):
                cols = start + tl.arange(0, N)
                ok = row_ok & (cols[None, :] < d)
                x = tl.load(X + token * d + cols[None, :], mask=ok, other=0.0)
                tl.store(ROWS + wide * d + cols[None, :], x, mask=ok)
                a = tl.load(a_mine + rank[None, :] * d + cols[:, None], mask=rank_ok & (cols[:, None] < d), other=0.0)
                total = tl.dot(x, a, total)  # [T, N] x [N, R]
            tl.store(INNER + wide * r + rank[None, :], total.to(INNER.dtype.element_ty), mask=row_ok & rank_ok)

        kernels["spread"] = spread
    return kernels
