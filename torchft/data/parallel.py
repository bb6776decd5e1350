"""Encoding rows in several processes, in order. Off unless asked for: no gain in wall time has been measured yet.

8000 conversations of 1027 tokens: 4.6 s of CPU time in one process; with workers 1.6 s in this one, which receives and
appends, and 3.9 s in theirs. So 2.9 times faster at most, whatever their number; on two busy cores it was no faster.
"""

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

from torchft.data.messages import RowError, Values
from torchft.data.sources import Row

SERIAL_ROWS = 2000  # encoded here in any case: about a second, what starting processes may cost
CHUNK = 128  # rows that travel together
MOST = 8  # processes; what is left to this one keeps no more busy


T = TypeVar("T")  # what a row is encoded as


def num_workers() -> int:
    """Processes worth starting: the cores of this rank but one, at most MOST; 0 where processes cannot be forked."""
    if sys.platform != "linux":
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    return min(cores - 1, MOST)


def encode_all(
    rows: Iterable[Row], encode: Callable[[Values], T], *, workers: int
) -> Iterator[tuple[Row, T | RowError]]:
    """Each row with its encoding or its RowError, in order, the same for any number of ``workers``.

    The first SERIAL_ROWS are encoded here, so that an encoder that learns the data's format from its first row has.
    Processes are forked, as torch's DataLoader does: they inherit the tokenizer, which cannot be pickled, and never
    touch a device. Started afresh, each would import torch and read the vocabulary first, for seconds.
    """
    rows = iter(rows)
    for row in islice(rows, None if workers < 2 else SERIAL_ROWS):
        yield row, _attempt(encode, row.values)
    chunk = list(islice(rows, CHUNK))
    if not chunk:
        return
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=_start, initargs=(encode,))
    pending: deque[tuple[list[Row], Future[list[T | RowError]]]] = deque()
    try:
        while chunk or pending:
            while chunk and len(pending) < 2 * workers:
                pending.append((chunk, pool.submit(_encode_chunk, [row.values for row in chunk])))
                chunk = list(islice(rows, CHUNK))
            done, future = pending.popleft()
            yield from zip(done, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(encode: Callable[[Values], T], values: Values) -> T | RowError:
    try:
        return encode(values)
    except RowError as e:
        return e


_encode: Callable[[Values], Any]  # in a worker


def _start(encode: Callable[[Values], Any]) -> None:
    global _encode
    _encode = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _encode_chunk(chunk: list[Values]) -> list[Any]:
    return [_attempt(_encode, values) for values in chunk]
