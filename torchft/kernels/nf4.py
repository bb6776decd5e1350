"""4-bit NormalFloat with double quantisation (QLoRA, https://arxiv.org/abs/2305.14314): 0.517 bytes a weight.

A matrix is held as one uint8 tensor ``packed`` [groups, GROUP_BYTES]. A row stands alone, so matrices of one width are
stacked by stacking their rows, and rows can be sharded. It holds GROUP = 16384 consecutive weights in 256 blocks of 64:

    8192 bytes  two codes each, the first weight in the high half, as in bitsandbytes
     256 bytes  the blocks' largest absolute values: low + step * byte
      16 bytes  low and step, fp32, then 8 zeros that keep rows aligned to 16 bytes

weight = CODEBOOK[code] * (low + step * byte), in fp32, rounded once.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # weights that share a scale
GROUP = 256 * BLOCK  # weights whose scales share ``low`` and ``step``
SCALES, FLOATS, GROUP_BYTES = GROUP // 2, GROUP // 2 + 256, GROUP // 2 + 256 + 16  # where in a row each part begins
CHUNK = 256  # groups quantised at a time: temporaries of 4M weights, under 100 MB
CODEBOOK = (  # quantiles of a normal, scaled to 1, with an exact 0; bitsandbytes' fp32 values
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@torch.no_grad()
def quantise_(packed: Tensor, weight: Tensor) -> Tensor:
    """Fill ``packed`` [groups, GROUP_BYTES] uint8 with the nearest codes of ``weight`` (groups * GROUP values)."""
    tiny = torch.finfo(torch.float32).tiny
    for rows, out in zip(weight.reshape(-1, GROUP).split(CHUNK), packed.split(CHUNK), strict=True):
        codes, scales = nearest(rows.view(-1, GROUP // BLOCK, BLOCK))
        out[:, :SCALES] = codes.view(-1, SCALES)
        low, high = scales.aminmax(dim=1, keepdim=True)
        step = (high - low) / 255
        out[:, SCALES:FLOATS] = ((scales - low) / step.clamp_min(tiny)).round().to(torch.uint8)
        out.view(torch.float32)[:, FLOATS // 4 :] = F.pad(torch.cat((low, step), dim=1), (0, 2))
    return packed


def nearest(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[..., BLOCK] -> their codes, two in a byte, [..., BLOCK / 2], and largest absolute values, [...] fp32."""
    codebook = _codebook(blocks.device)
    midpoints = (codebook[1:] + codebook[:-1]) / 2
    blocks = blocks.to(torch.float32)
    scales = blocks.abs().amax(dim=-1)
    tiny = torch.finfo(torch.float32).tiny  # a block of zeros has scale 0 and codes of 0
    unit = blocks * scales.clamp_min(tiny).reciprocal().unsqueeze(-1)
    codes = torch.bucketize(unit, midpoints, out_int32=True).to(torch.uint8)
    return codes[..., ::2] << 4 | codes[..., 1::2], scales


def units(codes: Tensor) -> Tensor:
    """Two codes a byte, [...] uint8 -> what they stand for, at scale 1: [..., 2] fp32."""
    codebook = _codebook(codes.device)
    pairs = torch.stack((codebook.repeat_interleave(16), codebook.repeat(16)), dim=1)  # byte -> its two weights
    return F.embedding(codes.to(torch.int32), pairs)


def dequantise_plain(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """[groups, GROUP_BYTES] uint8 -> [groups, GROUP]: what the Triton kernel computes, bit for bit."""
    low, step = packed.view(torch.float32)[:, FLOATS // 4 : FLOATS // 4 + 2].split(1, dim=1)
    scales = low + step * packed[:, SCALES:FLOATS]  # [groups, 256] fp32
    values = units(packed[:, :SCALES]).view(-1, GROUP // BLOCK, BLOCK)
    return (values * scales.unsqueeze(2)).to(dtype).view(-1, GROUP)


def dequantise_triton(packed: Tensor, out: Tensor, *, words: int = 512, num_warps: int = 4) -> None:
    """Write [groups, GROUP_BYTES] uint8 to ``out`` (groups * GROUP values, contiguous), with one kernel.

    A program handles ``words`` times 8 weights; benchmarks/nf4.py compares settings.
    """
    grid = (packed.shape[0], GROUP // 8 // words)
    views = packed.view(torch.int32), packed, packed.view(torch.float32), _codebook(packed.device), out
    sizes = {"GROUP": GROUP, "BLOCK": BLOCK, "SCALES": SCALES, "FLOATS": FLOATS, "GROUP_BYTES": GROUP_BYTES}
    # Without contraction to fused multiply-adds, so that the bits are those of ``dequantise_plain``.
    _kernel()[grid](*views, WORDS=words, **sizes, num_warps=num_warps, enable_fp_fusion=False)


@torch.library.custom_op("torchft::nf4_dequantise", mutates_args=())
def dequantise(packed: list[Tensor], columns: int, dtype: torch.dtype, tag: int) -> Tensor:
    """Matrices [out_i, columns] in NF4 -> their rows one below the other, [sum(out_i), columns] of ``dtype``.

    Opaque to the compiler. ``tag`` does nothing: give forward and backward another one, or the compiler finds that both
    compute the same, and keeps the dequantised weight in between (4 times NF4's memory).
    """
    result = _empty(packed, columns, dtype)
    parts = result.view(-1, GROUP).split([p.shape[0] for p in packed])
    for source, part in zip(packed, parts, strict=True):
        if source.is_cuda:
            dequantise_triton(source, part)
        else:
            part.copy_(dequantise_plain(source, dtype))
    return result


@dequantise.register_fake
def _empty(packed: list[Tensor], columns: int, dtype: torch.dtype, tag: int = 0) -> Tensor:
    rows = sum(p.shape[0] for p in packed) * GROUP // columns
    return packed[0].new_empty(rows, columns, dtype=dtype)


class NF4Linear(torch.autograd.Function):
    """``F.linear(x, W, bias)`` for a frozen W in NF4, which is dequantised again in backward rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed)
        return F.linear(x, dequantise([packed], x.shape[-1], x.dtype, 0), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (packed,) = ctx.saved_tensors
        columns = packed.shape[0] * GROUP // grad.shape[-1]
        grad_x = grad @ dequantise([packed], columns, grad.dtype, 1) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


@cache
def _codebook(device: torch.device) -> Tensor:
    return torch.tensor(CODEBOOK, dtype=torch.float32, device=device)


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(  # type: ignore[no-untyped-def]  # Triton has no types for its pointers
        codes,  # packed as int32: words of 8 codes
        scales,  # packed as uint8
        floats,  # packed as fp32
        codebook,
        out,
        WORDS: tl.constexpr,
        GROUP: tl.constexpr,
        BLOCK: tl.constexpr,
        SCALES: tl.constexpr,
        FLOATS: tl.constexpr,
        GROUP_BYTES: tl.constexpr,
    ):
        group = tl.program_id(0).to(tl.int64)
        word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)  # in its group
        eight = tl.arange(0, 8)
        low = tl.load(floats + group * (GROUP_BYTES // 4) + FLOATS // 4)
        step = tl.load(floats + group * (GROUP_BYTES // 4) + FLOATS // 4 + 1)
        byte = tl.load(scales + group * GROUP_BYTES + SCALES + word // (BLOCK // 8))
        scale = low + step * byte.to(tl.float32)  # [WORDS]
        packed = tl.load(codes + group * (GROUP_BYTES // 4) + word)
        code = (packed[:, None] >> ((4 * eight) ^ 4)[None, :]) & 15  # [WORDS, 8]: high half of each byte first
        weight = tl.load(codebook + code) * scale[:, None]
        tl.store(out + group * GROUP + (word * 8)[:, None] + eight[None, :], weight.to(out.dtype.element_ty))

    return kernel
