"""Reward losses in fp64 against TRL's trainer and closed forms; scores where they are read."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from trl import RewardTrainer

from torchft.losses.reward import bradley_terry, regression, scores_at, steps


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("centering", [0.0, 0.3])
@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry_is_trls(centering, with_margin):
    scores, margins = randn(6, 1), randn(3, seed=1).detach().abs()
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centering or None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _total_train_tokens=0,
        _metrics={"eval": {k: [] for k in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")}},
    )
    inputs = {"margin": margins} if with_margin else {}
    theirs = RewardTrainer.compute_loss(stub, lambda **_: SimpleNamespace(logits=scores), inputs)
    chosen, rejected = scores[:3, 0], scores[3:, 0]
    losses = bradley_terry(chosen, rejected, margins if with_margin else None, centering=centering)
    assert losses.shape == (3,) and abs(losses.mean() - theirs) <= 1e-10
    grads = [torch.autograd.grad(x, scores, retain_graph=True)[0] for x in (losses.mean(), theirs)]
    assert (grads[0] - grads[1]).abs().max() <= 1e-10 and grads[1].abs().max() > 1e-2


def test_regression_and_steps():
    scores, targets = randn(4, 3), randn(4, 3, seed=1).detach()
    want = nn.functional.mse_loss(scores, targets)
    assert abs(regression(scores, targets).mean() - want) <= 1e-10
    logits, labels = randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    odds = (logits[:, 0] - logits[:, 1]) * (2 * labels - 1)
    assert (steps(logits, labels) - torch.log1p(odds.exp())).abs().max() <= 1e-10


def test_scores_are_read_where_labels_are():
    hidden, score = randn(2, 4, 3), nn.Linear(3, 2, dtype=torch.float64)
    labels = torch.tensor([[-100, 0, -100, 1], [1, -100, -100, -100]])
    found = scores_at(hidden, None, score=score, labels=labels, count=3)
    assert torch.equal(found, score(torch.stack([hidden[0, 1], hidden[0, 3], hidden[1, 0]])))
