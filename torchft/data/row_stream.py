"""Endless rows of one data set, or of several mixed: shuffled, and resumable at every row by a few integers.

Rows are shuffled in blocks of neighbours, and files among each other, by the seed alone: to go on at a position its
block is read again, so that neither rows nor random states have to be saved.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch

from torchft.data.builder import Dataset
from torchft.data.extents import extents, rows_of
from torchft.data.mixture import generator_of
from torchft.data.sources import Row, Source
from torchft.errors import UserError


class Position(NamedTuple):
    """Place ``at`` in the shuffled block that starts at ``row`` of the ``file``-th file of a pass over the data."""

    epoch: int = 0
    file: int = 0
    row: int = 0
    at: int = 0


class RowStream:
    """The rows of ``source``, one pass after another, each in another order.

    Args:
        block: rows shuffled with each other, all in memory; 1: the order of the data.
        key: what the order depends on beside the pass.
    """

    def __init__(self, source: Source, *, block: int, key: tuple[int | str, ...], position: Position) -> None:
        self._source, self._size, self._key = source, block, key
        self._extents = extents(source)
        self.position = position
        self._reader: Iterator[Row] = iter(())  # of the file, at the end of the block
        self._rows: list[Row] = []  # the block, shuffled
        self._open()
        self._fill()

    def take(self) -> Row:
        row = self._rows[self.position.at]
        epoch, file, first, at = self.position
        self.position = Position(epoch, file, first, at + 1)
        if at + 1 == len(self._rows):
            self.position = Position(epoch, file, first + len(self._rows))
            self._fill()
        return row

    def _open(self) -> None:
        order = list(range(len(self._extents)))
        if self._size > 1:
            generator = generator_of("files", *self._key, self.position.epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        if order:
            self._file = order[self.position.file]
            self._reader = rows_of(self._source, self._extents[self._file], skip=self.position.row)

    def _fill(self) -> None:
        """Read the block at the position; where a file or a pass has ended, the next one's first."""
        passes = 0
        while not (rows := list(islice(self._reader, self._size))):
            epoch, file = self.position.epoch, self.position.file + 1
            if file >= len(self._extents):
                epoch, file, passes = epoch + 1, 0, passes + 1
            if passes > 1:
                raise UserError(
                    f"{self._source}: split {self._source.split!r} has 0 rows; check the file and the split"
                )
            self.position = Position(epoch, file)
            self._open()
        if self._size > 1:
            generator = generator_of("rows", *self._key, self.position.epoch, self._file, self.position.row)
            rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        self._rows = rows


@dataclass
class Cursor:
    """Where a mixture is: JSON values."""

    number: int = 0  # of the next row, from the beginning of the stream
    stage: int = 0  # how many stages are over
    taken: list[int] = field(default_factory=list)  # rows of each data set in this stage
    positions: list[Position] = field(default_factory=list)  # of each data set


class Ticket(NamedTuple):
    """One row of a mixture, and where it stood: ``cursor`` makes the same row the next one."""

    number: int
    dataset: int
    row: Row
    cursor: dict[str, Any]


class Mixer:
    """Rows of several data sets in fixed proportions: always of the one that is furthest behind its share.

    A stage but the last ends when each of its data sets was read once; the last never does.
    """

    def __init__(self, datasets: Sequence[Dataset], *, block: int, seed: int, cursor: dict[str, Any] | None) -> None:
        stages = [dataset.reading.stage for dataset in datasets]
        self._stages = [[i for i, stage in enumerate(stages) if stage == this] for this in sorted(set(stages))]
        self._weights = [1.0 if d.reading.weight is None else d.reading.weight for d in datasets]
        start = (
            Cursor(**cursor) if cursor else Cursor(taken=[0] * len(datasets), positions=[Position()] * len(datasets))
        )
        self._number, self._stage, self._taken = start.number, start.stage, list(start.taken)
        self._streams = [
            RowStream(dataset.source, block=block, key=(seed, i), position=Position(*position))
            for i, (dataset, position) in enumerate(zip(datasets, start.positions, strict=True))
        ]

    def cursor(self) -> dict[str, Any]:
        """Where the next row is."""
        positions = [stream.position for stream in self._streams]
        return vars(Cursor(self._number, self._stage, self._taken.copy(), positions))

    def passes(self, dataset: int) -> int:
        """How often a data set was read to its end."""
        return self._streams[dataset].position.epoch

    def __iter__(self) -> "Mixer":
        return self

    def __next__(self) -> Ticket:
        cursor = self.cursor()
        candidates = self._candidates()
        if not candidates:
            self._stage, self._taken = self._stage + 1, [0] * len(self._taken)
            candidates = self._candidates()
        chosen = min(candidates, key=lambda i: (self._taken[i] + 1) / self._weights[i])
        ticket = Ticket(self._number, chosen, self._streams[chosen].take(), cursor)
        self._taken[chosen] += 1
        self._number += 1
        return ticket

    def _candidates(self) -> list[int]:
        """The data sets of the present stage that are not used up."""
        stage = self._stages[self._stage]
        if self._stage == len(self._stages) - 1:
            return stage
        return [i for i in stage if not self._streams[i].position.epoch]
