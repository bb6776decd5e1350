"""Reward losses in fp64 against TRL's trainer and closed forms; scores where they are read."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from trl import RewardTrainer

from torchft.losses.reward import (
    binary_cross_entropy,
    bradley_terry,
    cross_entropy,
    document_scores,
    listwise,
    margin,
    regression,
    scores_at,
    steps,
)


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


def same(losses, want, *leaves):
    """Values and gradients of the mean, which some mistake would move."""
    grads = [torch.autograd.grad(x.mean(), leaves, retain_graph=True) for x in (losses, want)]
    assert abs(losses.mean() - want.mean()) <= 1e-10 and max(g.abs().max() for g in grads[1]) > 1e-2
    return all((a - b).abs().max() <= 1e-10 for a, b in zip(*grads))


def test_classes_and_candidates():
    scores, labels = randn(5, 3), torch.tensor([2, 0, 1, 1, 2])
    targets = nn.functional.one_hot(labels, 3).double()
    got = cross_entropy(scores, targets)
    assert got.shape == (5,) and same(got, -scores.log_softmax(1)[torch.arange(5), labels], scores)
    several = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]]).double()
    odds = torch.where(several > 0, scores, -scores)  # -log sigmoid of what is asked for
    got = binary_cross_entropy(scores, several)
    assert got.shape == (5,) and same(got, torch.log1p((-odds).exp()).mean(1), scores)
    soft = torch.full_like(several, 0.25)
    want = -(0.25 * scores.sigmoid().log() + 0.75 * (1 - scores.sigmoid()).log()).mean(1)
    assert same(binary_cross_entropy(scores, soft), want, scores)
    got = listwise(scores)
    assert got.shape == (5,) and same(got, scores.exp().sum(1).log() - scores[:, 0], scores)


def test_two_candidates_are_a_pair():
    scores = randn(6, 2)
    assert same(listwise(scores), bradley_terry(scores[:, 0], scores[:, 1]), scores)


def test_margin():
    chosen, rejected = randn(20), randn(20, seed=1)
    ones = torch.ones_like(chosen)
    want = nn.functional.margin_ranking_loss(chosen, rejected, ones, margin=0.7, reduction="none")
    assert same(margin(chosen, rejected, margin=0.7), want, chosen, rejected)
    own = randn(20, seed=2).detach().abs()
    want = torch.stack([(own[i] - chosen[i] + rejected[i]).clamp_min(0) for i in range(20)])
    assert same(margin(chosen, rejected, own), want, chosen, rejected)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_scores_of_documents(pooling):
    hidden, score = randn(2, 6, 4).float(), nn.Linear(4, 2)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]])
    parts = [hidden[0, :3], hidden[0, 3:5], hidden[1, :4], hidden[1, 4:]]
    read = {"cls": lambda x: x[0], "mean": lambda x: x.mean(0), "last": lambda x: x[-1]}[pooling]
    where = {"positions": positions, "count": 5, "documents_of": torch.tensor([[1, 0], [3, 4]])}
    got = document_scores(hidden, None, score=score, pooling=pooling, **where)
    want = torch.stack([score(read(parts[i])) for i in (1, 0, 2, 3)]).view(2, 2, 2)
    assert (got - want).abs().max() < 1e-6


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
