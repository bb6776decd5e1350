"""Attention of one query per row over its row of a cache: a step of decoding, which only reads the cache.

A program holds the queries of all heads that share a key head, so that keys and values are read once, and reads them
where they lie. FlashAttention's kernel, made for many queries, first copies the queries into rows of their own and the
answers back, and fills tiles of 128 queries.

Legend: b rows, h heads, k key heads, c channels of a head.
"""

from typing import Any

import torch
from torch import Tensor

TILE, LAUNCH = 64, {"num_warps": 4, "num_stages": 3}  # keys that a program looks at together: 70 KiB of shared memory
WIDE = 128  # channels beyond which fewer keys are held at once: GPUs that are no data centre's share 99 KiB
WIDE_TILE, WIDE_LAUNCH = 32, {"num_warps": 4, "num_stages": 2}
PROGRAMS = 2  # per multiprocessor that are enough; with fewer, long rows had better be split

kernels: dict[str, Any] = {}  # compiled on first use: triton exists on machines with a GPU only


def fills(q: Tensor, k: Tensor) -> bool:
    """Whether a GPU has enough to do with a program for each row and key head of q [b, 1, h, c], k [b, slots, k, c]."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    programs: int = PROGRAMS * torch.cuda.get_device_properties(q.device).multi_processor_count
    return len(q) * k.shape[2] >= programs


def one_query(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    """q [b, 1, h, c] over the last ``window`` (None: all) of the first ``lengths`` [b] slots of k, v [b, slots, k, c]
    -> [b, 1, h, c]. ``sinks`` [h]: logits that take part in the softmax and add nothing. Softmax and sums are fp32."""
    (b, slots, heads, c), group = k.shape, q.shape[2] // k.shape[2]
    assert v.shape == k.shape and k.stride() == v.stride() and k.stride(3) == 1
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    padded = tuple(max(16, 1 << (size - 1).bit_length()) for size in (group, c))  # matrix units take no fewer
    tile, launch = (TILE, LAUNCH) if c <= WIDE else (WIDE_TILE, WIDE_LAUNCH)
    _kernels()["attend"][(b, heads)](
        q, k, v, lengths, sinks, out, scale * 1.4426950408889634, window or slots, *k.stride()[:3],
        heads, group, c, *padded, tile, sinks is not None, **launch,
    )  # fmt: skip
    return out


def _kernels() -> dict[str, Any]:
    if not kernels:
        import triton
        import triton.language as tl

        @triton.jit
        def attend(  # type: ignore[no-untyped-def]  # Triton has no types for its pointers
                   Q, K, V, LENGTHS, SINKS, OUT, scale, window, row_stride, slot_stride, head_stride,
                   heads, group, c, G: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
                   HAS_SINKS: tl.constexpr):  # fmt: skip
            row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
            length = tl.load(LENGTHS + row)
            first = tl.maximum(length - window, 0)
            of_group, cols = tl.arange(0, G), tl.arange(0, C)
            h = head * group + of_group
            group_ok, col_ok = of_group < group, cols < c
            at = (row * heads * group + h)[:, None] * c + cols[None, :]
            q = tl.load(Q + at, mask=group_ok[:, None] & col_ok[None, :], other=0.0)  # [G, C]
            cache = row * row_stride + head * head_stride + cols
            # Scores are in units of log 2. A sink is one more key, whose value is zero.
            top = tl.full((G,), float("-inf"), tl.float32)
            total = tl.zeros((G,), tl.float32)
            if HAS_SINKS:
                top = tl.load(SINKS + h, mask=group_ok, other=0.0).to(tl.float32) * 1.4426950408889634
                total += 1.0
            found = tl.zeros((G, C), tl.float32)
            for start in range(first // N * N, length, N):
                slot = start + tl.arange(0, N)
                ok = (slot >= first) & (slot < length)
                of_slot = cache[None, :] + slot[:, None].to(tl.int64) * slot_stride
                wanted = ok[:, None] & col_ok[None, :]
                keys = tl.load(K + of_slot, mask=wanted, other=0.0)  # [N, C]
                scores = tl.where(ok[None, :], tl.dot(q, tl.trans(keys)) * scale, float("-inf"))  # [G, N]
                higher = tl.maximum(top, tl.max(scores, 1))
                shrink = tl.exp2(top - higher)
                probs = tl.exp2(scores - higher[:, None])
                total = total * shrink + tl.sum(probs, 1)
                values = tl.load(V + of_slot, mask=wanted, other=0.0)
                found = tl.dot(probs.to(values.dtype), values, found * shrink[:, None])
                top = higher
            tl.store(
                OUT + at, (found / total[:, None]).to(OUT.dtype.element_ty), mask=group_ok[:, None] & col_ok[None, :]
            )

        kernels["attend"] = attend
    return kernels
