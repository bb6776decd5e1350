"""Rows of all ranks on each, with their gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)  # what every rank's loss says of this rank's rows
        return grad.split(ctx.counts)[dist.get_rank()], None


def all_rows(rows: Tensor, *, alone: bool) -> tuple[Tensor, int]:
    """``rows`` [n, ...] of all ranks, in their order, and where this rank's begin. n may differ between ranks.

    Backward sums over the ranks, so that each rank's rows get the gradient of the sum of all losses. All ranks call
    both. ``alone``: there is one process.
    """
    if alone:
        return rows, 0
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    numbers = [int(count) for count in counts]
    gathered: Tensor = _AllRows.apply(rows, numbers)
    return gathered, sum(numbers[: dist.get_rank()])
