"""Contrastive losses in fp64 against sentence-transformers' formulas written out, and where embeddings are read."""

import pytest
import torch
import torch.nn.functional as F

from torchft.losses.contrastive import contrastive, info_nce, pooled, ranks_of_own


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def loop(embedded, temperature, symmetric):
    """One query, one document, one exponential at a time."""
    cos = lambda a, b: (a @ b) / (a.norm() * b.norm())  # noqa: E731
    m, n = embedded.shape[:2]
    total = []
    for i in range(m):
        own = (cos(embedded[i, 0], embedded[i, 1]) / temperature).exp()
        others = sum((cos(embedded[i, 0], embedded[j, k]) / temperature).exp() for j in range(m) for k in range(1, n))
        loss = -(own / others).log()
        if symmetric:
            queries = sum((cos(embedded[j, 0], embedded[i, 1]) / temperature).exp() for j in range(m))
            loss = (loss - (own / queries).log()) / 2
        total.append(loss)
    return torch.stack(total)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("negatives", [0, 2])
def test_values_and_gradients(negatives, symmetric):
    embedded = randn(5, 2 + negatives, 12)
    got = contrastive(embedded, embedded, 0, temperature=0.3, symmetric=symmetric)
    want = loop(embedded, 0.3, symmetric)
    assert got.shape == (5,) and (got - want).abs().max() <= 1e-10
    grads = [torch.autograd.grad(x.mean(), embedded, retain_graph=True)[0] for x in (got, want)]
    assert (grads[0] - grads[1]).abs().max() <= 1e-10 and grads[1].abs().max() > 1e-2
    other = contrastive(embedded, embedded, 0, temperature=0.2, symmetric=symmetric)
    assert (other - want).abs().max() > 1e-2


def test_widths_are_summed():
    embedded = randn(4, 3, 12)
    want = loop(embedded[..., :4], 0.1, False) + loop(embedded, 0.1, False)
    assert (contrastive(embedded, embedded, 0, temperature=0.1, dims=[4, 12]) - want).abs().max() <= 1e-10


@pytest.mark.parametrize("symmetric", [False, True])
def test_parts_of_ranks_are_the_whole(symmetric):
    """Two ranks with 2 and 3 samples: their losses, and the sum of their gradients."""
    embedded = randn(5, 3, 8)
    parts = [contrastive(embedded[a:b], embedded, a, temperature=0.2, symmetric=symmetric) for a, b in ((0, 2), (2, 5))]
    want = loop(embedded, 0.2, symmetric)
    assert (torch.cat(parts) - want).abs().max() <= 1e-10
    grads = [torch.autograd.grad(x.sum(), embedded, retain_graph=True)[0] for x in (*parts, want)]
    assert (grads[0] + grads[1] - grads[2]).abs().max() <= 1e-10


def test_a_perfect_match_among_opposites():
    x = torch.eye(3, dtype=torch.float64)
    got = info_nce(x, x, torch.arange(3), temperature=1.0)
    assert torch.allclose(got, torch.full((3,), (2 * torch.tensor(-1.0).exp() + 1).log(), dtype=torch.float64))


def test_ranks():
    documents = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    queries = torch.tensor([[2.0, 0.1], [1.0, 0.0], [5.0, 1.0]])
    assert ranks_of_own(queries, documents).tolist() == [1, 2, 3]
    assert ranks_of_own(queries[1:], documents, 1).tolist() == [2, 3]


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_pooled(pooling):
    """Documents of 3 and 4 tokens and padding in one row, one of 8 in another."""
    hidden = randn(2, 8, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
    places = {0: hidden[0, :3], 1: hidden[0, 3:7], 3: hidden[1]}
    read = {"cls": lambda x: x[0], "mean": lambda x: x.mean(0), "last": lambda x: x[-1]}[pooling]
    want = torch.stack(
        [torch.stack([read(places[0]), read(places[1])]), torch.stack([read(places[3]), read(places[0])])]
    )
    how = {"pooling": pooling, "positions": positions, "count": 4, "documents_of": torch.tensor([[0, 1], [3, 0]])}
    got = pooled(hidden, None, **how)
    assert got.shape == (2, 2, 6) and (got - want).abs().max() < 1e-6
    grads = [
        torch.autograd.grad(F.normalize(x.double(), dim=-1)[..., 0].sum(), hidden, retain_graph=True)[0]
        for x in (got, want)
    ]
    assert (grads[0] - grads[1]).abs().max() < 1e-6
    rows = pooled(hidden, None, pooling=pooling, positions=None, count=2, documents_of=torch.tensor([[0, 1]]))
    assert (rows[0] - torch.stack([read(hidden[0]), read(hidden[1])])).abs().max() < 1e-6


@pytest.mark.parametrize("symmetric", [False, True])
def test_sentence_transformers(symmetric):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    mean = losses.MultipleNegativesRankingLoss(
        None, scale=1 / 0.2, directions=directions, partition_mode="per_direction"
    )
    embedded = randn(6, 4, 16)
    want = mean.compute_loss_from_embeddings(list(embedded.unbind(1)), None)
    got = contrastive(embedded, embedded, 0, temperature=0.2, symmetric=symmetric).mean()
    assert abs(got - want) <= 1e-10
    grads = [torch.autograd.grad(x, embedded, retain_graph=True)[0] for x in (got, want)]
    assert (grads[0] - grads[1]).abs().max() <= 1e-10
