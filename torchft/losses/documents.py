"""From values of tokens to values of whole documents (an answer, a pair's half) of packed or padded rows.

b rows of s tokens hold n documents, counted in reading order, paddings behind the last one of a row among them.
``positions`` [b, s] tell where each begins, branches too, which are documents of their own here; None: each row is one.
"""

import torch
from torch import Tensor

from torchft.documents import run_starts
from torchft.losses.likelihood import IGNORE


def document_sums(values: Tensor, positions: Tensor | None, count: int) -> Tensor:
    """Sum of ``values`` [b, s] over each of ``count`` documents, [n] in their dtype; the same bits every time."""
    if positions is None:
        return values.sum(1)
    lengths = document_starts(positions, count).diff(append=torch.tensor([values.numel()], device=values.device))
    return torch.segment_reduce(values.flatten(), "sum", lengths=lengths, unsafe=True)  # unsafe: waits for no check


def answer_lengths(labels: Tensor, positions: Tensor | None, count: int) -> Tensor:
    """Tokens with a label in each document, [n] fp32."""
    return document_sums((labels != IGNORE).float(), positions, count)


def desensitised(
    logps: Tensor, labels: Tensor, positions: Tensor, count: int, pairs: Tensor, *, alpha: float
) -> Tensor:
    """``logps`` [b, s], of each answer the tokens beyond the length of the other times ``alpha``.

    Length-desensitised DPO, https://arxiv.org/abs/2409.06411. ``pairs`` [p, 2]: documents whose answers are compared.
    """
    lengths = answer_lengths(labels, positions, count)
    shared = lengths.clone()
    shared[pairs] = lengths[pairs].amin(1, keepdim=True).expand(-1, 2)
    document = run_starts(positions).flatten().cumsum(0) - 1  # [b * s], of each token
    seen = (labels != IGNORE).flatten().cumsum(0)  # tokens with a label up to this one, over all documents
    starts = document_starts(positions, count)
    before = seen[starts] - (labels.flatten()[starts] != IGNORE).long()
    is_shared = seen - before[document] <= shared[document]
    return torch.where(is_shared.view_as(logps), logps, alpha * logps)


def document_starts(positions: Tensor, count: int) -> Tensor:
    """The place [n] of each document's first token among all b * s; ``count`` spares waiting for the device."""
    return run_starts(positions).flatten().nonzero_static(size=count).squeeze(1)
