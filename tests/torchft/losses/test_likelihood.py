"""Chunked token likelihoods against plain logits in fp64, gradients of every kind of head included."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import distance, gradients
from tiny import decoder, tokens
from torch import nn

from torchft.adapters.lora import LoRALinear
from torchft.losses.likelihood import nll_sum, token_logps, token_nll

B, S, D, V = 2, 9, 16, 37


def labels_of(batch, share):
    """Shifted labels with about ``share`` of the tokens trained on, unevenly over the rows."""
    labels = batch.roll(-1, dims=1)
    keep = torch.rand(batch.shape, generator=torch.Generator().manual_seed(1)) < share
    keep[0, :] = False
    return labels.masked_fill(~keep, -100)


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Capped(nn.Module):
    """A linear layer whose logits a soft cap bounds."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(D, V, bias=True)

    def forward(self, x):
        return 5 * (self.lm_head(x) / 5).tanh()


class Tied(nn.Module):
    """The embedding as the output projection."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(V, D)

    def forward(self, x):
        return F.linear(x, self.embed_tokens.weight)


def lora(**options):
    return LoRALinear(nn.Linear(D, V, bias=False, device="cpu"), 4, 8.0, **options)


HEADS = {
    "linear": lambda: nn.Linear(D, V, bias=False),
    "frozen": lambda: nn.Linear(D, V, bias=False).requires_grad_(False),
    "tied": Tied,
    "capped": Capped,
    "frozen capped": lambda: Capped().requires_grad_(False),
    "lora": lora,
    "dora": partial(lora, dora=True),
}


def make(kind):
    torch.manual_seed(0)
    head = HEADS[kind]()
    for i, p in enumerate(head.parameters()):
        with torch.no_grad():
            p.copy_(0.5 * seeded(*p.shape, seed=i))
    return head


def inputs(share=0.7, dtype=torch.float32):
    labels = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(3))
    dropped = torch.rand((B, S), generator=torch.Generator().manual_seed(4)) >= share
    return (2 * seeded(B, S, D, seed=7)).to(dtype).requires_grad_(), labels.masked_fill(dropped, -100)


def oracle(hidden, head, labels, temperature=1.0):
    """Log-probabilities and entropies [b, s] from all logits in fp64, 0 where ignored."""
    p = torch.distributions.Categorical(logits=head(hidden) / temperature)
    kept = labels != -100
    return p.log_prob(labels.where(kept, 0)) * kept, p.entropy() * kept


def grads(loss, hidden, head):
    """Gradients of the hidden states and of what the head trains."""
    named = {n: p for n, p in head.named_parameters() if p.requires_grad}
    return dict(zip(["hidden", *named], torch.autograd.grad(loss, [hidden, *named.values()], retain_graph=True)))


def exact(kind, loss, share=0.7):
    """``loss(hidden, head, labels)`` and its gradients, all in fp64."""
    hidden, labels = inputs(share, torch.float64)
    head = make(kind).double()
    value = loss(hidden, head, labels)
    return value, grads(value, hidden, head)


def close(got, want, bar=3e-6):
    assert got.keys() == want.keys()
    return all(distance(got[n], want[n])[1] <= bar for n in want)


UPSTREAM = seeded(B, S, seed=11), seeded(B, S, seed=12)  # of the log-probabilities and the entropies, token by token


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_sum_is_plain_cross_entropy_in_fp64(kind, chunk):
    hidden, labels = inputs()
    head = make(kind)
    loss = nll_sum(hidden, head, labels=labels, chunk=chunk)
    plain = lambda h, project, y: F.cross_entropy(project(h).flatten(0, 1), y.flatten(), reduction="sum")  # noqa: E731
    want, want_grads = exact(kind, plain)
    assert loss.shape == () and loss.dtype == torch.float32
    assert distance(loss, want)[1] <= 1e-6
    assert close(grads(loss, hidden, head), want_grads)
    assert close(
        grads(loss / 7, hidden, head), {n: g / 7 for n, g in want_grads.items()}
    )  # again: nothing was consumed


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_every_token_has_its_own_upstream(kind, chunk):
    hidden, labels = inputs()
    head = make(kind)
    nll = token_nll(hidden, head, labels=labels, chunk=chunk)
    want, want_grads = exact(kind, lambda h, project, y: -(UPSTREAM[0] * oracle(h, project, y)[0]).sum())
    assert nll.shape == labels.shape and nll.dtype == torch.float32
    assert (nll[labels == -100] == 0).all()
    loss = (UPSTREAM[0] * nll).sum()
    assert distance(loss, want)[0] <= 1e-4
    assert close(grads(loss, hidden, head), want_grads)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("upstream", ["logp", "entropy", "both"])
def test_logps_and_entropy_at_a_temperature(kind, upstream):
    hidden, labels = inputs()
    head = make(kind)
    g, ge = UPSTREAM[0] * (upstream != "entropy"), UPSTREAM[1] * (upstream != "logp")
    both = token_logps(hidden, head, labels=labels, temperature=0.7, entropy=True, chunk=4)
    want = oracle(inputs(dtype=torch.float64)[0], make(kind).double(), labels, 0.7)
    assert all(distance(a, b)[1] <= 1e-6 for a, b in zip(both, want))
    used = {"logp": g * both[0], "entropy": ge * both[1], "both": g * both[0] + ge * both[1]}[upstream]
    _, want_grads = exact(kind, lambda h, p, y: sum((w * v).sum() for w, v in zip((g, ge), oracle(h, p, y, 0.7))))
    assert close(grads(used.sum(), hidden, head), want_grads, 1e-5)


@pytest.mark.parametrize("count", [1, 5, 6, 7])  # chunk - 1, chunk, chunk + 1
@pytest.mark.parametrize("kind", ["linear", "frozen"])
def test_chunk_boundaries(kind, count):
    hidden, _ = inputs()
    labels = torch.full((B, S), -100)
    labels.view(-1)[torch.arange(count) * 2] = torch.arange(count)
    head = make(kind)
    want = -oracle(hidden.double(), make(kind).double(), labels)[0]
    for loss in (nll_sum, lambda *args, **more: token_nll(*args, **more).sum()):
        got = loss(hidden, head, labels=labels, chunk=6)
        assert distance(got, want.sum())[1] <= 1e-6
        assert close(grads(got, hidden, head), grads(nll_sum(hidden, head, labels=labels), hidden, head))


def test_ignored_tokens_change_nothing():
    hidden, labels = inputs()
    head = make("linear")
    poisoned = hidden.detach().masked_fill((labels == -100).unsqueeze(-1), torch.nan).requires_grad_()
    for loss in (nll_sum, lambda *args, **more: token_nll(*args, **more).sum()):
        clean, other = loss(hidden, head, labels=labels, chunk=4), loss(poisoned, head, labels=labels, chunk=4)
        assert torch.equal(clean, other)
        got, want = grads(other, poisoned, head), grads(clean, hidden, head)
        assert all(torch.equal(got[n], want[n]) for n in want)
        assert got["hidden"][labels == -100].eq(0).all()


@pytest.mark.parametrize("share", [0, 0.7, 1])
def test_a_known_count_changes_nothing(share):
    hidden, labels = inputs(share)
    head, count = make("linear"), int((labels != -100).sum())
    counted, known = (nll_sum(hidden, head, labels=labels, num_supervised=n) for n in (None, count))
    assert torch.equal(counted, known)
    got, want = grads(known, hidden, head), grads(counted, hidden, head)
    assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize("kind", ["linear", "frozen", "lora"])
def test_nothing_supervised_is_zero_with_gradients_of_zero(kind):  # D8, N6
    hidden, labels = inputs(share=0)
    head = make(kind)
    logps, entropy = token_logps(hidden, head, labels=labels, entropy=True)
    for loss in (nll_sum(hidden, head, labels=labels), logps.sum(), (logps + entropy).sum()):
        assert loss == 0
        assert all(g.eq(0).all() for g in grads(loss, hidden, head).values())


@pytest.mark.parametrize("kind", ["linear", "lora"])
def test_hidden_states_without_a_gradient_still_train_the_head(kind):
    hidden, labels = inputs()
    head, frozen = make(kind), hidden.detach()
    params = [p for p in head.parameters() if p.requires_grad]
    for loss in (nll_sum, lambda *args, **more: token_nll(*args, **more).sum()):
        want = torch.autograd.grad(loss(hidden, head, labels=labels, chunk=4), params)
        got = torch.autograd.grad(loss(frozen, head, labels=labels, chunk=4), params)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_no_graph_in_evaluation():
    hidden, labels = inputs()
    head = make("linear")
    want = nll_sum(hidden, head, labels=labels)
    with torch.no_grad():
        assert distance(nll_sum(hidden, head, labels=labels), want)[1] <= 1e-6
        assert not token_logps(hidden, head, labels=labels).requires_grad
    detached = token_nll(hidden.detach(), make("frozen"), labels=labels)
    assert not detached.requires_grad and distance(detached.sum(), want)[1] <= 1e-6


def test_dropout_in_a_trained_head_draws_one_mask():
    """Backward projects again, and must see what forward saw: a finite difference along the gradient says so."""
    hidden, labels = inputs()
    head = make("lora")
    head.dropout = 0.5

    def loss(h):
        torch.manual_seed(5)
        return token_nll(h, head, labels=labels, chunk=4).sum()

    value = loss(hidden)
    torch.manual_seed(99)
    after = torch.get_rng_state()
    step = torch.autograd.grad(value, hidden)[0]
    assert torch.equal(torch.get_rng_state(), after)  # nothing outside noticed
    slope = (loss(hidden + 1e-3 * step) - loss(hidden - 1e-3 * step)) / 2e-3
    assert abs(slope / step.square().sum() - 1) < 1e-2


@pytest.mark.parametrize("kind", ["linear", "frozen", "lora"])
def test_bf16_is_as_near_to_the_truth_as_plain_bf16(kind):
    """Every gradient errs against fp64 no more than autograd on all logits in bf16 does (1.25: other roundings)."""
    hidden, labels = inputs(share=1.0, dtype=torch.bfloat16)
    head = make(kind).bfloat16()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_head = make(kind).bfloat16().double()
    want = grads(-oracle(exact_hidden, exact_head, labels)[0].sum() / 3, exact_hidden, exact_head)
    plain = F.cross_entropy(head(hidden).float().flatten(0, 1), labels.flatten(), reduction="sum") / 3
    noise = grads(plain, hidden, head)
    for chunk in (2, 4096):
        for loss in (nll_sum, lambda *args, **more: token_nll(*args, **more).sum()):
            got = grads(loss(hidden, head, labels=labels, chunk=chunk) / 3, hidden, head)
            for n in want:
                assert distance(got[n], want[n])[1] <= 1.25 * distance(noise[n], want[n])[1], (n, chunk)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", [token_nll, nll_sum])
def test_in_a_decoder(tied, head):
    model = decoder(tie_word_embeddings=tied)
    batch = tokens(3, 21)
    labels = labels_of(batch, 0.5)
    plain = F.cross_entropy(model(batch).transpose(1, 2), labels, reduction="none").sum()
    loss = model(batch, head=partial(head, labels=labels, chunk=7)).sum()
    got, want = gradients(model, loss), gradients(model, plain)
    assert distance(loss, plain)[1] <= 1e-6
    assert max(distance(got[n], want[n])[1] for n in want) <= 3e-6
