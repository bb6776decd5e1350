"""Data that is read and tokenised while training goes on: for what is larger than memory or disk, or starts slowly.

A mixture of data sets without end: each is read again when it was read to its end, in another order.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

from torchft.config import Range
from torchft.data.builder import Dataset
from torchft.data.collect import collect
from torchft.data.extents import fingerprint
from torchft.data.messages import Values
from torchft.data.mixture import check_weights, mix, part_of
from torchft.data.samples import Samples
from torchft.errors import UserError

PROBE_ROWS = 500  # of each data set, tokenised at the start to see what the stream holds


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """The ``streaming:`` section of a config. A stream has no end: it needs max_steps."""

    workers: Annotated[int, Range(min=0)] = 0  # processes that tokenise; 0: the thread that makes batches ahead
    shuffle_rows: Annotated[int, Range(min=1)] = 4096  # neighbours shuffled with each other, in memory; 1: no shuffling
    lookahead: Annotated[int, Range(min=1)] = 512  # samples that wait for a packed row they fit into


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Data sets to stream, and their first rows.

    Args:
        examples: a row of each data set, to tell its format by.
        probe: the samples of the first rows of each.
    """

    datasets: list[Dataset]
    examples: list[Values]
    probe: Samples
    config: StreamConfig

    def fingerprint(self) -> str:
        """Hex digest of all that decides the samples: settings, tokenizer, and names, sizes and ends of the files."""
        settings = [[d.kind, vars(d.reading), d.own, d.seq_len] for d in self.datasets]
        sources = [fingerprint(dataset.source) for dataset in self.datasets]
        tokenizers = [dataset.tokenizer.fingerprint for dataset in self.datasets]
        text = json.dumps([settings, sources, tokenizers], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def gather(datasets: Sequence[Dataset], *, streaming: StreamConfig | None) -> Samples | Stream:
    """The data of a run: all of it tokenised now, or a stream."""
    if streaming is None:
        return mix(datasets)
    check_weights(datasets)
    for dataset in datasets:
        if dataset.reading.deduplicate:
            raise UserError(
                f"{dataset.name}: deduplicate would have to remember every row of a stream; remove the duplicates from "
                "the files first, or leave streaming out"
            )
    examples = [dataset.example(streaming=True) for dataset in datasets]
    probe = Samples(seq_len=datasets[0].seq_len, pad_id=datasets[0].tokenizer.pad_id)
    for dataset, example in zip(datasets, examples):
        rows = islice(dataset.rows(streaming=True), PROBE_ROWS)
        first = collect(rows, dataset.encoder(example), dataset.limits, pad_id=probe.pad_id)
        probe.extend(first, part_of(dataset, len(probe), len(probe) + len(first)))
    return Stream(datasets=list(datasets), examples=examples, probe=probe, config=streaming)
