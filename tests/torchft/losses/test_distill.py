"""Distillation losses in fp64 against kl_div and TRL, values and gradients; the chunked sum against all logits."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trl.experimental.gkd import GKDTrainer

from torchft.losses.distill import (
    distill_sum,
    distill_top_k_sum,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    symmetric_kl,
    top_k_logps,
)

STUDENT, TEACHER = (
    torch.randn(7, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) * 2 for i in (0, 1)
)
STUDENT.requires_grad_()


def same(ours, theirs):
    assert abs(ours - theirs) <= 1e-10
    grads = [torch.autograd.grad(x, STUDENT, retain_graph=True)[0] for x in (ours, theirs)]
    assert (grads[0] - grads[1]).abs().max() <= 1e-10 and grads[1].abs().max() > 1e-3


def kl_div(one, other):
    """KL(one || other), summed."""
    return F.kl_div(other, one, reduction="sum", log_target=True)


def test_divergences_are_kl_div():
    s, t = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    same(forward_kl(s, t).sum(), kl_div(t, s))
    same(reverse_kl(s, t).sum(), kl_div(s, t))
    same(symmetric_kl(s, t, reverse_weight=0.3).sum(), 0.7 * kl_div(t, s) + 0.3 * kl_div(s, t))
    assert forward_kl(s, s).abs().max() <= 1e-10 and jensen_shannon(s, s).abs().max() <= 1e-10


@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 1.0), (0.2, 3.0), (0.0, 1.0), (1.0, 2.0)])
def test_jensen_shannon_is_trls(beta, temperature):
    theirs = GKDTrainer.generalized_jsd_loss(
        STUDENT[None], TEACHER[None], beta=beta, temperature=temperature, reduction="sum"
    )
    s, t = ((x / temperature).log_softmax(-1) for x in (STUDENT, TEACHER))
    same(jensen_shannon(s, t, beta=beta).sum(), theirs)


@pytest.mark.parametrize("kd_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("trained", [True, False])
def test_chunks_are_all_logits(kd_weight, trained):
    """With a temperature, a longer student vocabulary, and gradients of the hidden states and of a trained head."""
    g = torch.Generator().manual_seed(2)
    hidden, wide = (torch.randn(2, 6, d, dtype=torch.float64, generator=g) for d in (5, 8))
    hidden.requires_grad_()
    head, other = nn.Linear(5, 17, dtype=torch.float64).requires_grad_(trained), nn.Linear(8, 13, dtype=torch.float64)
    labels = torch.randint(13, (2, 6), generator=g)
    labels[0, :3] = labels[1, 2] = -100
    theirs = wide.flatten(0, 1)[(labels != -100).flatten()]
    loss = distill_sum(
        hidden, head, labels=labels, num_supervised=8, teacher=lambda i: other(theirs[i]), divergence=reverse_kl,
        temperature=2.0, kd_weight=kd_weight, vocab_size=13, chunk=3,
    )  # fmt: skip
    logits, y = head(hidden)[labels != -100][:, :13], labels[labels != -100]
    s, t = (logits / 2).log_softmax(-1), (other(theirs) / 2).log_softmax(-1).detach()
    want = kd_weight * kl_div(s, t) + (1 - kd_weight) * F.cross_entropy(logits, y, reduction="sum")
    assert abs(loss - want) <= 1e-10
    inputs = [hidden, head.weight, head.bias] if trained else [hidden]
    for ours, theirs_grad in zip(torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * want, inputs)):
        assert (ours - theirs_grad).abs().max() <= 1e-10 and theirs_grad.abs().max() > 1e-3
    assert other.weight.grad is None


def test_no_more_than_a_chunk_of_logits_exists():
    seen = []
    hidden = torch.randn(1, 100, 4, requires_grad=True)

    def project(h):
        seen.append(len(h))
        return h @ torch.ones(4, 9)

    labels = torch.zeros(1, 100, dtype=torch.long)
    teacher = SimpleNamespace(rows=[])

    def of_teacher(numbers):
        teacher.rows.append(len(numbers))
        return torch.zeros(len(numbers), 9)

    about = {"labels": labels, "num_supervised": 100, "divergence": forward_kl, "vocab_size": 9, "chunk": 32}
    distill_sum(hidden, project, teacher=of_teacher, **about).backward()
    assert max(seen) <= 32 and teacher.rows == [32, 32, 32, 4] and hidden.grad is not None


@pytest.mark.parametrize("k", [12, 4])
def test_top_k_is_kl_div_of_the_same_events(k):
    """Of all words but one the whole divergence; of fewer that of the words and the rest, which is less."""
    g = torch.Generator().manual_seed(3)
    hidden, known = torch.randn(1, 7, 5, dtype=torch.float64, generator=g).requires_grad_(), TEACHER
    weight = torch.randn(5, 13, dtype=torch.float64, generator=g)
    labels = torch.arange(7)[None]
    teacher = top_k_logps(
        torch.zeros(1, 7, 2), lambda h: known, labels=labels, count=7, k=k, temperature=2.0, vocab_size=13
    )  # fmt: skip
    about = {"labels": labels, "num_supervised": 7, "temperature": 2.0, "vocab_size": 13, "kd_weight": 0.6}
    loss = distill_top_k_sum(hidden, lambda h: h @ weight, teacher=teacher, divergence=forward_kl, chunk=3, **about)
    s, t = ((x[0] if x.ndim == 3 else x) / 2 for x in (hidden @ weight, known))
    events = (
        torch.zeros(7, 13).scatter(1, t.topk(k).indices, torch.arange(1.0, k + 1).expand(7, k)).long()
    )  # 0: the rest
    grouped = [torch.zeros(7, k + 1, dtype=torch.float64).scatter_add(1, events, x.softmax(-1)).log() for x in (s, t)]
    nll = F.cross_entropy((hidden @ weight)[0], labels[0], reduction="sum")
    want = 0.6 * kl_div(grouped[1], grouped[0]) + 0.4 * nll
    assert abs(loss - want) <= 1e-10
    grads = [torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (loss, want)]
    assert (grads[0] - grads[1]).abs().max() <= 1e-10
    whole = 0.6 * kl_div(t.log_softmax(-1), s.log_softmax(-1)) + 0.4 * nll
    assert abs(loss - whole) <= 1e-10 if k == 12 else loss < whole - 1e-3
