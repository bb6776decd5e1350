"""A batch: rows of tokens, what is learned at each, and where their documents are."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """b rows of s tokens. Where rows hold several documents ``positions`` restart at 0 with each, padding included."""

    tokens: Tensor  # [b, s] int64
    labels: Tensor  # [b, s] int64; already shifted; IGNORE where nothing is trained
    positions: Tensor | None  # [b, s] int64; None: every row is one document from 0, padded at its end
    documents: tuple[int, int] | None  # where there are positions: how many there are, and the tokens of the longest
    documents_of: Tensor  # [samples, 1 or 2] int64: which documents, in reading order, are each sample's
    targets: Tensor | None  # [samples, ...] fp32: the numbers to learn of each sample
    num_supervised: int  # labels that are not IGNORE, counted before the copy to a device, so reading it never waits
    num_tokens: int  # of rows that hold samples, padding after them included
    all_supervised: int  # of this batch of all ranks, by which each divides its loss
    all_samples: int  # of this batch of all ranks
    samples: tuple[int, ...]  # which samples are in it, by their place in the order of the data
    where: tuple[str, ...]  # "data/train.jsonl:17" of each, to name a batch that breaks training

    @property
    def num_documents(self) -> int:
        """In all rows, padding that is a document of its own included."""
        return len(self.tokens) if self.documents is None else self.documents[0]

    @property
    def is_good(self) -> Tensor | None:
        """Of single answers that are judged good or bad: which are good, [samples, 1] bool. None: there are pairs."""
        return None if self.documents_of.shape[1] == 2 or self.targets is None else self.targets > 0

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``; from pinned memory the copy is only queued, and nobody waits."""
        queued = self.tokens.is_pinned()
        return self._map(lambda t: t.to(device, non_blocking=queued))

    def pin(self) -> "Batch":
        """The batch in page-locked host memory, from which a device copies on its own."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        moved: dict[str, Any] = {name: function(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)
