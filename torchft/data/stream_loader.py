"""Batches of a stream: rows -> samples -> packed rows -> this rank's part, resumable at every batch.

Every rank makes all rows and takes its own, so that the order does not depend on how many there are. What waits to be
packed is not saved: a resumed loader reads again from the oldest sample that waits and leaves out those already used.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch

from torchft.data import encode_pool
from torchft.data.batch import Batch, Document, collate, padded_length
from torchft.data.collect import Made, note
from torchft.data.encode_pool import Workers
from torchft.data.loader import Loader, check_same
from torchft.data.packing import OnlinePacker
from torchft.data.row_stream import Mixer
from torchft.data.samples import Counts, Limits, Sample, Samples
from torchft.data.sharing import shared_tokens
from torchft.data.stream import Stream
from torchft.errors import UserError
from torchft.losses.likelihood import IGNORE
from torchft.token_shards import WHOLE_ROWS, TokenShards

log = logging.getLogger(__name__)

REPORT_ROWS = 1000  # rows after which what was lost is reported; then after ten times as many


class Waiting(NamedTuple):
    """A sample that waits for its row: the ``piece``-th of the ``number``-th row of the stream."""

    number: int
    piece: int
    where: str
    cursor: dict[str, Any]  # makes that row of the stream the next one
    documents: list[Document]
    targets: tuple[float, ...]
    length: int  # tokens of a row
    supervised: int


class StreamLoader:
    """As `Loader`, for a stream, which is one endless epoch.

    Args:
        packed, one_shape, batch_size, rank, num_ranks, shards, shares_prompts: as Loader's.
    """

    epoch = 0

    def __init__(
        self,
        stream: Stream,
        *,
        batch_size: int,
        seed: int,
        packed: bool = False,
        one_shape: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
        shards: TokenShards = WHOLE_ROWS,
        shares_prompts: bool = False,
    ) -> None:
        self.samples: Samples = stream.probe
        self.batch_size, self.seed, self.packed, self.one_shape = batch_size, seed, packed, one_shape
        self.rank, self.all_rows, self.shards = rank, batch_size * num_ranks, shards
        self.shares_prompts = shares_prompts
        self.counts = Counts()  # of all rows so far
        self._stream, self._fingerprint = stream, stream.fingerprint()
        self._limits = [dataset.limits for dataset in stream.datasets]
        workers = stream.config.workers
        self._workers = Workers(stream.datasets, stream.examples, number=workers) if workers else None
        self._steps = encode_pool.steps(stream.datasets, stream.examples)
        self._begin(None, used=set())

    def num_steps(self, micro_steps: int, *, epochs: int, max_steps: int | None) -> int:
        """Optimizer steps: ``max_steps``, as a stream has no end."""
        if max_steps is None:
            raise UserError("max_steps: a stream has no end, so say after how many optimizer steps to stop")
        return max_steps

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self._collate([self._next_row() for _ in range(self.all_rows)])

    def take(self, num_batches: int) -> list[Batch]:
        """The next ``num_batches`` batches."""
        return list(islice(self, num_batches))

    def state_dict(self) -> dict[str, Any]:
        """The position, and what must not change for it to mean the same: JSON values only."""
        return {
            "epoch": self.epoch,
            "cursor": self._anchor()[1],
            "used": sorted(map(list, self._used)),
            "counted": self._counted,
            "counts": {**vars(self.counts), "dropped": dict(self.counts.dropped)},
            "all_rows": self.all_rows,
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, bit-exact, with any number of workers and ranks. UserError for other data."""
        check_same(state, self._identity(), all_rows=self.all_rows)
        self._begin(state["cursor"], used={(number, piece) for number, piece in state["used"]})
        self.counts = Counts(**state["counts"] | {"dropped": Counter(state["counts"]["dropped"])})
        self._counted = state["counted"]

    def close(self) -> None:
        """Ends the worker processes; whoever goes on with a saved position tokenises in this one."""
        if self._workers:
            self._workers.close()
            self._workers = None

    def _identity(self) -> dict[str, Any]:
        config = self._stream.config
        return {
            "fingerprint": self._fingerprint,
            "seq_len": self.samples.seq_len,
            "seed": self.seed,
            "packed": "shared prompts" if self.shares_prompts else self.packed,  # other rows
            "shuffle_rows": config.shuffle_rows,
            "lookahead": config.lookahead if self.packed else 1,
        }

    def _begin(self, cursor: dict[str, Any] | None, *, used: set[tuple[int, int]]) -> None:
        config = self._stream.config
        mixer = Mixer(self._stream.datasets, block=config.shuffle_rows, seed=self.seed, cursor=cursor)
        self._encoded = self._workers.encoded(mixer) if self._workers else encode_pool.here(mixer, self._steps)
        self._packer: OnlinePacker[Waiting] = OnlinePacker(self.samples.seq_len)
        self._newest = 0, mixer.cursor()  # the number of the newest row that was read, and where it stood
        self._added = 0  # samples that were ever put into the packer
        self._used = used  # (number, piece) of the samples handed out, as far back as the oldest that waits
        self._counted = 0  # rows whose fate is in counts
        self._fruitful = [position[0] for position in mixer.cursor()["positions"]]  # the last pass that gave a sample

    def _anchor(self) -> tuple[int, dict[str, Any]]:
        """The oldest row of the stream that is still needed, and where it stood."""
        oldest = self._packer.oldest()
        return (oldest.number, oldest.cursor) if oldest else self._newest

    def _next_row(self) -> list[Waiting]:
        while len(self._packer) < (self._stream.config.lookahead if self.packed else 1):
            self._read()
        row = self._packer.row() if self.packed else [self._packer.first()]
        self._used.update((item.number, item.piece) for item in row)
        return row

    def _read(self) -> None:
        """One more row of the stream; its samples wait, unless they were handed out before the loader was resumed."""
        ticket, made = next(self._encoded)
        self._newest = ticket.number, ticket.cursor
        where, i = f"{ticket.row.origin}:{ticket.row.number}", ticket.dataset
        if made.problem:
            raise UserError(f"{where}: {made.problem}")
        if ticket.number >= self._counted:
            self._count(made, self._limits[i], ticket.number + 1)
        this_pass = ticket.cursor["positions"][i][0]
        if made.samples:
            self._fruitful[i] = this_pass
        elif this_pass > self._fruitful[i] + 1:
            name = self._stream.datasets[i].name
            raise UserError(f"{name}: the whole of it gave no sample: {_lost(self.counts)}")
        for piece, sample in enumerate(made.samples):
            if (ticket.number, piece) in self._used:
                continue
            documents = _documents(sample)
            shared = shared_tokens(*documents) if self.shares_prompts else 0
            item = Waiting(
                ticket.number,
                piece,
                where,
                ticket.cursor,
                documents,
                sample.targets,
                length=len(sample.tokens) - shared,
                supervised=sum(label != IGNORE for label in sample.labels),
            )
            self._packer.add(self._added, item, item.length)
            self._added += 1

    def _count(self, made: Made, limits: Limits, num_rows: int) -> None:
        note(made, self.counts, limits)
        self._counted = num_rows
        if num_rows >= REPORT_ROWS and str(num_rows).strip("0") == "1" and (lost := _lost(self.counts)):
            log.warning("of %s rows streamed so far: %s", f"{num_rows:,}", lost)

    def _collate(self, rows: list[list[Waiting]]) -> Batch:
        """This rank's part of ``rows``, which all ranks have."""
        first = self._anchor()[0]
        self._used = {key for key in self._used if key[0] >= first}
        own = rows[self.rank * self.batch_size :][: self.batch_size]
        items = [item for row in own for item in row]
        seq_len = self.samples.seq_len
        whole = self.packed or self.one_shape
        return collate(
            [[item.documents for item in row] for row in own],
            shape=(len(own), seq_len if whole else padded_length(max(item.length for item in items), seq_len)),
            packed=self.packed,
            num_documents=1 + self.samples.are_pairs,
            pad_id=self.samples.pad_id,
            targets=torch.tensor([item.targets for item in items]) if self.samples.num_targets else None,
            all_supervised=sum(item.supervised for row in rows for item in row),
            all_samples=sum(map(len, rows)),
            samples=tuple(item.number for item in items),
            where=tuple(item.where for item in items),
            shards=self.shards,
            shares_prompts=self.shares_prompts,
        )


def _documents(sample: Sample) -> list[Document]:
    """A sample's one document or, of a pair, its two."""
    ids = torch.tensor([sample.tokens, sample.labels], dtype=torch.int32)  # [2, n]
    parts = ids.tensor_split([sample.border], dim=1) if sample.border else (ids,)
    return [(part[0], part[1]) for part in parts]


def open_loader(data: Samples | Stream, **options: Any) -> Loader | StreamLoader:
    """The loader of a run's data; ``options`` are Loader's."""
    return StreamLoader(data, **options) if isinstance(data, Stream) else Loader(data, **options)


def _lost(counts: Counts) -> str:
    """What was cut or dropped, for people."""
    lost = {"truncated": counts.truncated, **dict(sorted(counts.dropped.items()))}
    return ", ".join(f"{n:,} {what}" for what, n in lost.items() if n)
