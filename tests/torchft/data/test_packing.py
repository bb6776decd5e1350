"""Packing: every sample once and whole, capacity kept, rows full, O(n log n), the same for the same generator."""

import math
import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchft.data.packing import OnlinePacker, fill, pack


def packed(lengths, capacity, seed=0):
    return pack(lengths, capacity, generator=torch.Generator().manual_seed(seed))


def instruction_lengths(count, capacity):
    """Log-normal with median 148 and mean 220 tokens, as alpaca-like data has, cut at the capacity."""
    draw = random.Random(0)
    return [min(capacity, max(8, int(draw.lognormvariate(5, 0.9)))) for _ in range(count)]


@given(st.lists(st.integers(1, 40), max_size=200), st.integers(40, 90), st.integers(0, 3))
def test_each_sample_once_within_capacity(lengths, capacity, seed):
    rows = packed(lengths, capacity, seed)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)
    # best fit never leaves two rows that would fit into one
    loads = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


@given(st.lists(st.integers(1, 40), max_size=200), st.integers(40, 90))
def test_every_epoch_has_the_same_number_of_rows(lengths, capacity):
    assert len({len(packed(lengths, capacity, seed)) for seed in range(5)}) == 1


@given(st.lists(st.integers(1, 12), max_size=60))
def test_is_best_fit_decreasing(lengths):
    """Against the definition, written as slowly as possible: the loads of all rows are equal."""
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, load in enumerate(loads) if load + length <= 12]
        if fits:
            loads[max(fits, key=lambda i: loads[i])] += length
        else:
            loads.append(length)
    assert sorted(sum(lengths[i] for i in row) for row in packed(lengths, 12)) == sorted(loads)


@pytest.mark.parametrize("capacity", [512, 1024, 2048, 8192])
def test_rows_are_over_98_percent_full(capacity):
    lengths = instruction_lengths(10_000, capacity)
    assert fill(sum(lengths), len(packed(lengths, capacity)), capacity) > 0.98


def test_seed_decides_the_rows():
    lengths = instruction_lengths(500, 512)
    assert packed(lengths, 512, 1) == packed(lengths, 512, 1)
    assert packed(lengths, 512, 1) != packed(lengths, 512, 2)
    partners = [{i: frozenset(row) for row in packed(lengths, 512, seed) for i in row} for seed in (1, 2)]
    assert sum(partners[0][i] != partners[1][i] for i in range(500)) > 250  # not only the order of rows


def test_time_grows_like_n_log_n():
    seconds = []
    for count in (10_000, 80_000):
        lengths = instruction_lengths(count, 2048)
        start = time.perf_counter()
        packed(lengths, 2048)
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 30 * seconds[0] + 0.5  # 8 times the samples; a quadratic packer needs 64 times


def test_d11_sample_longer_than_a_row():
    with pytest.raises(ValueError, match="sample 1 has 9 tokens, more than a row's 8"):
        packed([3, 9], 8)


def test_nothing():
    assert packed([], 8) == []
    assert fill(0, 0, 8) == 0.0


def stream_rows(lengths, capacity, lookahead):
    """Rows of (number, length) that an OnlinePacker makes of a stream, until it is empty."""
    packer, numbered, rows = OnlinePacker(capacity), iter(enumerate(lengths)), []
    while True:
        for number, length in numbered:
            packer.add(number, (number, length), length)
            if len(packer) == lookahead:
                break
        if not len(packer):
            return rows
        rows.append((packer.row(), [number for number, _ in packer._items.values()]))


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(1, 12))
def test_online_rows_hold_each_sample_once_whole_and_none_waits_too_long(lengths, lookahead):
    rows = stream_rows(lengths, 50, lookahead)
    assert sorted(item for row, _ in rows for item in row) == list(enumerate(lengths))
    for i, (row, waiting) in enumerate(rows):
        assert 0 < sum(length for _, length in row) <= 50
        assert all(row[0][0] < number for number in waiting), "the oldest comes first"
        free = 50 - sum(length for _, length in row)
        assert all(lengths[number] > free for number in waiting), "nothing that waits would still fit"
        assert i <= row[0][0]


def test_online_best_fit_by_hand():
    packer = OnlinePacker(10)
    for number, length in enumerate([4, 3, 6, 5, 6, 1]):
        packer.add(number, number, length)
    assert [packer.row() for _ in range(3)] == [[0, 2], [1, 4, 5], [3]]  # of two 6s the older; then 3 + 6 + 1
    assert packer.oldest() is None and len(packer) == 0


def test_online_rows_are_98_percent_full_on_instruction_lengths():
    """Log-normal lengths of a median of 150 and of 700 tokens, cut at 2048, as instruction data has them."""
    for median in (150, 700):
        draw = random.Random(median)
        lengths = [min(2048, max(20, int(draw.lognormvariate(math.log(median), 0.9)))) for _ in range(20_000)]
        rows = stream_rows(lengths, 2048, 512)[:-40]  # the end of a stream, which ours do not have
        assert fill(sum(length for row, _ in rows for _, length in row), len(rows), 2048) > 0.99
