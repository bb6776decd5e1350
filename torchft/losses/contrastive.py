"""Embeddings of documents as a head of ``Decoder.forward``, and what is learned of them: a query's own document among
those of all queries (https://arxiv.org/abs/1807.03748), at several widths if wanted (https://arxiv.org/abs/2205.13147).
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torchft.losses.documents import document_starts

Pooling = Literal["cls", "mean", "last"]


def pooled(
    hidden: Tensor,
    project: object,
    *,
    pooling: Pooling,
    positions: Tensor | None,
    count: int,
    documents_of: Tensor,
) -> Tensor:
    """A head: of each of the samples' documents its first or last hidden state, or the mean; [samples, n, d] fp32.

    ``positions`` [b, s] restart at 0 with each of ``count`` documents, paddings included; None: each row is one.
    ``documents_of`` [samples, n]: which of them are the samples'.
    """
    flat = hidden.flatten(0, 1)  # [t, d]
    if positions is None:
        starts = torch.arange(0, len(flat), hidden.shape[1], device=flat.device)
    else:
        starts = document_starts(positions, count)
    lengths = starts.diff(append=torch.tensor([len(flat)], device=flat.device))
    if pooling == "mean":
        means = torch.segment_reduce(flat.float(), "mean", lengths=lengths, unsafe=True)
        return means[documents_of]
    places = starts if pooling == "cls" else starts + lengths - 1
    return flat[places[documents_of]].float()


def info_nce(
    queries: Tensor,
    documents: Tensor,
    targets: Tensor,
    *,
    temperature: float = 0.05,
    all_queries: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """-log softmax(cos(query, documents) / temperature) at each query's own document, [q] in nats.

    Args:
        queries: [q, d]; ``documents`` [n, d], of which ``targets`` [q] are the queries' own.
        all_queries: [m, d], for the symmetric loss: the mean with that of each query's document, which has to find its
            query, at ``own`` [q], among all queries.
    """
    queries, documents = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    losses = F.cross_entropy(queries @ documents.T / temperature, targets, reduction="none")
    if all_queries is None:
        return losses
    assert own is not None
    back = documents[targets] @ F.normalize(all_queries, dim=-1).T / temperature
    return (losses + F.cross_entropy(back, own, reduction="none")) / 2


def contrastive(
    embedded: Tensor,
    everywhere: Tensor,
    first: int,
    *,
    temperature: float = 0.05,
    symmetric: bool = False,
    dims: Sequence[int] = (),
) -> Tensor:
    """`info_nce` of this rank's samples among all, [samples]; of several widths the sum.

    Args:
        embedded: [samples, 2 + negatives, d]: query, its document, others; ``everywhere`` those of all ranks, of which
            this rank's begin at ``first``.
        dims: widths, the first channels of an embedding, that are trained to be embeddings too; (): the whole alone.
    """
    own = torch.arange(first, first + len(embedded), device=embedded.device)
    losses = embedded.new_zeros(len(embedded))
    for dim in dims or (embedded.shape[-1],):
        part = everywhere[..., :dim]
        documents = torch.cat((part[:, 1], part[:, 2:].flatten(0, 1)))  # all positives, then all hard negatives
        losses = losses + info_nce(
            embedded[:, 0, :dim],
            documents,
            own,
            temperature=temperature,
            all_queries=part[:, 0] if symmetric else None,
            own=own,
        )
    return losses


@torch.no_grad()
def ranks_of_own(queries: Tensor, documents: Tensor, first: int = 0) -> Tensor:
    """The rank of each query's document, ``documents[first + i]`` of ``queries[i]``, by cosine; 1 = the best; [q]."""
    similarity = F.normalize(queries, dim=-1) @ F.normalize(documents, dim=-1).T
    own = similarity.diagonal(first)[:, None]
    return 1 + (similarity > own).sum(1)
