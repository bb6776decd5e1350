"""Rows of tokens to those of their experts and back, each in one pass that reads or writes wide rows once.

A compiler fuses such indexing with what comes before and after, and then computes that for each of a token's k rows.
In tokens' order both ways: x is read once and no two rows meet, so sums need no atomic additions: same bits in every
run.

Legend: t tokens, k experts per token, n = t k rows sorted by expert, d columns. ``place`` [n]: where row token * k +
choice lies among the sorted ones.
"""

from typing import Any

import torch
from torch import Tensor

COLUMNS = 1024  # that a program holds

kernels: dict[str, Any] = {}  # compiled on first use: triton exists on machines with a GPU only


@torch.library.custom_op("torchft::spread_rows", mutates_args=())
def spread_rows(x: Tensor, place: Tensor) -> Tensor:
    """x [t, d] -> a row for each of a token's k experts, where ``place`` says: [n, d]."""
    (t, d), n = x.shape, len(place)
    out = x.new_empty(n, d)
    if not _has_kernels(x):
        return out.index_copy_(0, place, x.repeat_interleave(n // t, 0))
    _kernels()["spread"][(t, -(-d // COLUMNS))](x.contiguous(), place, out, d, n // t, COLUMNS)
    return out


@spread_rows.register_fake
def _(x: Tensor, place: Tensor) -> Tensor:
    return x.new_empty(place.shape[0], x.shape[1])


@torch.library.custom_op("torchft::collect_rows", mutates_args=())
def collect_rows(rows: Tensor, place: Tensor, num_tokens: int) -> Tensor:
    """Sorted rows [n, d] -> the sum of each token's, in fp32 or wider and then rows' dtype: [t, d]."""
    (n, d), t = rows.shape, num_tokens
    if not _has_kernels(rows):
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return wide[place].view(t, n // t, d).sum(1).to(rows.dtype)
    out = rows.new_empty(t, d)
    _kernels()["collect"][(t, -(-d // COLUMNS))](rows.contiguous(), place, out, d, n // t, COLUMNS)
    return out


@collect_rows.register_fake
def _(rows: Tensor, place: Tensor, num_tokens: int) -> Tensor:
    return rows.new_empty(num_tokens, rows.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.num_tokens = len(inputs[0])
    ctx.save_for_backward(inputs[1])


spread_rows.register_autograd(
    lambda ctx, grad: (collect_rows(grad, ctx.saved_tensors[0], ctx.num_tokens), None), setup_context=_save
)
collect_rows.register_autograd(
    lambda ctx, grad: (spread_rows(grad, ctx.saved_tensors[0]), None, None), setup_context=_save
)


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def _kernels() -> dict[str, Any]:
    if not kernels:
        import triton
        import triton.language as tl

        @triton.jit
        def spread(  # type: ignore[no-untyped-def]  # Triton has no types for its pointers
                   X, PLACE, OUT, d, K: tl.constexpr, D: tl.constexpr):  # fmt: skip
            token = tl.program_id(0).to(tl.int64)
            cols = tl.program_id(1) * D + tl.arange(0, D)
            x = tl.load(X + token * d + cols, mask=cols < d)
            for choice in tl.static_range(K):
                at = tl.load(PLACE + token * K + choice)
                tl.store(OUT + at * d + cols, x, mask=cols < d)

        @triton.jit
        def collect(  # type: ignore[no-untyped-def]  # Triton has no types for its pointers
                    ROWS, PLACE, OUT, d, K: tl.constexpr, D: tl.constexpr):  # fmt: skip
            token = tl.program_id(0).to(tl.int64)
            cols = tl.program_id(1) * D + tl.arange(0, D)
            total = tl.zeros((D,), tl.float32)
            for choice in tl.static_range(K):
                at = tl.load(PLACE + token * K + choice)
                total += tl.load(ROWS + at * d + cols, mask=cols < d, other=0.0).to(tl.float32)
            tl.store(OUT + token * d + cols, total.to(OUT.dtype.element_ty), mask=cols < d)

        kernels.update(spread=spread, collect=collect)
    return kernels
