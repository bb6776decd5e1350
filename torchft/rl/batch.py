"""Episodes as rows to train on: tokens, what the model chose of them, and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchft.documents import Documents
from torchft.losses.likelihood import IGNORE
from torchft.losses.policy import Baseline, Totals, group_advantages
from torchft.ranks import gather
from torchft.rl.rollout import Episode
from torchft.training.distributed import World

T = TypeVar("T", "Rows", "SharedRow")
PAD_MULTIPLE = 16  # row lengths, so that few shapes occur


@dataclass(frozen=True, kw_only=True)
class SharedRow:
    """The episodes of `Rows` in one row of t tokens, in which a group's prompt stands once: rl/shared_row.py."""

    tokens: Tensor  # [1, t] int64
    labels: Tensor  # [1, t] int64
    positions: Tensor  # [1, t] int64
    documents: Documents
    sources: Tensor  # [n] int64: where in the row something is predicted, in the order of the episodes
    targets: Tensor  # [n] int64: where among the b * s places of Rows

    def to(self, device: torch.device) -> "SharedRow":
        return _moved(self, device)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """b episodes of up to s tokens. Values of a token stand where it is predicted, at the token before it."""

    tokens: Tensor  # [b, s] int64
    labels: Tensor  # [b, s] int64; IGNORE where the model chose nothing, all over rows that do not count
    sampler_logps: Tensor  # [b, s] fp32: the engine's, 0 where nothing was chosen
    scores: Tensor  # [b] fp32: what each is judged by, its advantage, in PPO its reward
    where: tuple[str, ...]  # "data/train.jsonl:17" of each, to name a batch that breaks training
    shared: SharedRow | None = None  # computed instead of the rows

    @property
    def mask(self) -> Tensor:
        return self.labels != IGNORE

    def to(self, device: torch.device) -> "Rows":
        return _moved(self, device)

    @property
    def num_computed(self) -> int:
        """Tokens, padding included."""
        return self.tokens.numel() if self.shared is None else self.shared.tokens.numel()


def _moved(batch: T, device: torch.device) -> T:
    parts: dict[str, Any] = {n: x.to(device) for n, x in vars(batch).items() if isinstance(x, (Tensor, SharedRow))}
    return replace(batch, **parts)


def advantages(rewards: Tensor, *, group_size: int, baseline: Baseline, world: World) -> Tensor:
    """`group_advantages` of this rank's ``rewards`` [n], groups one after the other, among those of all ranks."""
    parts = gather(rewards)[:: world.tokens.count]  # ranks that share rows have the same ones
    found = group_advantages(torch.cat(parts).view(-1, group_size), baseline).flatten()
    own: Tensor = found.split([len(part) for part in parts])[world.data_rank]
    return own


def countable(episodes: Sequence[Episode], rewards: Tensor, *, skip_truncated: bool) -> list[bool]:
    """Which of them are trained on: with a token, a reward [n] that is known and, if wanted, an end of their own."""
    return [
        e.num_chosen > 0 and not is_unknown and not (skip_truncated and e.finish == "length")
        for e, is_unknown in zip(episodes, rewards.isnan().tolist())
    ]


def rows(
    episodes: Sequence[Episode],
    numbers: Sequence[int],
    *,
    scores: Tensor,
    counts: Sequence[bool],
    pad_id: int,
    length: int | None = None,
) -> Rows:
    """The episodes of ``numbers``, whose ``scores`` [n] and whether they count are indexed by these numbers.

    Rows of episodes that do not count are empty: a prompt may be longer than any answer could follow. ``length``:
    tokens of a row, for compiled blocks, which want one shape; None: as the longest needs.
    """
    longest = max((len(episodes[i].tokens) for i in numbers if counts[i]), default=1) if length is None else length
    b, s = len(numbers), -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    tokens, labels = torch.full((b, s), pad_id), torch.full((b, s), IGNORE)
    logps = torch.zeros(b, s)
    for row, i in enumerate(numbers):
        if not counts[i]:
            continue
        episode, n = episodes[i], len(episodes[i].tokens)
        held, chosen = torch.tensor(episode.tokens), torch.tensor(episode.chosen)[1:]
        tokens[row, :n] = held
        labels[row, : n - 1] = torch.where(chosen, held[1:], IGNORE)
        logps[row, : n - 1] = torch.tensor(episode.logps)[1:]
    own = torch.tensor(list(numbers), dtype=torch.int64)
    where = tuple(episodes[i].prompt.where for i in numbers)
    return Rows(tokens=tokens, labels=labels, sampler_logps=logps, scores=scores[own], where=where)


def micro_batches(
    count: int, *, mini_batches: int, batch_size: int, lengths: Sequence[int] | None
) -> list[list[list[int]]]:
    """Numbers 0 to ``count``, as ``mini_batches`` lists of micro-batches of at most ``batch_size``, alike on all ranks.

    Every mini-batch has a part of every group (numbers in a row are a group); rows of like length are together, or
    without ``lengths`` groups.
    """
    found = []
    for k in range(mini_batches):
        own = list(range(k, count, mini_batches))
        if lengths is not None:
            own.sort(key=lambda i: lengths[i])
        found.append([own[i : i + batch_size] for i in range(0, len(own), batch_size)])
    return found


def count_totals(batches: Sequence[Rows], *, max_tokens: int, world: World) -> Totals:
    """All ranks: of an update of all ranks, for `token_weights`; what several share is counted for each of them."""
    masks = [batch.mask for batch in batches]
    own = torch.stack([torch.stack((mask.any(1).sum(), mask.sum())) for mask in masks]).sum(0)
    sequences, tokens = world.sum(own).tolist()
    return Totals(sequences=sequences, tokens=tokens, max_tokens=max_tokens)
