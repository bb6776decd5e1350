"""Gradients of the narrow matrices of experts' adapters: a product over each expert's rows, of which one side is wide.

Legend: n rows sorted by expert, e experts, c columns, r rank; ``offsets`` [e] int32: expert i has the rows from
offsets[i - 1] to offsets[i].
"""

from typing import Any

import torch
from torch import Tensor

from torchft.kernels.expert_tiles import has_kernels, row_ranges
from torchft.kernels.swiglu import padded_rank

TILE, LAUNCH = (64, 128), {"num_warps": 4, "num_stages": 2}  # rows x columns that a program holds

kernels: dict[str, Any] = {}  # compiled on first use: triton exists on machines with a GPU only


@torch.library.custom_op("torchft::narrow_outer", mutates_args=())
def narrow_outer(wide: Tensor, narrow: Tensor, offsets: Tensor) -> Tensor:
    """Of each expert's rows wide^T narrow: [n, c] and [n, r] -> [e, c, r], summed in fp32, in wide's dtype."""
    num_experts, c, r = len(offsets), wide.shape[1], narrow.shape[1]
    out = wide.new_empty(num_experts, c, r)
    if not has_kernels(wide):
        for expert, (start, stop) in enumerate(row_ranges(offsets)):
            out[expert] = wide[start:stop].mT @ narrow[start:stop]
        return out
    tensors = (wide.contiguous(), narrow.contiguous(), offsets, out)
    _kernels()["outer"][(num_experts, -(-c // TILE[1]))](*tensors, c, r, padded_rank(r), *TILE, **LAUNCH)
    return out


@narrow_outer.register_fake
def _(wide: Tensor, narrow: Tensor, offsets: Tensor) -> Tensor:
    return wide.new_empty(offsets.shape[0], wide.shape[1], narrow.shape[1])


def _kernels() -> dict[str, Any]:
    if not kernels:
        import triton
        import triton.language as tl

        @triton.jit
        def outer(  # type: ignore[no-untyped-def]  # Triton has no types for its pointers
                  WIDE, NARROW, OFFSETS, OUT, c, r, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr):  # fmt: skip
            expert = tl.program_id(0)
            start = tl.load(OFFSETS + expert - 1, mask=expert > 0, other=0)
            end = tl.load(OFFSETS + expert)
            cols, rank = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, R)
            col_ok, rank_ok = cols[None, :] < c, rank[None, :] < r
            total = tl.zeros((N, R), tl.float32)
            for first in range(start, end, T):
                rows = (first + tl.arange(0, T))[:, None].to(tl.int64)
                ok = rows < end
                wide = tl.load(WIDE + rows * c + cols[None, :], mask=ok & col_ok, other=0.0)  # [T, N]
                narrow = tl.load(NARROW + rows * r + rank[None, :], mask=ok & rank_ok, other=0.0)  # [T, R]
                total = tl.dot(tl.trans(wide), narrow, total)
            at = (expert.to(tl.int64) * c + cols[:, None]) * r + rank[None, :]
            tl.store(OUT + at, total.to(OUT.dtype.element_ty), mask=(cols[:, None] < c) & rank_ok)

        kernels["outer"] = outer
    return kernels
