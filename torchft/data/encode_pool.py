"""Rows made into samples by worker processes, handed out in the order of the rows whatever the number of workers.

Not torchdata's ParallelMapper: when one of its processes is killed the training waits for ever (tried with 0.11), and
its state counts batches to replay from a snapshot of its own.
"""

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from torchft.data.builder import Dataset
from torchft.data.collect import Made, make
from torchft.data.encoders import Encoder
from torchft.data.messages import Values
from torchft.data.row_stream import Ticket
from torchft.data.samples import Limits
from torchft.errors import UserError

CHUNK = 32  # rows sent to a worker at once

Step = tuple[Encoder, Limits]


def steps(datasets: Sequence[Dataset], examples: Sequence[Values]) -> list[Step]:
    """What makes samples of each data set's rows."""
    return [(dataset.encoder(example), dataset.limits) for dataset, example in zip(datasets, examples, strict=True)]


def here(tickets: Iterator[Ticket], own_steps: list[Step]) -> Iterator[tuple[Ticket, Made]]:
    """Each row with its samples, made in this process."""
    for ticket in tickets:
        encode, limits = own_steps[ticket.dataset]
        yield ticket, make(ticket.row.values, encode, limits)


class Workers:
    """Processes that make samples; they end with `close`, and with the process that started them however it ends."""

    def __init__(self, datasets: Sequence[Dataset], examples: Sequence[Values], *, number: int) -> None:
        self._number = number
        self._pool = ProcessPoolExecutor(
            number,
            mp_context=multiprocessing.get_context("spawn"),  # a fork would copy threads' locks and the CUDA context
            initializer=_start,
            initargs=(list(datasets), list(examples), os.getpid()),
        )

    def encoded(self, tickets: Iterator[Ticket]) -> Iterator[tuple[Ticket, Made]]:
        """Each row with its samples, in order. UserError that names the rows if a worker was killed."""
        pending: deque[tuple[list[Ticket], Future[list[Made]]]] = deque()
        try:
            while True:
                while len(pending) < 2 * self._number + 1 and (chunk := list(islice(tickets, CHUNK))):
                    rows = [(ticket.dataset, ticket.row.values) for ticket in chunk]
                    pending.append((chunk, self._pool.submit(_make, rows)))
                if not pending:
                    return
                chunk, future = pending.popleft()
                yield from zip(chunk, future.result(), strict=True)
        except BrokenProcessPool:
            first, last = (f"{row.origin}:{row.number}" for row in (chunk[0].row, chunk[-1].row))
            raise UserError(
                f"streaming: a data worker was killed while rows from {first} to {last} were tokenised; is the host's "
                "memory used up? Fewer streaming.workers or a smaller streaming.shuffle_rows take less"
            ) from None
        finally:
            for _, future in pending:
                future.cancel()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


_steps: list[Step] = []  # of a worker process


def _start(datasets: list[Dataset], examples: list[Values], parent: int) -> None:
    _steps[:] = steps(datasets, examples)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _make(rows: Sequence[tuple[int, Values]]) -> list[Made]:
    return [make(values, *_steps[dataset]) for dataset, values in rows]
