"""SwiGLU between the two stacked linear layers of experts with LoRA, in one pass over the wide activations each way.

As swiglu.py, where rows belong to experts with adapters of their own. On a CPU the same formulas, expert by expert.

Legend: n rows sorted by expert, e experts, f an expert's width, r rank; ``offsets`` [e] int32: expert i has the rows
from offsets[i - 1] to offsets[i].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchft.kernels.expert_tiles import has_kernels, padded_sizes, row_ranges, tile_finder
from torchft.kernels.narrow_outer import narrow_outer

# Rows x columns that a program holds: the fastest of 40 settings on one H100 for 131,072 rows of 128 experts 768 wide,
# rank 16 (0.27 and 0.57 ms on an H200, where reading and writing alone take some 0.15 and 0.3).
FORWARD_TILE, FORWARD_LAUNCH = (32, 64), {"num_warps": 1, "num_stages": 3}
BACKWARD_TILE, BACKWARD_LAUNCH = (64, 64), {"num_warps": 4, "num_stages": 3}

kernels: dict[str, Any] = {}  # compiled on first use: triton exists on machines with a GPU only


@torch.library.custom_op("torchft::expert_swiglu", mutates_args=())
def expert_swiglu(
    gate_up: Tensor, inner: Tensor, gate_up_b: Tensor, down_a: Tensor, scale: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """h = scale * silu(g) * u [n, f], g and u the halves of gate_up + inner gate_up_b^T, and h down_a^T [n, r].

    Args:
        gate_up: output of the frozen projection [n, 2 f].
        inner: alpha / r * x gate_up_a^T [n, r].
        gate_up_b: [e, 2 f, r].
        down_a: [e, r, f].
        scale: of rows [n, 1].
        offsets: where each expert's rows end.

    Returns both in gate_up's dtype; rows behind the last expert's are not written on a GPU.
    """
    if not has_kernels(gate_up):
        return _forward(gate_up, inner, gate_up_b, down_a, scale, offsets)
    n, f, r = gate_up.shape[0], gate_up.shape[1] // 2, inner.shape[1]
    h, down_inner = gate_up.new_empty(n, f), torch.empty_like(inner)
    tensors = (x.contiguous() for x in (gate_up, inner, gate_up_b, down_a, scale, offsets))
    num_experts = len(offsets)
    grid, padded = (-(-n // FORWARD_TILE[0]) + num_experts,), padded_sizes(num_experts, r)
    _kernels()["forward"][grid](*tensors, h, down_inner, f, r, num_experts, *padded, *FORWARD_TILE, **FORWARD_LAUNCH)
    return h, down_inner


@expert_swiglu.register_fake
def _(gate_up: Tensor, inner: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2), torch.empty_like(inner)


@torch.library.custom_op("torchft::expert_swiglu_backward", mutates_args=())
def expert_swiglu_backward(
    grad_h: Tensor,
    grad_inner: Tensor,
    gate_up: Tensor,
    inner: Tensor,
    gate_up_b: Tensor,
    down_a: Tensor,
    scale: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate_up [n, 2 f], inner [n, r] and scale [n, 1], from those of h and of h down_a^T; and h itself.

    So that h, which the gradient of down_a needs, is neither kept nor computed by another pass.
    """
    if not has_kernels(gate_up):
        return _backward(grad_h, grad_inner, gate_up, inner, gate_up_b, down_a, scale, offsets)
    n, f, r = gate_up.shape[0], gate_up.shape[1] // 2, inner.shape[1]
    given = (grad_h, grad_inner, gate_up, inner, gate_up_b, down_a, scale, offsets)
    tensors = (x.contiguous() for x in given)
    out = torch.empty_like(gate_up), torch.empty_like(inner), torch.empty_like(scale), grad_h.new_empty(grad_h.shape)
    num_experts = len(offsets)
    grid, padded = (-(-n // BACKWARD_TILE[0]) + num_experts,), padded_sizes(num_experts, r)
    _kernels()["backward"][grid](*tensors, *out, f, r, num_experts, *padded, *BACKWARD_TILE, **BACKWARD_LAUNCH)
    return out


@expert_swiglu_backward.register_fake
def _(
    grad_h: Tensor, grad_inner: Tensor, gate_up: Tensor, inner: Tensor, gate_up_b: Tensor, down_a: Tensor,
    scale: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(gate_up), torch.empty_like(inner), torch.empty_like(scale), grad_h.new_empty(grad_h.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_h: Tensor, grad_inner: Tensor) -> tuple[Tensor | None, ...]:
    gate_up, inner, gate_up_b, down_a, scale, offsets = ctx.saved_tensors
    grad_inner = grad_inner.to(gate_up.dtype)
    inputs = (gate_up, inner, gate_up_b, down_a, scale, offsets)
    d_gate_up, d_inner, d_scale, h = expert_swiglu_backward(grad_h, grad_inner, *inputs)
    d_down_a = narrow_outer(h, grad_inner, offsets).mT  # [e, r, f]
    return d_gate_up, d_inner, narrow_outer(d_gate_up, inner, offsets), d_down_a, d_scale, None


expert_swiglu.register_autograd(_gradients, setup_context=_setup)


def _activations(gate_up: Tensor, inner: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One expert's gate and up with their update, in fp32 (or fp64)."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = (gate_up.to(wide) + inner.to(wide) @ b.to(wide).t()).chunk(2, dim=1)
    return gate, up


def _forward(
    gate_up: Tensor, inner: Tensor, gate_up_b: Tensor, down_a: Tensor, scale: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    h, down_inner = gate_up.new_zeros(len(gate_up), gate_up.shape[1] // 2), torch.zeros_like(inner)
    for expert, (i, j) in enumerate(row_ranges(offsets)):
        gate, up = _activations(gate_up[i:j], inner[i:j], gate_up_b[expert])
        h[i:j] = F.silu(gate) * up * scale[i:j]
        down_inner[i:j] = h[i:j].to(gate.dtype) @ down_a[expert].to(gate.dtype).t()
    return h, down_inner


def _backward(
    grad_h: Tensor,
    grad_inner: Tensor,
    gate_up: Tensor,
    inner: Tensor,
    gate_up_b: Tensor,
    down_a: Tensor,
    scale: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_gate_up, d_inner, d_scale = torch.zeros_like(gate_up), torch.zeros_like(inner), torch.zeros_like(scale)
    h = grad_h.new_zeros(grad_h.shape)
    for expert, (i, j) in enumerate(row_ranges(offsets)):
        gate, up = _activations(gate_up[i:j], inner[i:j], gate_up_b[expert])
        d = grad_h[i:j].to(gate.dtype) + grad_inner[i:j].to(gate.dtype) @ down_a[expert].to(gate.dtype)
        h[i:j] = F.silu(gate) * up * scale[i:j]
        d_scale[i:j] = (d * F.silu(gate) * up).sum(1, keepdim=True)
        d, sigmoid = d * scale[i:j], gate.sigmoid()
        d_gate_up[i:j] = torch.cat([d * up * sigmoid * (1 + gate * (1 - sigmoid)), d * gate * sigmoid], dim=1)
        d_inner[i:j] = d_gate_up[i:j].to(gate.dtype) @ gate_up_b[expert].to(gate.dtype)
    return d_gate_up, d_inner, d_scale, h


def _kernels() -> dict[str, Any]:
    if not kernels:
        import triton
        import triton.language as tl

        find = tile_finder()

        @triton.jit
        def forward(  # type: ignore[no-untyped-def]  # Triton has no types for its pointers
                    GU, INNER, B, A, SCALE, OFFSETS, H, OUT, f, r, e,
                    E: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr):  # fmt: skip
            expert, first, end = find(OFFSETS, tl.program_id(0), e, E, T)
            if first >= end:
                return
            rows = first + tl.arange(0, T)
            rank = tl.arange(0, R)
            row_ok, rank_ok = rows[:, None] < end, rank[None, :] < r
            wide = rows[:, None].to(tl.int64)
            at = wide * r + rank[None, :]
            inner = tl.load(INNER + at, mask=row_ok & rank_ok, other=0.0)
            scale = tl.load(SCALE + rows, mask=rows < end, other=0.0).to(tl.float32)
            b_gate = B + expert.to(tl.int64) * 2 * f * r
            b_up, a_down = b_gate + f * r, A + expert.to(tl.int64) * r * f
            total = tl.zeros((T, R), tl.float32)
            for start in range(0, f, N):
                cols = start + tl.arange(0, N)
                col_ok = cols[None, :] < f
                ok = row_ok & col_ok
                x = wide * (2 * f) + cols[None, :]
                b = cols[None, :] * r + rank[:, None]  # B^T [R, N]
                b_ok = (rank[:, None] < r) & col_ok
                gb = tl.load(b_gate + b, mask=b_ok, other=0.0)
                ub = tl.load(b_up + b, mask=b_ok, other=0.0)
                g = tl.dot(inner, gb, tl.load(GU + x, mask=ok, other=0.0).to(tl.float32))
                u = tl.dot(inner, ub, tl.load(GU + x + f, mask=ok, other=0.0).to(tl.float32))
                h = (g * tl.sigmoid(g) * u * scale[:, None]).to(H.dtype.element_ty)
                tl.store(H + wide * f + cols[None, :], h, mask=ok)
                a = tl.load(a_down + rank[None, :] * f + cols[:, None], mask=rank_ok & (cols[:, None] < f), other=0.0)
                total = tl.dot(tl.where(ok, h, 0.0).to(a.dtype), a, total)  # [T, N] x [N, R]
            tl.store(OUT + at, total.to(OUT.dtype.element_ty), mask=row_ok & rank_ok)

        @triton.jit
        def backward(  # type: ignore[no-untyped-def]  # Triton has no types for its pointers
                     DH, DI, GU, INNER, B, A, SCALE, OFFSETS, DGU, DINNER, DSCALE, H, f, r, e,
                     E: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr):  # fmt: skip
            expert, first, end = find(OFFSETS, tl.program_id(0), e, E, T)
            if first >= end:
                return
            rows = first + tl.arange(0, T)
            rank = tl.arange(0, R)
            row_ok, rank_ok = rows[:, None] < end, rank[None, :] < r
            wide = rows[:, None].to(tl.int64)
            at = wide * r + rank[None, :]
            inner = tl.load(INNER + at, mask=row_ok & rank_ok, other=0.0)
            di = tl.load(DI + at, mask=row_ok & rank_ok, other=0.0)
            scale = tl.load(SCALE + rows, mask=rows < end, other=0.0).to(tl.float32)
            b_gate = B + expert.to(tl.int64) * 2 * f * r
            b_up, a_down = b_gate + f * r, A + expert.to(tl.int64) * r * f
            d_inner = tl.zeros((T, R), tl.float32)
            d_scale = tl.zeros((T,), tl.float32)
            for start in range(0, f, N):
                cols = start + tl.arange(0, N)
                col_ok = cols[None, :] < f
                ok = row_ok & col_ok
                x = wide * (2 * f) + cols[None, :]
                b = cols[None, :] * r + rank[:, None]
                b_ok = (rank[:, None] < r) & col_ok
                gb = tl.load(b_gate + b, mask=b_ok, other=0.0)  # [R, N]
                ub = tl.load(b_up + b, mask=b_ok, other=0.0)
                a = tl.load(a_down + rank[:, None] * f + cols[None, :], mask=b_ok, other=0.0)
                g = tl.dot(inner, gb, tl.load(GU + x, mask=ok, other=0.0).to(tl.float32))
                u = tl.dot(inner, ub, tl.load(GU + x + f, mask=ok, other=0.0).to(tl.float32))
                d = tl.dot(di, a, tl.load(DH + wide * f + cols[None, :], mask=ok, other=0.0).to(tl.float32))
                s = tl.sigmoid(g)
                act = g * s
                d_scale += tl.sum(d * act * u, 1)
                tl.store(H + wide * f + cols[None, :], (act * u * scale[:, None]).to(H.dtype.element_ty), mask=ok)
                d *= scale[:, None]
                du = (d * act).to(gb.dtype)
                dg = (d * u * (s + act * (1 - s))).to(gb.dtype)
                tl.store(DGU + x, dg, mask=ok)
                tl.store(DGU + x + f, du, mask=ok)
                d_inner = tl.dot(dg, tl.trans(gb), d_inner)
                d_inner = tl.dot(du, tl.trans(ub), d_inner)
            tl.store(DINNER + at, d_inner.to(DINNER.dtype.element_ty), mask=row_ok & rank_ok)
            tl.store(DSCALE + rows, d_scale.to(DSCALE.dtype.element_ty), mask=rows < end)

        kernels.update(forward=forward, backward=backward)
    return kernels
