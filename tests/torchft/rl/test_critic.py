"""Rewards per token, and advantages however the batch is divided."""

import torch

from torchft.rl.batch import Rows
from torchft.rl.critic import Judged, estimate, token_rewards
from torchft.training.distributed import World

WORLD = World(device=torch.device("cpu"))


def batch(seed, lengths=(3, 6, 0, 2), s=8):
    g = torch.Generator().manual_seed(seed)
    n = torch.tensor(lengths)[:, None]
    at = torch.arange(s)
    labels = torch.where((at >= 1) & (at < 1 + n), 5, -100)
    values = Judged(-torch.rand(len(n), s, generator=g), torch.zeros(len(n), s), torch.randn(len(n), s, generator=g))
    rows = Rows(
        tokens=torch.zeros(len(n), s, dtype=torch.long),
        labels=labels,
        sampler_logps=torch.zeros(len(n), s),
        scores=torch.randn(len(n), generator=g),
        where=("",) * len(n),
    )
    return rows, values, values.logps - 0.1 * torch.rand(len(n), s, generator=g)


def test_the_score_comes_with_the_last_token():
    mask = torch.tensor([[False, True, True, False], [False, False, False, False], [True, False, True, False]])
    penalty = torch.full((3, 4), 0.25)
    found = token_rewards(torch.tensor([1.0, 2.0, 3.0]), mask, penalty)
    assert found.tolist() == [[0, -0.25, 0.75, 0], [0, 0, 0, 0], [-0.25, 0, 2.75, 0]]


def test_without_discount_the_return_is_what_is_still_to_come():
    """lam = gamma = 1: advantage + value is the sum of this and all later rewards, whatever the critic thinks."""
    rows, values, reference = batch(0)
    [[found]] = estimate([[rows]], [[values]], [[reference]], kl_coef=0.5, gamma=1.0, lam=1.0, world=WORLD)
    for b, n in enumerate((3, 6, 0, 2)):
        penalty = 0.5 * (values.logps - reference)[b]
        for t in range(1, 1 + n):
            want = rows.scores[b] - penalty[t : 1 + n].sum()
            assert abs(found.returns[b, t] - want) < 1e-5
    chosen = found.advantages[rows.mask]
    assert abs(chosen.mean()) < 1e-6 and abs(chosen.square().mean() - 1) < 1e-5
    assert (found.advantages[~rows.mask] == 0).all() and (found.returns[~rows.mask] == 0).all()


def test_division_changes_nothing():
    rows, values, reference = batch(1)
    how = {"kl_coef": 0.1, "gamma": 0.9, "lam": 0.8, "world": WORLD}
    [[whole]] = estimate([[rows]], [[values]], [[reference]], **how)
    cut = [slice(0, 1), slice(1, 4)]
    parts = [
        [
            Rows(**{k: v[c] for k, v in vars(rows).items() if v is not None}),
            Judged(*(v[c] for v in values)),
            reference[c],
        ]
        for c in cut
    ]
    found = estimate(*([[part[i]] for part in parts] for i in range(3)), **how)
    for i, c in enumerate(cut):
        assert (found[i][0].advantages - whole.advantages[c]).abs().max() < 1e-6
        assert (found[i][0].returns - whole.returns[c]).abs().max() < 1e-6
