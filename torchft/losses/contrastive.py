"""Embeddings of documents as a head of ``Decoder.forward``, and what is learned of them: a query's own document among
those of all queries (https://arxiv.org/abs/1807.03748), at several widths if wanted (https://arxiv.org/abs/2205.13147).
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torchft.documents import run_starts
from torchft.losses.documents import document_starts
from torchft.token_shards import WHOLE_ROWS, TokenShards

Pooling = Literal["cls", "mean", "last"]


def pooled(
    hidden: Tensor,
    project: object,
    *,
    pooling: Pooling,
    positions: Tensor | None,
    count: int,
    documents_of: Tensor,
    shards: TokenShards = WHOLE_ROWS,
) -> Tensor:
    """A head: of each of the samples' documents its first or last hidden state, or the mean; [samples, n, d] fp32.

    ``positions`` [b, s] restart at 0 with each of ``count`` documents, paddings included; None: each row is one.
    ``documents_of`` [samples, n]: which of them are the samples'. ``shards``: of the rows, which tokens' hidden states
    these are; ranks that share rows all get their embeddings.
    """
    hidden = shards.whole(hidden)
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


def document_keys(tokens: Tensor, *, positions: Tensor | None, count: int, documents_of: Tensor) -> Tensor:
    """A number for the tokens of each of the samples' documents, [samples, n] int64: equal ones have equal numbers.

    Arguments as in `pooled`. A sum over 64-bit hashes of token and place; that two other documents have the same is as
    likely as 1 in 10^19.
    """
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    hashes = tokens * -7046029254386353131 + positions * -4417276706812531889  # odd; products wrap around
    for factor in (-4658895280553007687, -7723592293110705685):
        hashes = (hashes ^ ((hashes >> 29) & 0x7FFFFFFFF)) * factor
    document = run_starts(positions).flatten().cumsum(0) - 1
    sums = torch.zeros(count, dtype=torch.int64, device=tokens.device).index_add_(0, document, hashes.flatten())
    return sums[documents_of]


def repeated(keys: Tensor, first: int, count: int) -> Tensor:
    """[count, m + negatives] bool: which documents of all are no negatives of a query, because they answer it too.

    Those with the text of its own document, and those of a query with its text; its own document is not among them.
    ``count`` samples from ``first`` on, of all with `document_keys` [m, 2 + n]; documents as `contrastive` orders them.
    (https://arxiv.org/abs/2506.05176, section 3, leaves out documents that equal the query's own.)
    """
    own = keys[first : first + count]
    documents = torch.cat((keys[:, 1], keys[:, 2:].flatten()))
    found = own[:, 1, None] == documents
    found[:, : len(keys)] |= own[:, 0, None] == keys[:, 0]
    index = torch.arange(count, device=keys.device)
    found[index, first + index] = False
    return found


def info_nce(
    queries: Tensor,
    documents: Tensor,
    targets: Tensor,
    *,
    temperature: float = 0.05,
    all_queries: Tensor | None = None,
    own: Tensor | None = None,
    left_out: Tensor | None = None,
    by_angle: bool = True,
) -> Tensor:
    """-log softmax(cos(query, documents) / temperature) at each query's own document, [q] in nats.

    Args:
        queries: [q, d]; ``documents`` [n, d], of which ``targets`` [q] are the queries' own.
        all_queries: [m, d], for the symmetric loss: the mean with that of each query's document, which has to find its
            query, at ``own`` [q], among all queries.
        left_out: [q, n] bool, documents that are no negatives of a query; the first m belong to ``all_queries``, which
            are no negatives of its document then.
        by_angle: False: the dot product in place of its cosine.
    """
    normalize = partial(F.normalize, dim=-1) if by_angle else lambda x: x
    queries, documents = normalize(queries), normalize(documents)
    scores = queries @ documents.T / temperature
    if left_out is not None:
        scores = scores.masked_fill(left_out, -torch.inf)
    losses = F.cross_entropy(scores, targets, reduction="none")
    if all_queries is None:
        return losses
    assert own is not None
    back = documents[targets] @ normalize(all_queries).T / temperature
    if left_out is not None:
        back = back.masked_fill(left_out[:, : len(all_queries)], -torch.inf)
    return (losses + F.cross_entropy(back, own, reduction="none")) / 2


def contrastive(
    embedded: Tensor,
    everywhere: Tensor,
    first: int,
    *,
    temperature: float = 0.05,
    symmetric: bool = False,
    dims: Sequence[int] = (),
    keys: Tensor | None = None,
    by_angle: bool = True,
) -> Tensor:
    """`info_nce` of this rank's samples among all, [samples]; of several widths the sum.

    Args:
        embedded: [samples, 2 + negatives, d]: query, its document, others; ``everywhere`` those of all ranks, of which
            this rank's begin at ``first``.
        dims: widths, the first channels of an embedding, that are trained to be embeddings too; (): the whole alone.
        keys: `document_keys` of all ranks' texts [m, 2 + negatives]; with them `repeated` texts are no negatives.
    """
    left_out = None if keys is None else repeated(keys, first, len(embedded))
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
            left_out=left_out,
            by_angle=by_angle,
        )
    return losses


@torch.no_grad()
def ranks_of_own(
    queries: Tensor, documents: Tensor, first: int = 0, *, left_out: Tensor | None = None, by_angle: bool = True
) -> Tensor:
    """The rank of each query's document, ``documents[first + i]`` of ``queries[i]``, by cosine; 1 = the best; [q].

    ``left_out`` [q, n] bool: documents that are not counted. ``by_angle`` False: by the dot product.
    """
    if by_angle:
        queries, documents = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    similarity = queries @ documents.T
    is_better = similarity > similarity.diagonal(first)[:, None]
    return 1 + (is_better if left_out is None else is_better & ~left_out).sum(1)
