"""Answers that share their prompt: who sees whom, against a loop over tokens, and blocks of FlexAttention's masks."""

import pytest
import torch

from torchft.documents import Documents, branch_blocks, branch_mask, branches, count_documents, run_starts

ROWS = torch.tensor(
    [
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 2, 0, 0, 1, 1, 1, 0],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 1, 2],
    ]
)


def by_hand(positions, window, chunk):
    """Each token with the list of those before it in its own answer, prompt included."""
    mask = torch.zeros(len(positions), len(positions), dtype=torch.bool)
    trunk, path = [], []
    for i, p in enumerate(positions.tolist()):
        if p == 0:
            trunk = path = [i]
        elif p == int(positions[path[-1]]) + 1:
            path = [*path, i]
            trunk = path if path[: len(trunk)] == trunk else trunk
        else:
            path = [*trunk[:p], i]
        for j in path:
            away = p - int(positions[j])
            mask[i, j] = (window is None or away < window) and (
                chunk is None or p // chunk == int(positions[j]) // chunk
            )
    return mask


LIMITS = [(None, None), (3, None), (None, 4)]


@pytest.mark.parametrize(("window", "chunk"), LIMITS)
def test_who_sees_whom(window, chunk):
    want = torch.stack([by_hand(row, window, chunk) for row in ROWS])
    assert torch.equal(branch_mask(branches(ROWS), window=window, chunk=chunk), want)


def test_counts():
    assert count_documents(ROWS) == Documents(10, 14, True)
    assert count_documents(ROWS[:, :5]) == Documents(2, 5, False)
    assert run_starts(ROWS)[0].nonzero().flatten().tolist() == [0, 5, 9, 10, 11, 13, 14, 15]


def random_rows(seed):
    """[2, 97] of prompts with answers, and plain documents."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(1, high, (1,), generator=g))  # noqa: E731
    rows = []
    for _ in range(2):
        parts = []
        while sum(map(len, parts)) < 97:
            prompt = draw(20)
            parts.append(torch.arange(prompt + draw(12)))
            parts += [torch.arange(prompt, prompt + draw(12)) for _ in range(draw(4) - 1)]
        rows.append(torch.cat(parts)[:97])
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("window", "chunk"), [*LIMITS, (20, None), (None, 16)])
def test_blocks_say_no_more_and_no_less(seed, window, chunk):
    """Skipped blocks have nothing to see, full ones all; and siblings are skipped."""
    own = branches(random_rows(seed))
    mask = torch.nn.functional.pad(branch_mask(own, window=window, chunk=chunk), (0, 7, 0, 7))
    blocks = mask.unflatten(2, (13, 8)).unflatten(1, (13, 8)).transpose(2, 3)  # [b, q block, k block, q, k]
    some, all_ = branch_blocks(own, 8, window=window, chunk=chunk)
    held = torch.nn.functional.pad(torch.ones(97, 97, dtype=torch.bool).tril(), (0, 7, 0, 7))
    whole = blocks.flatten(3).all(-1)[:, :-1]
    assert not (blocks.flatten(3).any(-1) & ~some).any()
    assert not (all_[:, :-1] & ~whole).any()
    assert (held.sum() > mask[0].sum()) and (~some).sum() > 2 * 13 * 12 / 2  # besides what lies behind the query


def test_other_answers_are_passed_over():
    answers = [torch.arange(15, 15 + 32) for _ in range(3)]
    some, all_ = branch_blocks(
        branches(torch.cat([torch.arange(16 + 32), *answers])[None]), 16, window=None, chunk=None
    )
    assert some[0, 7].nonzero().flatten().tolist() == [0, 7]  # the third answer: the prompt, and itself
    assert all_[0, 8].nonzero().flatten().tolist() == [7]
