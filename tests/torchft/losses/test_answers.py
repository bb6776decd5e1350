"""Log-probabilities of answers against transformers, and what the losses get of them against loops over documents."""

from functools import partial

import pytest
import tiny
import torch

from torchft import models
from torchft.config import Component
from torchft.losses import preference
from torchft.losses.answers import answer_logps, judge_pairs, judge_singles

DPO = Component("torchft.losses.preference.dpo", {"beta": 0.3})
LENGTHS = [(9, 4), (7, 5), (12, 2), (8, 6)]  # tokens, and those of the answer, of two pairs


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    theirs = tiny.checkpoint(folder)
    return models.load(folder, dtype=torch.float32), theirs


def documents():
    g = torch.Generator().manual_seed(3)
    return [(torch.randint(101, (n,), generator=g), answer) for n, answer in LENGTHS]


def packed():
    """All documents in one row, a padding behind."""
    tokens, labels, positions = [], [], []
    for document, answer in documents():
        tokens.append(document)
        labels.append(torch.cat([document[1:], torch.tensor([-100])]))
        labels[-1][: len(document) - answer - 1] = -100
        positions.append(torch.arange(len(document)))
    tokens.append(torch.zeros(4, dtype=torch.long)), labels.append(torch.full((4,), -100))
    positions.append(torch.arange(4))
    batch = {"labels": torch.cat(labels)[None], "positions": torch.cat(positions)[None], "count": 5}
    return torch.cat(tokens)[None], batch | {"documents_of": torch.tensor([[0, 1], [2, 3]])}


def by_hand(model, alpha=None):
    """[pairs, 2] sums of log p and of log sum p^2, document by document."""
    sums, collisions = [], []
    for i, (document, answer) in enumerate(documents()):
        logps = model(document[None]).logits[0].log_softmax(-1)[len(document) - answer - 1 : -1]
        own = logps.gather(1, document[-answer:, None])[:, 0]
        if alpha is not None:
            shared = min(answer, LENGTHS[i ^ 1][1])
            own = torch.cat([own[:shared], alpha * own[shared:]])
        sums.append(own.sum())
        collisions.append((2 * logps).logsumexp(-1).sum())
    return torch.stack(sums).view(2, 2), torch.stack(collisions).view(2, 2)


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_sequence_log_probabilities_are_transformers(both, alpha):
    ours, theirs = both
    tokens, batch = packed()
    head = partial(answer_logps, **batch, ld_alpha=alpha, collisions=True)
    logps, collisions = ours(tokens, batch["positions"], head=head)
    want, want_collisions = by_hand(theirs, alpha)
    assert (logps - want).abs().max() <= 1e-4 and (collisions - want_collisions).abs().max() <= 1e-4
    assert not collisions.requires_grad or torch.autograd.grad(collisions.sum(), logps, allow_unused=True) == (None,)
    weight, name = ours.layers[0].mlp.up_proj.weight, "model.layers.0.mlp.up_proj.weight"
    upstream = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    (grad,) = torch.autograd.grad(logps, weight, upstream)
    (want_grad,) = torch.autograd.grad(want, dict(theirs.named_parameters())[name], upstream)
    assert (grad - want_grad).norm() / want_grad.norm() < 1e-5


def test_terms_of_pairs():
    _, batch = packed()
    g = torch.Generator().manual_seed(0)
    policy, known, collisions = (-torch.rand(2, 2, generator=g) * 9 for _ in range(3))
    lengths = torch.tensor(LENGTHS)[:, 1].view(2, 2)
    plain = judge_pairs(DPO.call, policy, known, **batch)
    want = preference.dpo(*policy.unbind(1), *known.unbind(1), beta=0.3)
    assert torch.equal(plain.losses, want[0]) and torch.equal(plain.rewards, torch.stack(want[1:], 1))
    nll = -policy[:, 0] / lengths[:, 0]
    with_nll = judge_pairs(DPO.call, policy, known, **batch, rpo_alpha=0.5)
    assert (with_nll.losses - want[0] - 0.5 * nll).abs().max() < 1e-6
    weighted = judge_pairs(DPO.call, torch.stack([policy, collisions]), known, **batch)
    weights = ((policy - collisions) / lengths).sum(1).exp()
    assert (weighted.losses - weights * want[0]).abs().max() < 1e-6 and torch.equal(weighted.logps, policy)


def test_single_answers():
    policy, known = torch.tensor([[-3.0], [-2.0]]), torch.tensor([[-4.0], [-1.0]])
    good = torch.tensor([True, False])
    judged = judge_singles(partial(preference.kto, beta=0.3), policy, known, is_desirable=good, kl=0.5)
    want = preference.kto(policy[:, 0], known[:, 0], good, 0.5, beta=0.3)
    assert torch.equal(judged.losses, want[0]) and torch.equal(judged.rewards[:, 0], want[1])
