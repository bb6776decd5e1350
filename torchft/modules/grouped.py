"""Linear layers of many experts at once: rows sorted by expert, weights stacked [e, out, in], one grouped product.

Shapes: t tokens, k experts per token, n = t * k rows, e experts.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from torchft.kernels.expert_tiles import row_ranges
from torchft.kernels.rows import collect_rows, spread_rows

ALIGNED = 8  # bf16 values in 16 bytes


class Routes(NamedTuple):
    """Which rows the experts compute, sorted by expert. Row i is choice ``order[i] % k`` of token ``order[i] // k``."""

    order: Tensor  # [n]: the rows' numbers before sorting, token * k + choice
    place: Tensor  # [n]: its inverse
    offsets: Tensor  # [e] int32: expert i has the rows from offsets[i - 1] to offsets[i]
    experts: Tensor | None  # [n]: of each row; None where rows of other ranks' experts come last


class StackedLinear(nn.Module):
    """A linear layer per expert: ``weight`` [e, out, in], ``bias`` [e, out]."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features)) if bias else None
        self.multiply = grouped_linear  # another one for weights in fewer bits: adapters/stacked.py
        nn.init.uniform_(self.weight, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))

    def forward(self, x: Tensor, offsets: Tensor, scale: Tensor | None = None) -> Tensor:
        """Rows [n, in] -> [n, out]; expert i has those from offsets[i - 1] to offsets[i]. ``scale`` [n, 1]: of rows.

        Scaled is what goes in, where it is narrow, so that no product has to be kept for the gradient of ``scale``.
        """
        x = x if scale is None else x * scale
        return self.add_bias(self.multiply(x, self.weight, offsets), offsets, scale)

    def add_bias(self, out: Tensor, offsets: Tensor, scale: Tensor | None) -> Tensor:
        """[n, out] plus each row's bias, times its ``scale``."""
        if self.bias is None:
            return out
        rows = torch.arange(len(out), dtype=torch.int32, device=out.device)
        experts = torch.searchsorted(offsets, rows, right=True)  # [n]
        experts = experts.clamp(max=len(self.bias) - 1)  # rows behind the last are another rank's
        chosen = F.one_hot(experts, len(self.bias)).to(out.dtype)  # [n, e]: a product, so that its gradient is one
        return out + (chosen if scale is None else chosen * scale) @ self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_experts} x ({self.in_features} -> {self.out_features}), bias={self.bias is not None}"


def waits_for_host(model: nn.Module) -> bool:
    """Whether its forward asks a GPU how many rows each expert has: where experts are not computed in bf16."""
    return any(isinstance(m, StackedLinear) and m.weight.dtype != torch.bfloat16 for m in model.modules())


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows x [n, in] times the transposed weight [e, out, in] of their expert -> [n, out]; ``offsets`` [e] int32.

    On a GPU in bf16 one kernel; elsewhere an expert after the other, for which a GPU is waited for.
    """
    return grouped_mm(x, weight.to(x.dtype).mT, offsets)


def spread(x: Tensor, routes: Routes) -> Tensor:
    """x [t, d] -> a row for each of a token's k experts, sorted by expert: [n, d]."""
    return spread_rows(x, routes.place)


def collect(rows: Tensor, routes: Routes, *, num_tokens: int) -> Tensor:
    """Sorted rows [n, d] -> the sum of each token's, [t, d]."""
    return collect_rows(rows, routes.place, num_tokens)


def pick(x: Tensor, cells: Tensor) -> Tensor:
    """Rows [m, r] -> those that ``cells`` [n] names, each at most once: [n, r]. Without atomic additions."""
    return _Pick.apply(x, cells)


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cells: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cells)
        ctx.num_cells = len(x)
        return x[cells]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (cells,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_cells, grad.shape[1]).index_put((cells,), grad), None


# Operators of our own: F.grouped_mm traces in bf16 only (torch 2.11 to 2.13), and the compiler does not know that it is
# dear: of what may be kept for backward it would never keep such a product, however much memory there is.


@torch.library.custom_op("torchft::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows x [n, i] times the weight [e, i, o] of their expert -> [n, o]."""
    if _has_kernel(x):
        out = F.grouped_mm(_aligned(x), _aligned(_aligned(weight).mT).mT, offs=offsets)
        return out[:, : weight.shape[2]].contiguous()
    out = x.new_empty(x.shape[0], weight.shape[2])
    for expert, (start, stop) in enumerate(row_ranges(offsets)):
        out[start:stop] = x[start:stop] @ weight[expert]
    return out


@torch.library.custom_op("torchft::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """The gradient of ``grouped_mm`` for its weight: x [n, i], grad [n, o] -> [e, i, o]."""
    if _has_kernel(x):
        out = F.grouped_mm(_aligned(x).mT, _aligned(grad), offs=offsets)
        return out[:, : x.shape[1], : grad.shape[1]].contiguous()
    out = x.new_empty(offsets.shape[0], x.shape[1], grad.shape[1])
    for expert, (start, stop) in enumerate(row_ranges(offsets)):
        out[expert] = x[start:stop].mT @ grad[start:stop]
    return out


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


def _aligned(x: Tensor) -> Tensor:
    """x [..., c] with zeros behind, so that rows are multiples of 16 bytes, which ``F.grouped_mm`` wants."""
    more = -x.shape[-1] % ALIGNED
    return F.pad(x, (0, more)) if more else x


@grouped_mm.register_fake
def _product_shape(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@grouped_outer.register_fake
def _outer_shape(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], x.shape[1], grad.shape[1])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # the context's type is not public
    x, weight, offsets = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, offsets)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    dx = grouped_mm(grad, weight.mT, offsets) if ctx.needs_input_grad[0] else None
    # Transposed like the weight, which is a view of [e, o, i]: the parameter's gradient is as contiguous as it is.
    return dx, None if x is None else grouped_outer(grad, x, offsets).mT, None


grouped_mm.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.torchft.grouped_mm)
def _product_flops(x, weight, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.torchft.grouped_outer)
def _outer_flops(x, grad, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * x[0] * x[1] * grad[1]
