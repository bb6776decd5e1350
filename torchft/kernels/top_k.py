"""The k largest of each short row: a router's choice among its experts. PyTorch's own kernel is made for long rows.

Legend: t rows, e columns.
"""

from typing import Any

import torch
from torch import Tensor

ROWS, LAUNCH = 8, {"num_warps": 4}  # that a program holds
MAX_COLUMNS = 1024

kernels: dict[str, Any] = {}  # compiled on first use: triton exists on machines with a GPU only


@torch.library.custom_op("torchft::top_k", mutates_args=())
def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [t, e] fp32 -> its k largest values, the largest first, and their columns, int64; [t, k] each.

    Of equal values the first comes first, and NaN is the largest, on a GPU; as ``torch.topk`` does it elsewhere.
    """
    t, e = x.shape
    assert k <= e, "fewer columns than are to be chosen"
    if not x.is_cuda or x.dtype != torch.float32 or not 0 < e <= MAX_COLUMNS:
        values, columns = x.topk(k, dim=-1)
        return values, columns
    values = x.new_empty(t, k)
    columns = torch.empty(t, k, dtype=torch.int64, device=x.device)
    padded = 1 << (e - 1).bit_length()
    _kernels()["largest"][(-(-t // ROWS),)](x.contiguous(), values, columns, t, e, k, ROWS, padded, **LAUNCH)
    return values, columns


@top_k.register_fake
def _(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    (columns,) = ctx.saved_tensors
    return grad.new_zeros(ctx.shape).scatter(1, columns, grad), None


top_k.register_autograd(_backward, setup_context=_save)


def _kernels() -> dict[str, Any]:
    if not kernels:
        import triton
        import triton.language as tl

        @triton.jit
        def largest(  # type: ignore[no-untyped-def]  # Triton has no types for its pointers
                    X, VALUES, COLUMNS, t, e, K: tl.constexpr, T: tl.constexpr, E: tl.constexpr):  # fmt: skip
            rows = (tl.program_id(0) * T + tl.arange(0, T)).to(tl.int64)
            cols = tl.arange(0, E)
            ok = (rows[:, None] < t) & (cols[None, :] < e)
            x = tl.load(X + rows[:, None] * e + cols[None, :], mask=ok, other=float("-inf"))
            # Integers in the order of the floats, NaN above all: what was taken can then be below all of them.
            bits = x.to(tl.int32, bitcast=True)
            keys = tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)).to(tl.int64)
            keys = keys * E + (E - 1 - cols[None, :])  # no two alike, of equal values the first column is the largest
            keys = tl.where(cols[None, :] < e, keys, -(1 << 62))
            for choice in tl.static_range(K):
                best = tl.max(keys, 1)  # [T]
                column = E - 1 - (best & (E - 1))
                value = tl.sum(tl.where(cols[None, :] == column[:, None], x, 0.0), 1)
                at = rows * K + choice
                tl.store(VALUES + at, value, mask=rows < t)
                tl.store(COLUMNS + at, column.to(tl.int64), mask=rows < t)
                keys = tl.where(keys == best[:, None], -(1 << 62), keys)

        kernels["largest"] = largest
    return kernels
