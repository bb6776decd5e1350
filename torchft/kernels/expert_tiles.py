"""What kernels over rows sorted by expert have in common: which rows a program has, and when there are kernels at all.

Legend: n rows sorted by expert, e experts, r rank; ``offsets`` [e] int32: expert i has the rows from offsets[i - 1] to
offsets[i].
"""

from typing import Any

import torch
from torch import Tensor

from torchft.kernels.swiglu import padded_rank

kernels: dict[str, Any] = {}  # compiled on first use: triton exists on machines with a GPU only


def has_kernels(x: Tensor) -> bool:
    """Whether products of x use the GPU's matrix units, by Triton; else they are plain PyTorch's, expert by expert."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def row_ranges(offsets: Tensor) -> list[tuple[int, int]]:
    """First row and end of each expert's rows. A GPU is waited for."""
    stops = offsets.tolist()
    return list(zip([0, *stops], stops))


def padded_sizes(num_experts: int, rank: int) -> tuple[int, int]:
    """Both as powers of two, which kernels hold."""
    return 1 << (num_experts - 1).bit_length(), padded_rank(rank)


def tile_finder() -> Any:
    """The Triton function that kernels ask for their rows. They need n / T + e programs."""
    if not kernels:
        import triton
        import triton.language as tl

        @triton.jit
        def find(OFFSETS, tile, e, E: tl.constexpr, T: tl.constexpr):  # type: ignore[no-untyped-def]
            """Expert of the tile-th tile of T rows, its first row, where the expert's rows end. No tile mixes experts.

            Of a tile behind the last: an expert that does not exist, and no rows.
            """
            each = tl.arange(0, E)
            stop = tl.load(OFFSETS + each, mask=each < e, other=0)
            start = tl.load(OFFSETS + each - 1, mask=(each > 0) & (each < e), other=0)
            tiles = tl.where(each < e, (stop - start + T - 1) // T, 0)
            behind = tl.cumsum(tiles, 0)
            expert = tl.sum((behind <= tile).to(tl.int32), 0)
            mine = each == expert
            first = tl.sum(tl.where(mine, start + (tile - behind + tiles) * T, 0), 0)
            return expert, first, tl.sum(tl.where(mine, stop, 0), 0)

        kernels["find"] = find
    return kernels["find"]
