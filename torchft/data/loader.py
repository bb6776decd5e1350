"""Samples -> batches: shuffled, packed or padded, resumable at every batch.

Samples are tokenised before training, so a batch is a copy of slices: 8 packed rows of 2048 take 2.3 ms on one core,
their step on a device hundreds. One thread hides them (data/prefetch.py); the position is two integers.

Ranks share an epoch's rows: each batch is a slice of one that all ranks have together, so that neither the order nor
the position depends on how many they are.
"""

import logging
import math
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from torchft.data.batch import Batch, Document, collate, padded_length
from torchft.data.mixture import epoch_samples, generator_of
from torchft.data.packing import pack
from torchft.data.samples import Part, Samples
from torchft.data.sharing import shared_of
from torchft.errors import UserError
from torchft.losses.likelihood import IGNORE
from torchft.token_shards import WHOLE_ROWS, TokenShards

log = logging.getLogger(__name__)


class Loader:
    """Batches of one epoch after another.

    The order of an epoch depends on (seed, epoch) alone; the global random state is neither read nor changed.
    ``for batch in loader`` gives what is left of the current epoch, `take` one accumulation window. Both move the
    position that `state_dict` saves; once the last batch is out, it is the beginning of the next epoch.

    Args:
        packed: rows are packs of samples, exactly ``samples.seq_len`` long; else a row is one sample.
        one_shape: all batches are [batch_size, samples.seq_len], as torch.compile wants them: empty rows, where nothing
            is trained, fill up an epoch's last. Else unpacked rows are as long as the longest of their batch.
        drop_last: leave out an epoch's last batch if it has fewer than ``batch_size`` rows.
        batch_size: rows of one rank's batch. Where an epoch ends a rank may have fewer, but never none: an empty row,
            where nothing is trained, keeps it in step with the others.
        rank: of ``num_ranks``, which all make their loader alike.
        shards: which tokens of these rows are this process's, if several share them.
        shares_prompts: the answers of a pair share the row's compute of their prompt.
        padding_apart: padding is a document of its own, so that a row's document ends where its tokens do; an encoder
            would see the padding too.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        seed: int,
        packed: bool = False,
        shuffle: bool = True,
        drop_last: bool = False,
        one_shape: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
        shards: TokenShards = WHOLE_ROWS,
        shares_prompts: bool = False,
        padding_apart: bool = False,
    ) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.rank, self.all_rows, self.shards = rank, batch_size * num_ranks, shards
        self.packed, self.shuffle, self.one_shape = packed, shuffle, one_shape
        self.drop_last, self.shares_prompts, self.padding_apart = drop_last, shares_prompts, padding_apart
        shared = shared_of(samples) if shares_prompts else [0] * len(samples)
        self._lengths = [n - less for n, less in zip(samples.lengths(), shared)]  # tokens that each takes of a row
        self.epoch = 0  # of the next batch
        self._next_row = 0  # of the next batch
        self._parts = samples.parts or [Part(name="", start=0, stop=len(samples))]
        self._varies = packed and any(part.weight is not None for part in self._parts)  # rows from epoch to epoch
        self._rows: list[list[int]] | None = self._rows_of(0)  # the current epoch's, or None until they are asked for
        self._num_rows = {0: len(self._rows or ())}  # epoch -> rows
        if not self._used_rows(0):
            raise UserError(f"the dataset gives {self._num_rows[0]} rows, not enough for one batch of {self.all_rows}")
        self._tokens = torch.frombuffer(samples.tokens, dtype=torch.int32)  # [t], a view
        self._labels = torch.frombuffer(samples.labels, dtype=torch.int32)  # [t], a view
        until = torch.cat([torch.zeros(1, dtype=torch.int64), (self._labels != IGNORE).cumsum(0)])  # before each token
        self._supervised = until[torch.as_tensor(samples.starts)].diff()  # [samples]
        self._num_documents = samples.num_documents
        self._targets = None
        if samples.targets:
            self._targets = torch.frombuffer(samples.targets, dtype=torch.float32).view(len(samples), -1)  # a view
        self._fingerprint = samples.fingerprint()

    def __len__(self) -> int:
        """Batches of the current epoch: the same in every epoch, unless weights take other samples to pack."""
        return self._num_batches(self.epoch)

    def num_steps(self, micro_steps: int, *, epochs: int, max_steps: int | None) -> int:
        """Optimizer steps of ``micro_steps`` batches each, at most ``max_steps``. No step spans two epochs."""
        if not self._varies:
            return min(epochs * math.ceil(len(self) / micro_steps), max_steps or sys.maxsize)
        steps = sum(math.ceil(self._num_batches(epoch) / micro_steps) for epoch in range(epochs))
        return min(steps, max_steps or sys.maxsize)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        while self.epoch == epoch:
            self._rows = self._rows or self._rows_of(epoch)
            end = self._used_rows(epoch)
            rows = self._rows[self._next_row : min(self._next_row + self.all_rows, end)]
            self._next_row += len(rows)
            if self._next_row == end:
                self.epoch, self._next_row, self._rows = epoch + 1, 0, None
            yield self._collate(rows[self.rank * self.batch_size :][: self.batch_size], of=rows)

    def take(self, num_batches: int) -> list[Batch]:
        """The next ``num_batches`` batches; fewer, never none, where the epoch ends: no window spans two epochs."""
        return list(islice(self, num_batches))

    def state_dict(self) -> dict[str, Any]:
        """The position, and what must not change for it to mean the same: JSON values only."""
        return {"epoch": self.epoch, "next_row": self._next_row, "all_rows": self.all_rows} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, bit-exact. UserError that lists every difference if the order has changed.

        ``batch_size`` and the number of ranks may change: the position counts rows.
        """
        check_same(state, self._identity(), all_rows=self.all_rows)
        self.epoch, self._next_row, self._rows = state["epoch"], state["next_row"], None

    def close(self) -> None:
        """Nothing: it holds no threads and no processes."""

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self._fingerprint,
            "num_samples": len(self.samples),
            "seq_len": self.samples.seq_len,
            "seed": self.seed,
            "packed": "shared prompts" if self.shares_prompts else self.packed,  # other rows
            "shuffle": self.shuffle,
            "mixture": [[part.stop - part.start, part.weight, part.stage] for part in self._parts],
        }

    def _num_batches(self, epoch: int) -> int:
        return -(-self._used_rows(epoch) // self.all_rows)

    def _used_rows(self, epoch: int) -> int:
        epoch = epoch if self._varies else 0
        if epoch not in self._num_rows:
            self._num_rows[epoch] = len(self._rows_of(epoch))
        num_rows = self._num_rows[epoch]
        return num_rows // self.all_rows * self.all_rows if self.drop_last else num_rows

    def _rows_of(self, epoch: int) -> list[list[int]]:
        """An epoch's rows of sample indices, by (seed, epoch) alone."""
        epoch = epoch if self.shuffle else 0
        rows: list[list[int]] = []
        for stage, samples in enumerate(epoch_samples(self._parts, epoch=epoch, seed=self.seed)):
            generator = generator_of(self.seed, epoch, stage)
            if self.packed:
                lengths = [self._lengths[i] for i in samples]
                packs = pack(lengths, self.samples.seq_len, generator=generator)
                rows += [[samples[i] for i in row] for row in packs]
            elif self.shuffle:
                rows += [[samples[i]] for i in torch.randperm(len(samples), generator=generator).tolist()]
            else:
                rows += [[i] for i in samples]
        return rows

    def _collate(self, rows: list[list[int]], *, of: list[list[int]]) -> Batch:
        """This rank's ``rows`` as a batch; ``of``: those of all ranks."""
        data = self.samples
        samples = tuple(sample for row in rows for sample in row)
        longest = max((self._lengths[i] for i in samples), default=1)
        whole = self.packed or self.one_shape
        return collate(
            [[[self._document(place) for place in data.documents(sample)] for sample in row] for row in rows],
            shape=(
                self.batch_size if self.one_shape else max(1, len(rows)),
                data.seq_len if whole else padded_length(longest, data.seq_len),
            ),
            packed=self.packed or self.padding_apart,
            num_documents=self._num_documents,
            pad_id=data.pad_id,
            targets=None if self._targets is None else self._targets[list(samples)],
            all_supervised=int(self._supervised[[sample for row in of for sample in row]].sum()),
            all_samples=sum(map(len, of)),
            samples=samples,
            where=tuple(data.where(sample) for sample in samples),
            shards=self.shards,
            shares_prompts=self.shares_prompts,
        )

    def _document(self, place: slice) -> Document:
        return self._tokens[place], self._labels[place]


def check_same(state: dict[str, Any], identity: dict[str, Any], *, all_rows: int) -> None:
    """UserError with every difference between a saved loader's identity and this one's; a warning for other batches."""
    differences = [f"{k} was {state.get(k)!r}, now {value!r}" for k, value in identity.items() if state.get(k) != value]
    if differences:
        why = "the saved position would point at other samples"
        ways = "restore the data and settings (fingerprint covers files, tokenizer, template), or start a new run"
        raise UserError(f"cannot resume the data loader: {'; '.join(differences)}. {why.capitalize()}; {ways}")
    if (before := state.get("all_rows", all_rows)) != all_rows:
        log.warning(
            "a batch of all ranks had %d rows when the run was saved and has %d now: the same samples follow in the "
            "same order, in steps of another size unless gradient_accumulation_steps makes up for it",
            before,
            all_rows,
        )
