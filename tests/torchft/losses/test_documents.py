"""Sums over the documents of packed rows, against a loop; and the probability of collisions, against its definition."""

import torch

from torchft.losses.documents import answer_lengths, document_sums
from torchft.losses.likelihood import IGNORE, token_collision_logps

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 1, 2, 0, 1, 2]])


def test_sums_and_their_gradients():
    values = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    starts = [i for i, p in enumerate(POSITIONS.flatten().tolist()) if p == 0]
    parts = [values.flatten()[start:stop] for start, stop in zip(starts, [*starts[1:], 24])]
    sums = document_sums(values, POSITIONS, len(parts))
    assert (sums - torch.stack([part.sum() for part in parts])).abs().max() < 1e-12
    upstream = torch.arange(1.0, 9.0, dtype=torch.float64)
    (grad,) = torch.autograd.grad(sums, values, upstream)
    assert torch.equal(grad.flatten(), upstream.repeat_interleave(torch.tensor([len(part) for part in parts])))
    assert torch.equal(document_sums(values, None, 3), values.sum(1))


def test_answer_lengths():
    labels = torch.full((3, 8), IGNORE)
    labels[0, 1:5], labels[2, 4] = 7, 0
    assert answer_lengths(labels, POSITIONS, 8).tolist() == [2, 2, 0, 0, 0, 0, 1, 0]


def test_collisions():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8, generator=g), torch.randn(8, 11, generator=g)
    labels = torch.tensor([[1, IGNORE, 2, 3, IGNORE], [IGNORE, IGNORE, 4, 5, 6]])
    found = token_collision_logps(hidden, lambda h: h @ weight, labels=labels, chunk=2)
    probs = (hidden.double() @ weight.double()).softmax(-1)
    want = (probs**2).sum(-1).log().where(labels != IGNORE, 0)
    assert (found - want).abs().max() < 1e-5 and want.min() < -0.5
