"""Documents in packed rows, and answers that share their prompt: all told by positions.

Positions restart at 0 with each document. Where one is neither 0 nor the next after the token before it, a branch
begins: another answer to the document's prompt, which sees itself and what the document's first run of tokens, the
trunk, holds before that position. So [prompt, answer 1, answer 2, ...] computes the prompt once:

    tokens      A B C x y z C u v | D E
    positions   0 1 2 3 4 5 2 3 4 | 0 1     (C again: each answer's first token is predicted at a place of its own)
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Of the rows of a batch, known on the host: an upper bound of their number, and the tokens of the longest."""

    num: int
    longest: int
    has_branches: bool = False


def count_documents(positions: Tensor) -> Documents:
    """Of rows with these ``positions`` [b, s]. The host waits."""
    starts = run_starts(positions)
    forks = (starts[:, 1:] & (positions[:, 1:] != 0)).any()
    count, longest, has_branches = torch.stack((starts.sum(), positions.max() + 1, forks)).tolist()
    return Documents(count, longest, bool(has_branches))


def run_starts(positions: Tensor) -> Tensor:
    """[b, s] bool: where documents and branches begin."""
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = (positions[:, 1:] == 0) | (positions.diff(dim=1) != 1)
    return starts


class Branches(NamedTuple):
    """Of each token of rows that hold branches, [b, s] int64."""

    documents: Tensor  # number of its document; as of its run, they ascend along a row
    runs: Tensor  # number of its run, the trunk or a branch
    positions: Tensor
    forks: Tensor  # trunk tokens before this position are seen by it, besides its own run; 0 in the trunk
    trunk: Tensor  # its position if it is in the trunk; else s, which no branch sees


def branches(positions: Tensor) -> Branches:
    """For ``positions`` [b, s]."""
    b, s = positions.shape
    starts = run_starts(positions)
    is_new = positions == 0
    is_new[:, 0] = True
    runs, documents = starts.cumsum(1), is_new.cumsum(1)
    index = torch.arange(s, device=positions.device).expand(b, s)
    first = torch.where(starts, index, 0).cummax(1).values  # of its run
    begun = torch.where(is_new, index, 0).cummax(1).values  # of its document
    in_trunk = first == begun
    forks = torch.where(in_trunk, 0, positions.gather(1, first))
    return Branches(documents, runs, positions, forks, torch.where(in_trunk, positions, s))


def sees(own: Branches, row: Tensor, q: Tensor, k: Tensor, *, window: int | None, chunk: int | None) -> Tensor:
    """Whether the query at ``q`` of ``row`` sees the key at ``k``; all index tensors that broadcast."""
    seen = own.runs[row, q] == own.runs[row, k]
    seen = seen | ((own.documents[row, q] == own.documents[row, k]) & (own.trunk[row, k] < own.forks[row, q]))
    seen = seen & (q >= k)
    if window is not None:
        seen = seen & (own.positions[row, q] - own.positions[row, k] < window)
    if chunk is not None:
        seen = seen & (own.positions[row, q] // chunk == own.positions[row, k] // chunk)
    return seen


def branch_mask(own: Branches, *, window: int | None, chunk: int | None) -> Tensor:
    """[b, s, s] bool: which keys each query sees."""
    b, s = own.positions.shape
    row, index = torch.arange(b, device=own.positions.device), torch.arange(s, device=own.positions.device)
    return sees(own, row[:, None, None], index[:, None], index, window=window, chunk=chunk)


def branch_blocks(own: Branches, size: int, *, window: int | None, chunk: int | None) -> tuple[Tensor, Tensor]:
    """[b, n, n] bool for n blocks of ``size`` tokens: where a query may see a key, and where all see all."""

    def reduced(x: Tensor, reduce: str) -> Tensor:
        b, s = x.shape
        index = torch.arange(s, device=x.device).expand(b, s) // size
        fresh = x.new_zeros(b, -(-s // size))
        return fresh.scatter_reduce(1, index, x, reduce, include_self=False)

    low, high = (Branches(*(reduced(x, reduce) for x in own)) for reduce in ("amin", "amax"))
    q_low, q_high = (Branches(*(x[:, :, None] for x in bound)) for bound in (low, high))
    k_low, k_high = (Branches(*(x[:, None, :] for x in bound)) for bound in (low, high))
    index = torch.arange(low.runs.shape[1], device=low.runs.device)
    away = index[:, None] - index
    some = (k_high.runs >= q_low.runs) | ((k_high.documents >= q_low.documents) & (k_low.trunk < q_high.forks))
    one_run = k_low.runs == q_high.runs  # runs ascend: then all of both blocks are in it
    all_ = one_run | ((k_low.documents == q_high.documents) & (k_high.trunk < q_low.forks))
    some, all_ = some & (away >= 0), all_ & (away > 0)
    if window is not None:
        some &= q_low.positions - k_high.positions < window
        all_ &= q_high.positions - k_low.positions < window
    if chunk is not None:
        some &= (q_low.positions // chunk <= k_high.positions // chunk) & (
            q_high.positions // chunk >= k_low.positions // chunk
        )
        all_ &= (q_low.positions // chunk == k_high.positions // chunk) & (
            q_high.positions // chunk == k_low.positions // chunk
        )
    return some, all_
