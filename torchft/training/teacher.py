"""The frozen model that a student learns from: run with each batch, or its likeliest words, written once."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchft.data.batch import Batch
from torchft.data.loader import Loader
from torchft.errors import UserError
from torchft.losses.chunked import Project
from torchft.losses.distill import Divergence, chosen, distill_sum, distill_top_k_sum, top_k_logps
from torchft.losses.likelihood import IGNORE
from torchft.modules.decoder import Decoder
from torchft.training.distributed import World
from torchft.training.reference import kept_tensor


class Teacher:
    """What it knows of the next tokens is asked by `distill`.

    Args:
        model: None where ``table`` [supervised tokens of all samples, 2, k + 1] is all that is needed of it.
        firsts: of each sample, and of the end, the row of ``table`` of its first supervised token.
    """

    def __init__(
        self,
        model: Decoder | None,
        *,
        divergence: Divergence,
        temperature: float,
        vocab_size: int,
        table: Tensor | None = None,
        firsts: list[int] | None = None,
    ) -> None:
        self.model, self._table, self._firsts = model, table, firsts or []
        self._about: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "vocab_size": vocab_size}

    def distill(self, student: Decoder, batch: Batch, *, kd_weight: float) -> Tensor:
        """Sum over the supervised tokens of ``kd_weight`` x divergence + the rest x NLL, nats.

        The student runs within the teacher's forward: only there is the teacher's output weight gathered on every rank,
        and each model projects the same few tokens at a time, so that neither's logits ever all exist.
        """
        inputs = {"positions": batch.positions, "documents": batch.documents}
        about = self._about | {"labels": batch.labels, "num_supervised": batch.num_supervised, "kd_weight": kd_weight}
        if self._table is not None:
            known = self._table[_rows(batch, self._firsts)].to(batch.tokens.device)
            return student(batch.tokens, **inputs, head=partial(distill_top_k_sum, teacher=known, **about))
        assert self.model is not None
        learns = torch.is_grad_enabled()

        def with_teacher(hidden: Tensor, project: Project) -> Tensor:
            known = chosen(hidden, labels=batch.labels, count=batch.num_supervised)  # [t, d]
            with torch.set_grad_enabled(learns):
                head = partial(distill_sum, teacher=lambda rows: project(known[rows]), **about)
                return student(batch.tokens, **inputs, head=head)

        with torch.no_grad():
            return self.model(batch.tokens, **inputs, head=with_teacher)

    @torch.no_grad()
    def write_top_k(self, loader: Loader, world: World, *, k: int, key: Mapping[str, Any]) -> "Teacher":
        """One that knows of each token of ``loader``'s samples the ``k`` likeliest words, and how likely the rest is.

        They are computed now, or were by an earlier run, and kept in the user's cache folder. ``key``: JSON values that
        decide them besides: which weights, in which arithmetic. All ranks call it.
        """
        if k >= self._about["vocab_size"]:
            words = self._about["vocab_size"]
            raise UserError(f"teacher_top_k: {k} of {words} words leaves none to be the rest; a few dozen are usual")
        samples, about = loader.samples, {name: self._about[name] for name in ("temperature", "vocab_size")}
        is_supervised = torch.frombuffer(samples.labels, dtype=torch.int32) != IGNORE
        before = torch.cat([torch.zeros(1, dtype=torch.int64), is_supervised.cumsum(0)])  # each token, and the end
        firsts = before[torch.as_tensor(samples.starts)].tolist()

        def compute() -> Tensor:
            table = torch.zeros(firsts[-1], 2, k + 1, device=world.device)
            for batch in loader:
                batch = batch.to(world.device)
                head = partial(top_k_logps, labels=batch.labels, count=batch.num_supervised, k=k, **about)
                assert self.model is not None
                found = self.model(batch.tokens, batch.positions, documents=batch.documents, head=head)
                table[_rows(batch, firsts)] = found
            return world.sum(table)

        table = kept_tensor({**key, **about, "k": k, "samples": samples.fingerprint()}, compute)
        return Teacher(None, **self._about, table=table, firsts=firsts)


def _rows(batch: Batch, firsts: list[int]) -> list[int]:
    """Which rows of a table, where those of sample i begin at ``firsts[i]``, are the supervised tokens of ``batch``, in
    reading order. Of rows that ranks share each has those of its own tokens."""
    rows = [row for i in batch.samples for row in range(firsts[i], firsts[i + 1])]
    if batch.row_labels is None:
        return rows
    is_supervised = batch.row_labels != IGNORE
    places = batch.shards.own(is_supervised.flatten().cumsum(0).view_as(is_supervised) - 1)
    return [rows[place] for place in places[batch.labels != IGNORE].tolist()]
