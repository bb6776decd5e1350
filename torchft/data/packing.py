"""Best-fit packing: whole samples into rows of a fixed number of tokens, hardly any of it padding.

`pack` knows all lengths. Best-fit decreasing, as in https://arxiv.org/abs/2404.10830: the longest sample first, each
into the fullest row that still holds it. `OnlinePacker` sees a stream: each row begins with the sample that has waited
longest, and takes the longest that still fit of those seen. Instruction data fills rows of 2048 to over 99% in both.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


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


class OnlinePacker(Generic[T]):
    """Items wait until rows of at most ``capacity`` tokens take them.

    Which ones a row takes depends only on the items that wait, in the order of their numbers. None waits for more rows
    than there were items before it.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: dict[int, T] = {}  # by number, ascending
        self._by_length: list[tuple[int, int]] = []  # (length, number)
        self._lengths: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._items)

    def add(self, number: int, item: T, length: int) -> None:
        """``number``: above those of all items before."""
        assert 0 < length <= self._capacity
        self._items[number], self._lengths[number] = item, length
        insort(self._by_length, (length, number))

    def oldest(self) -> T | None:
        return next(iter(self._items.values()), None)

    def first(self) -> T:
        """The item that has waited longest, and waits no longer."""
        return self._take(next(iter(self._items)))

    def row(self) -> list[T]:
        """The items of one row, which wait no longer."""
        number = next(iter(self._items))
        free = self._capacity - self._lengths[number]
        row = [self._take(number)]
        while at := bisect_right(self._by_length, free, key=lambda entry: entry[0]):
            length, _ = self._by_length[at - 1]
            _, number = self._by_length[bisect_left(self._by_length, (length, -1))]  # the oldest of that length
            free -= length
            row.append(self._take(number))
        return row

    def _take(self, number: int) -> T:
        del self._by_length[bisect_left(self._by_length, (self._lengths.pop(number), number))]
        return self._items.pop(number)
