"""A batch of rows as tensors, and `collate`, which makes one of samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchft.data.sharing import Document, shared_tokens
from torchft.documents import Documents
from torchft.losses.likelihood import IGNORE
from torchft.token_shards import WHOLE_ROWS, TokenShards

PAD_MULTIPLE = 64  # tensor cores like it, and a run meets seq_len / 64 shapes instead of seq_len


@dataclass(frozen=True, kw_only=True)
class Batch:
    """b rows of s tokens. Where rows hold several documents ``positions`` restart at 0 with each, padding included.

    A pair may share its prompt: then the rejected answer is a branch of the chosen one's document (documents.py).
    """

    tokens: Tensor  # [b, s] int64
    labels: Tensor  # [b, s] int64; already shifted; IGNORE where nothing is trained
    positions: Tensor | None  # [b, s] int64; None: every row is one document from 0, padded at its end
    documents: Documents | None  # where there are positions; branches, which are documents of their own, among them
    documents_of: Tensor  # [samples, n] int64: which documents, in reading order, are each sample's
    targets: Tensor | None  # [samples, ...] fp32: the numbers to learn of each sample
    num_supervised: int  # labels that are not IGNORE, counted before the copy to a device, so reading it never waits
    num_tokens: int  # of rows that hold samples, padding after them included
    all_supervised: int  # of this batch of all ranks, by which each divides its loss
    all_samples: int  # of this batch of all ranks, by which losses of samples are divided; where several share a row,
    # once for each, as each computes these losses
    samples: tuple[int, ...]  # which samples are in it, by their place in the order of the data
    lengths: tuple[int, ...]  # tokens of each
    where: tuple[str, ...]  # "data/train.jsonl:17" of each, to name a batch that breaks training
    shards: TokenShards = WHOLE_ROWS  # which of the rows' tokens these tokens and labels are
    row_labels: Tensor | None = None  # [b, s] of whole rows; None: labels are

    @property
    def answers(self) -> dict[str, Any]:
        """What losses/answers.py asks of a batch: of whole rows, its labels too."""
        return {"labels": self.labels if self.row_labels is None else self.row_labels, **self.places}

    @property
    def places(self) -> dict[str, Any]:
        """What losses/contrastive.py asks of a batch: where the documents of whole rows are."""
        count = len(self.tokens) if self.documents is None else self.documents[0]  # padding that is one included
        return {"positions": self.positions, "documents_of": self.documents_of, "count": count}

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

    def part(self, shards: TokenShards) -> "Batch":
        """This rank's tokens and labels of rows that it shares with others; the positions stay those of whole rows."""
        labels = shards.own(self.labels)
        return replace(
            self,
            tokens=shards.own(self.tokens),
            labels=labels,
            num_supervised=int((labels != IGNORE).sum()),
            num_tokens=self.num_tokens // shards.count,
            all_samples=self.all_samples * shards.count,
            shards=shards,
            row_labels=self.labels,
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        moved: dict[str, Any] = {name: function(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def collate(
    rows: Sequence[Sequence[Sequence[Document]]],
    *,
    shape: tuple[int, int],
    packed: bool,
    num_documents: int,
    pad_id: int,
    targets: Tensor | None,
    all_supervised: int,
    all_samples: int,
    samples: tuple[int, ...],
    where: tuple[str, ...],
    shards: TokenShards = WHOLE_ROWS,
    shares_prompts: bool = False,
) -> Batch:
    """``rows`` of samples, each its documents, as a batch of ``shape`` [b, s]; b may be more than the rows.

    ``shares_prompts``: the second document of a pair is only its tokens from `shared_tokens` on.

    ``num_documents``: of each sample. Where ranks share rows, s grows to what they can share, and the batch is this
    rank's.
    """
    b, s = shape[0], -(-shape[1] // shards.multiple) * shards.multiple
    tokens = torch.full((b, s), pad_id)
    labels = torch.full((b, s), IGNORE)
    count = torch.arange(s)
    positions = count.repeat(b, 1) if packed or num_documents > 1 else None  # an empty row is one document
    documents_of, found, has_branches = list[list[int]](), 0, False
    for r, row in enumerate(rows):
        at = 0
        for documents in row:
            documents_of.append(list(range(found, found + len(documents))))
            found += len(documents)
            shared = shared_tokens(*documents) if shares_prompts else 0
            for i, (document_tokens, document_labels) in enumerate(documents):
                skipped = shared if i == 1 else 0
                n = len(document_tokens) - skipped
                tokens[r, at : at + n] = document_tokens[skipped:]
                labels[r, at : at + n] = document_labels[skipped:]
                if positions is not None:
                    positions[r, at : at + n] = count[skipped : skipped + n]
                has_branches |= skipped > 0
                at += n
        if positions is not None and at < s:
            positions[r, at:] = count[: s - at]  # the padding is a document of its own
            found += 1
    found += b - len(rows)
    batch = Batch(
        tokens=tokens,
        labels=labels,
        positions=positions,
        documents=None if positions is None else Documents(found, int(positions.max()) + 1, has_branches),
        documents_of=torch.tensor(documents_of, dtype=torch.int64).view(len(samples), num_documents),
        targets=targets,
        num_tokens=len(rows) * s,
        num_supervised=int((labels != IGNORE).sum()),
        all_supervised=all_supervised,
        all_samples=all_samples,
        samples=samples,
        lengths=tuple(sum(len(tokens) for tokens, _ in documents) for row in rows for documents in row),
        where=where,
    )
    return batch.part(shards) if shards.count > 1 else batch


def padded_length(longest: int, seq_len: int) -> int:
    """How long unpacked rows are, of which one has ``longest`` tokens."""
    return min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, seq_len)
