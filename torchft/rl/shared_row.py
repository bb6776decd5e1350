"""A group's answers in one row with their prompt once (torchft/documents.py), and values of them as `Rows` has them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from torchft.documents import Documents
from torchft.losses.likelihood import IGNORE, token_logps
from torchft.modules.decoder import Decoder
from torchft.ranks import gather
from torchft.rl.batch import Rows, SharedRow, rows
from torchft.rl.rollout import Episode
from torchft.rl.whole_rows import token_values
from torchft.training.distributed import World


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """What an episode adds to the row: its tokens from ``first`` on."""

    number: int  # row of Rows
    first: int
    at: int  # place in the row


def saved_by_sharing(episodes: Sequence[Episode], counts: Sequence[bool], *, group_size: int, world: World) -> float:
    """Of the tokens of all episodes of all ranks that count, groups one after the other, those of prompts that need
    not be computed again. All ranks call it."""
    total = again = 0
    for i in range(0, len(episodes), group_size):
        own = [episode for episode, counted in zip(episodes[i : i + group_size], counts[i:]) if counted]
        total += sum(len(episode.tokens) for episode in own)
        again += sum(_shared(own[0], episode) for episode in own[1:])
    again, total = world.sum(torch.tensor([again, total], device=world.device)).tolist()
    return again / max(total, 1)


def filled(
    parts: Sequence[Sequence[Sequence[int]]], episodes: Sequence[Episode], counts: Sequence[bool], *, room: int
) -> list[list[list[int]]]:
    """All ranks: ``parts``, mini-batches of micro-batches of groups, cut anew where a shared row of ``room`` tokens is
    full: for compiled blocks, which want one shape. Alike in number on all ranks, by empty ones at the end."""
    found = []
    for part in parts:
        micro, at, trunk = [list[int]()], 0, None
        for i in (i for own in part for i in own):
            n = len(episodes[i].tokens) if counts[i] else 0
            shared = _shared(trunk, episodes[i]) if trunk and n else 0
            if at + n - shared > room:
                micro.append([])
                at, shared = 0, 0
            if n and not shared:
                trunk = episodes[i]
            micro[-1].append(i)
            at += n - shared
        found.append(micro)
    most = [max(numbers) for numbers in zip(*gather([len(micro) for micro in found]))]
    return [micro + [list[int]() for _ in range(n - len(micro))] for n, micro in zip(most, found)]


def shared_rows(
    episodes: Sequence[Episode],
    numbers: Sequence[int],
    *,
    scores: Tensor,
    counts: Sequence[bool],
    pad_id: int,
    length: int | None = None,
    room: int | None = None,
) -> Rows:
    """As `rows`, computed as one row, of ``room`` tokens or as many as it needs. Groups stand together; episodes that
    do not count are not computed at all."""
    batch = rows(episodes, numbers, scores=scores, counts=counts, pad_id=pad_id, length=length)
    counted = batch.mask.any(1).tolist()
    pieces, at = list[_Piece](), 0
    trunk: Episode | None = None
    for k, i in enumerate(numbers):
        if not counted[k]:
            continue
        shared = 0 if trunk is None else _shared(trunk, episodes[i])
        if not shared:
            trunk = episodes[i]
        pieces.append(_Piece(number=k, first=shared, at=at))
        at += len(episodes[i].tokens) - shared
    t = padded(at) if room is None else room
    tokens, labels = batch.tokens.new_full((1, t), pad_id), batch.labels.new_full((1, t), IGNORE)
    positions = torch.zeros(1, t, dtype=torch.int64)
    for piece in pieces:
        n = len(episodes[numbers[piece.number]].tokens) - piece.first
        own, place = slice(piece.first, piece.first + n), slice(piece.at, piece.at + n)
        tokens[0, place], labels[0, place] = batch.tokens[piece.number, own], batch.labels[piece.number, own]
        positions[0, place] = torch.arange(piece.first, piece.first + n)
    positions[0, at:] = torch.arange(t - at)
    has_branches = any(piece.first for piece in pieces)
    row = SharedRow(
        tokens=tokens,
        labels=labels,
        positions=positions,
        documents=Documents(len(pieces) + 1, int(positions.max()) + 1, has_branches),
        sources=(labels[0] != IGNORE).nonzero()[:, 0],
        targets=batch.mask.flatten().nonzero()[:, 0],
    )
    return replace(batch, shared=row)


def chosen_logps(model: Decoder, batch: Rows, *, temperature: float) -> tuple[Tensor, Tensor]:
    """`token_logps` of what was chosen and the entropy of its distribution, [b, s] each; shared row or not."""
    head = partial(token_logps, temperature=temperature, entropy=True)
    row = batch.shared
    if row is None:
        logps, entropy = token_values(model, batch.tokens, batch.labels, head)
        return logps, entropy
    found = token_values(model, row.tokens, row.labels, head, positions=row.positions, documents=row.documents)
    logps, entropy = (_spread(values, row, batch) for values in found)
    return logps, entropy


def padded(num_tokens: int) -> int:
    """A row's length for so many tokens: at most an eighth more, of 8 lengths between a power of two and the next."""
    step = max(16, 1 << max(num_tokens.bit_length() - 4, 0))
    return max(-(-num_tokens // step), 1) * step


def _spread(values: Tensor, row: SharedRow, batch: Rows) -> Tensor:
    """``values`` [1, t] of the shared row where `Rows` has them, [b, s]; 0 elsewhere."""
    zeros = values.new_zeros(batch.tokens.numel())
    return zeros.index_copy(0, row.targets, values.flatten().index_select(0, row.sources)).view(batch.tokens.shape)


def _shared(one: Episode, other: Episode) -> int:
    """Tokens that ``other`` need not compute beside ``one``: a prompt that is the same, but for its last token."""
    if not (one.num_chosen and other.num_chosen):
        return 0
    n = one.chosen.index(True)
    is_same = n == other.chosen.index(True) and one.tokens[:n] == other.tokens[:n]
    return max(n - 1, 0) if is_same else 0
