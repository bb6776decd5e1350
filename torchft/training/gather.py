"""Rows of all ranks on each, with their gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], copies: int) -> Tensor:
        ctx.counts, ctx.copies = counts[::copies], copies
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts)][::copies])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)  # what every rank's loss says of this rank's rows
        own = grad.split(ctx.counts)[dist.get_rank() // ctx.copies]
        return own if dist.get_rank() % ctx.copies == 0 else torch.zeros_like(own), None, None


def all_rows(rows: Tensor, *, alone: bool, copies: int = 1) -> tuple[Tensor, int]:
    """``rows`` [n, ...] of all ranks, in their order, and where this rank's begin. n may differ between ranks.

    Backward sums over the ranks, so that each rank's rows get the gradient of the sum of all losses. All ranks call
    both. ``alone``: there is one process. ``copies``: neighbouring ranks that have the same rows, of which the first's
    are taken, and get the gradient.
    """
    if alone:
        return rows, 0
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    numbers = [int(count) for count in counts]
    gathered: Tensor = _AllRows.apply(rows, numbers, copies)
    first_copy = dist.get_rank() // copies * copies
    return gathered, sum(numbers[:first_copy:copies])
