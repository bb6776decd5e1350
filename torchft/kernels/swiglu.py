"""SwiGLU between three linear layers with LoRA, in one pass over the wide activations each way.

Unfused, the low-rank updates of gate, up and down write and read [t, f] tensors again and again. Here rank-r products
happen in registers. On a CPU the same formulas run as plain PyTorch.

Legend: t tokens, f hidden width of the MLP, r rank. Inner products ``*_inner`` [t, r] are alpha / r * x A^T.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_RANK = 64  # what the kernels keep in registers
# Tokens x columns that a program holds: the fastest of 24 settings on one H200 for 16,384 x 14,336 (0.48 and 0.94 ms,
# where reading and writing alone take 0.33 and 0.55).
FORWARD_TILE = (32, 64)
BACKWARD_TILE = (64, 128)

kernels: dict[str, Any] = {}  # compiled on first use: triton exists on machines with a GPU only


@torch.library.custom_op("torchft::lora_swiglu", mutates_args=())
def lora_swiglu(
    gate: Tensor, up: Tensor, gate_inner: Tensor, up_inner: Tensor, gate_b: Tensor, up_b: Tensor, down_a: Tensor
) -> tuple[Tensor, Tensor]:
    """h = silu(gate + gate_inner gate_b^T) * (up + up_inner up_b^T) [t, f], and h down_a^T [t, r], in gate's dtype.

    Args:
        gate, up: outputs of the frozen projections [t, f].
        gate_inner, up_inner: [t, r].
        gate_b, up_b: [f, r].
        down_a: [r, f].
    """
    if not gate.is_cuda or gate.dtype == torch.float32:
        return _forward(gate, up, gate_inner, up_inner, gate_b, up_b, down_a)
    t, f, r = *gate.shape, gate_inner.shape[1]
    parts, padded = _split(t, f, FORWARD_TILE), padded_rank(r)
    h = torch.empty_like(gate)
    inner = gate.new_empty(parts, t, r, dtype=torch.float32)
    tensors = (x.contiguous() for x in (gate, up, gate_inner, up_inner, gate_b, up_b, down_a))
    grid, size = (-(-t // FORWARD_TILE[0]), parts), (t, f, r, -(-f // parts))
    _kernels()["forward"][grid](*tensors, h, inner, *size, padded, *FORWARD_TILE, num_warps=2, num_stages=3)
    return h, inner.sum(0).to(gate.dtype)


@lora_swiglu.register_fake
def _(gate: Tensor, up: Tensor, gate_inner: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(gate_inner)


@torch.library.custom_op("torchft::lora_swiglu_backward", mutates_args=())
def lora_swiglu_backward(
    grad_h: Tensor,
    grad_inner: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_inner: Tensor,
    up_inner: Tensor,
    gate_b: Tensor,
    up_b: Tensor,
    down_a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate, up [t, f] and of their inner products [t, r], from those of h and of h down_a^T."""
    if not gate.is_cuda or gate.dtype == torch.float32:
        return _backward(grad_h, grad_inner, gate, up, gate_inner, up_inner, gate_b, up_b, down_a)
    t, f, r = *gate.shape, gate_inner.shape[1]
    parts, padded = _split(t, f, BACKWARD_TILE), padded_rank(r)
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    inner = gate.new_empty(2, parts, t, r, dtype=torch.float32)
    tensors = (x.contiguous() for x in (grad_h, grad_inner, gate, up, gate_inner, up_inner, gate_b, up_b, down_a))
    out = (grad_gate, grad_up, inner[0], inner[1])
    grid, size = (-(-t // BACKWARD_TILE[0]), parts), (t, f, r, -(-f // parts))
    _kernels()["backward"][grid](*tensors, *out, *size, padded, *BACKWARD_TILE, num_warps=4, num_stages=2)
    summed = inner.sum(1).to(gate.dtype)  # [2, t, r]
    return grad_gate, grad_up, summed[0].clone(), summed[1].clone()


@lora_swiglu_backward.register_fake
def _(
    grad_h: Tensor, grad_inner: Tensor, gate: Tensor, up: Tensor, gate_inner: Tensor, up_inner: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x) for x in (gate, up, gate_inner, up_inner))  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _gradients(ctx: Any, grad_h: Tensor, grad_inner: Tensor) -> tuple[Tensor, ...]:
    gate, up, gate_inner, up_inner, gate_b, up_b, down_a, h = ctx.saved_tensors
    grad_inner = grad_inner.to(gate.dtype)
    inputs = (gate, up, gate_inner, up_inner, gate_b, up_b, down_a)
    d_gate, d_up, d_gate_inner, d_up_inner = lora_swiglu_backward(grad_h, grad_inner, *inputs)
    d_gate_b, d_up_b = d_gate.t() @ gate_inner, d_up.t() @ up_inner  # [f, r]
    return d_gate, d_up, d_gate_inner, d_up_inner, d_gate_b, d_up_b, grad_inner.t() @ h


lora_swiglu.register_autograd(_gradients, setup_context=_setup)


def _activations(
    gate: Tensor, up: Tensor, gate_inner: Tensor, up_inner: Tensor, gate_b: Tensor, up_b: Tensor
) -> tuple[Tensor, Tensor]:
    """gate and up with their updates, in fp32 (or fp64)."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(wide) + gate_inner.to(wide) @ gate_b.to(wide).t()
    return g, up.to(wide) + up_inner.to(wide) @ up_b.to(wide).t()


def _forward(
    gate: Tensor, up: Tensor, gate_inner: Tensor, up_inner: Tensor, gate_b: Tensor, up_b: Tensor, down_a: Tensor
) -> tuple[Tensor, Tensor]:
    g, u = _activations(gate, up, gate_inner, up_inner, gate_b, up_b)
    h = (F.silu(g) * u).to(gate.dtype)
    return h, (h.to(g.dtype) @ down_a.to(g.dtype).t()).to(gate.dtype)


def _backward(
    grad_h: Tensor,
    grad_inner: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_inner: Tensor,
    up_inner: Tensor,
    gate_b: Tensor,
    up_b: Tensor,
    down_a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g, u = _activations(gate, up, gate_inner, up_inner, gate_b, up_b)
    d = grad_h.to(g.dtype) + grad_inner.to(g.dtype) @ down_a.to(g.dtype)
    sigmoid = g.sigmoid()
    d_up = (d * g * sigmoid).to(gate.dtype)
    d_gate = (d * u * sigmoid * (1 + g * (1 - sigmoid))).to(gate.dtype)
    d_inner = (d_gate.to(g.dtype) @ gate_b.to(g.dtype), d_up.to(g.dtype) @ up_b.to(g.dtype))
    return d_gate, d_up, d_inner[0].to(gate.dtype), d_inner[1].to(gate.dtype)


def padded_rank(rank: int) -> int:
    """The matrix units work on at least 16 columns, a power of two."""
    return max(16, 1 << (rank - 1).bit_length())


def _split(t: int, f: int, tile: tuple[int, int]) -> int:
    """Pieces of f, so that few tokens fill the chip too: some 2048 programs on some 132 multiprocessors."""
    return max(1, min(f // 512, 2048 * tile[0] // t))


def _kernels() -> dict[str, Any]:
    if not kernels:
        import triton
        import triton.language as tl

        @triton.jit
        def forward(  # type: ignore[no-untyped-def]  # Triton has no types for its pointers
                    GATE, UP, GI, UI, GB, UB, DA, H, INNER, t, f, r, per_part,
                    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr):  # fmt: skip
            rows = tl.program_id(0) * T + tl.arange(0, T)
            part = tl.program_id(1)
            rank = tl.arange(0, R)
            row_ok, rank_ok = rows[:, None] < t, rank[None, :] < r
            at = rows[:, None].to(tl.int64) * r + rank[None, :]
            gi = tl.load(GI + at, mask=row_ok & rank_ok, other=0.0)
            ui = tl.load(UI + at, mask=row_ok & rank_ok, other=0.0)
            total = tl.zeros((T, R), tl.float32)
            start = part * per_part
            for first in range(start, min(start + per_part, f), N):
                cols = first + tl.arange(0, N)
                col_ok = (cols[None, :] < f) & (cols[None, :] < start + per_part)
                ok = row_ok & col_ok
                x = rows[:, None].to(tl.int64) * f + cols[None, :]
                b = cols[None, :] * r + rank[:, None]  # B^T [R, N]
                b_ok = (rank[:, None] < r) & col_ok
                gb = tl.load(GB + b, mask=b_ok, other=0.0)
                ub = tl.load(UB + b, mask=b_ok, other=0.0)
                g = tl.dot(gi, gb, tl.load(GATE + x, mask=ok, other=0.0).to(tl.float32))
                u = tl.dot(ui, ub, tl.load(UP + x, mask=ok, other=0.0).to(tl.float32))
                h = (g * tl.sigmoid(g) * u).to(H.dtype.element_ty)
                tl.store(H + x, h, mask=ok)
                a = tl.load(DA + rank[None, :] * f + cols[:, None], mask=rank_ok & (cols[:, None] < f), other=0.0)
                total = tl.dot(tl.where(ok, h, 0.0).to(a.dtype), a, total)  # [T, N] x [N, R]
            tl.store(INNER + part.to(tl.int64) * t * r + at, total, mask=row_ok & rank_ok)

        @triton.jit
        def backward(  # type: ignore[no-untyped-def]  # Triton has no types for its pointers
                     DH, DI, GATE, UP, GI, UI, GB, UB, DA, DGATE, DUP, DGI, DUI, t, f, r, per_part,
                     R: tl.constexpr, T: tl.constexpr, N: tl.constexpr):  # fmt: skip
            rows = tl.program_id(0) * T + tl.arange(0, T)
            part = tl.program_id(1)
            rank = tl.arange(0, R)
            row_ok, rank_ok = rows[:, None] < t, rank[None, :] < r
            at = rows[:, None].to(tl.int64) * r + rank[None, :]
            gi = tl.load(GI + at, mask=row_ok & rank_ok, other=0.0)
            ui = tl.load(UI + at, mask=row_ok & rank_ok, other=0.0)
            di = tl.load(DI + at, mask=row_ok & rank_ok, other=0.0)
            dgi = tl.zeros((T, R), tl.float32)
            dui = tl.zeros((T, R), tl.float32)
            start = part * per_part
            for first in range(start, min(start + per_part, f), N):
                cols = first + tl.arange(0, N)
                col_ok = (cols[None, :] < f) & (cols[None, :] < start + per_part)
                ok = row_ok & col_ok
                x = rows[:, None].to(tl.int64) * f + cols[None, :]
                b = cols[None, :] * r + rank[:, None]
                b_ok = (rank[:, None] < r) & col_ok
                gb = tl.load(GB + b, mask=b_ok, other=0.0)  # [R, N]
                ub = tl.load(UB + b, mask=b_ok, other=0.0)
                a = tl.load(DA + rank[:, None] * f + cols[None, :], mask=b_ok, other=0.0)
                g = tl.dot(gi, gb, tl.load(GATE + x, mask=ok, other=0.0).to(tl.float32))
                u = tl.dot(ui, ub, tl.load(UP + x, mask=ok, other=0.0).to(tl.float32))
                d = tl.dot(di, a, tl.load(DH + x, mask=ok, other=0.0).to(tl.float32))
                s = tl.sigmoid(g)
                du = (d * g * s).to(gb.dtype)
                dg = (d * u * s * (1 + g * (1 - s))).to(gb.dtype)
                tl.store(DGATE + x, dg, mask=ok)
                tl.store(DUP + x, du, mask=ok)
                dgi = tl.dot(dg, tl.trans(gb), dgi)
                dui = tl.dot(du, tl.trans(ub), dui)
            out = part.to(tl.int64) * t * r + at
            tl.store(DGI + out, dgi, mask=row_ok & rank_ok)
            tl.store(DUI + out, dui, mask=row_ok & rank_ok)

        kernels.update(forward=forward, backward=backward)
    return kernels
