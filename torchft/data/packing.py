"""Best-fit packing: whole samples into rows of a fixed number of tokens, hardly any of it padding.

Best-fit decreasing, as in https://arxiv.org/abs/2404.10830: the longest sample first, each into the fullest row that
still holds it. Instruction data fills rows of 2048 tokens to over 99%.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch


def pack(lengths: Sequence[int], capacity: int, *, generator: torch.Generator) -> list[list[int]]:
    """Rows of sample indices: every sample once and whole, at most ``capacity`` tokens per row.

    ``generator`` decides which samples of one length meet, and the order of the rows. How many rows there are depends
    on the lengths alone, so every epoch has the same number. O(n log n): 1M samples take about 1 s.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise ValueError(f"sample {list(lengths).index(longest)} has {longest} tokens, more than a row's {capacity}")
    order = torch.randperm(len(lengths), generator=generator)
    by_length = order[torch.tensor(lengths)[order].argsort(descending=True, stable=True)].tolist() if lengths else []
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens -> rows that have so many left
    free: list[int] = []  # the counts with any row, ascending
    for sample in by_length:
        length = lengths[sample]
        at = bisect_left(free, length)
        if at < len(free):
            left = free[at]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del free[at]
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(sample)
        left -= length
        if left:
            if not open_rows[left]:
                insort(free, left)
            open_rows[left].append(row)
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


def fill(num_tokens: int, num_rows: int, capacity: int) -> float:
    """Share of the rows' positions that hold a sample's token."""
    return num_tokens / (num_rows * capacity) if num_rows else 0.0
