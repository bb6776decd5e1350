"""Rows whose tokens are spread over ranks: context parallel (``cp``) and, within it, tensor parallel (``tp``).

Of a row of s tokens in 2 cp equal chunks, rank c of cp holds chunks c and 2 cp - 1 - c, so that causal attention costs
all the same (https://arxiv.org/abs/2407.21783, section 3.3.2); of these tp ranks hold a piece each, one after the other
(sequence parallel, https://arxiv.org/abs/2205.05198). Whatever treats tokens one by one, norms, embedding, loss, runs
on a rank's own tokens with all weights. Attention sees the tokens of all tp ranks with its share of the heads, and the
keys and values of all cp ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchft.ranks import sum_over

ops = torch.ops._c10d_functional


@dataclass(frozen=True, kw_only=True)
class TokenShards:
    """Which tokens of a row this rank holds, and who holds the others."""

    cp: int = 1
    tp: int = 1
    cp_rank: int = 0
    tp_rank: int = 0
    cp_group: str = ""  # names of process groups
    tp_group: str = ""

    @property
    def count(self) -> int:
        """Ranks that share a row."""
        return self.cp * self.tp

    @property
    def multiple(self) -> int:
        """What the length of a row must be a multiple of."""
        return (2 * self.cp if self.cp > 1 else 1) * self.tp

    def share(self, seq_len: int) -> int:
        """How many tokens of a row are one rank's."""
        return -(-seq_len // self.multiple) * self.multiple // self.count

    def rows(self, x: Tensor) -> Tensor:
        """Whole rows [b, s, ...] -> what the tp ranks hold together, [b, s / cp, ...]."""
        if self.cp == 1:
            return x
        chunks = x.chunk(2 * self.cp, dim=1)
        return torch.cat((chunks[self.cp_rank], chunks[-1 - self.cp_rank]), dim=1)

    def own(self, x: Tensor) -> Tensor:
        """Whole rows [b, s, ...] -> this rank's tokens [b, s / (cp tp), ...]."""
        return self.rows(x).chunk(self.tp, dim=1)[self.tp_rank].contiguous()

    def whole(self, x: Tensor) -> Tensor:
        """This rank's tokens [b, s / (cp tp), ...] -> the rows [b, s, ...], on each rank that shares them.

        For losses of whole rows, which each of these ranks then computes. Gradients are summed over the ranks: they are
        those of the sum of all ranks' losses, in which each row's must count once: divide it by ``count``.
        """
        x = self.of_all_tp(x) if self.tp > 1 else x
        return self.of_all_cp(x) if self.cp > 1 else x

    def chunk_starts(self, seq_len: int) -> tuple[int, int]:
        """Where this rank's two chunks begin in a row, for cp > 1; each has ``seq_len / (2 cp)`` tokens."""
        length = seq_len // (2 * self.cp)
        return self.cp_rank * length, (2 * self.cp - 1 - self.cp_rank) * length

    def of_all_cp(self, x: Tensor) -> Tensor:
        """[b, s / cp, ...] of each cp rank -> the rows [b, s, ...] in their order; gradients are summed."""
        parts = gather(x, self.cp, self.cp_group)  # [cp, b, s / cp, ...]
        first, second = parts.chunk(2, dim=2)
        chunks = torch.cat((first, second.flip(0)))  # [2 cp, b, s / 2 cp, ...]
        return chunks.transpose(0, 1).flatten(1, 2)

    def of_all_tp(self, x: Tensor) -> Tensor:
        """[b, s / (cp tp), ...] of each tp rank -> [b, s / cp, ...]; gradients are summed."""
        return gather(x, self.tp, self.tp_group).transpose(0, 1).flatten(1, 2)

    def sum_own(self, x: Tensor) -> Tensor:
        """[b, s / cp, ...], a summand on each tp rank -> the sum, of which each gets its own tokens."""
        return sum_parts(x.unflatten(1, (self.tp, -1)).transpose(0, 1), self.tp, self.tp_group)

    def sum_all(self, x: Tensor) -> Tensor:
        """The sum over the tp ranks, on each of them. Without gradient: for decoding, where tokens are not shared."""
        return sum_over(x, self.tp_group)

    def of_first(self, x: Tensor) -> Tensor:
        """x of the first tp rank, on each of them. Without gradient."""
        first: Tensor = ops.wait_tensor(ops.broadcast(x.contiguous(), 0, self.tp_group))
        return first


WHOLE_ROWS = TokenShards()


def gather(x: Tensor, size: int, group: str) -> Tensor:
    """x of each of ``size`` ranks of the process group of that name -> [size, *x.shape]; gradients are summed."""
    gathered: Tensor = _Gather.apply(x, size, group)
    return gathered


def sum_parts(x: Tensor, size: int, group: str) -> Tensor:
    """x [size, ...] of each rank -> on rank i the sum of all ranks' x[i]."""
    summed: Tensor = _Scatter.apply(x, size, group)
    return summed


class _Gather(torch.autograd.Function):
    """x of each rank -> [ranks, *x.shape]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return ops.wait_tensor(ops.all_gather_into_tensor(x[None].contiguous(), size, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        summed = ops.reduce_scatter_tensor(grad.contiguous(), "sum", ctx.size, ctx.group)
        return ops.wait_tensor(summed)[0], None, None


class _Scatter(torch.autograd.Function):
    """x [ranks, ...] of each rank -> on rank i the sum of all x[i]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return ops.wait_tensor(ops.reduce_scatter_tensor(x.contiguous(), "sum", size, group))[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ops.wait_tensor(ops.all_gather_into_tensor(grad[None].contiguous(), ctx.size, ctx.group)), None, None
