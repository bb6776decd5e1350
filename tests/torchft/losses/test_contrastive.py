"""Contrastive losses in fp64 against sentence-transformers' formulas written out, and where embeddings are read."""

import pytest
import torch
import torch.nn.functional as F

from torchft.losses.contrastive import contrastive, document_keys, info_nce, pooled, ranks_of_own, repeated


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def loop(embedded, temperature, symmetric, names=None):
    """One query, one document, one exponential at a time. ``names`` of the texts: same ones are no negatives."""
    cos = lambda a, b: (a @ b) / (a.norm() * b.norm())  # noqa: E731
    m, n = embedded.shape[:2]
    names = names or [[(i, k) for k in range(n)] for i in range(m)]
    total = []
    for i in range(m):
        counts = lambda j, k, i=i: (  # noqa: E731
            (i, 1) == (j, k) or (names[i][1] != names[j][k] and not (k == 1 and names[i][0] == names[j][0]))
        )
        own = (cos(embedded[i, 0], embedded[i, 1]) / temperature).exp()
        others = sum(
            (cos(embedded[i, 0], embedded[j, k]) / temperature).exp()
            for j in range(m)
            for k in range(1, n)
            if counts(j, k)
        )
        loss = -(own / others).log()
        if symmetric:
            queries = sum((cos(embedded[j, 0], embedded[i, 1]) / temperature).exp() for j in range(m) if counts(j, 1))
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


NAMES = [["q", "a", "x"], ["r", "b", "a"], ["q", "c", "y"], ["s", "a", "z"], ["t", "d", "q"]]


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_same_text_is_no_negative(symmetric):
    """The document of another query, or a negative of it; another document of the same query. On two ranks, too."""
    embedded = randn(5, 3, 8)
    texts = sorted({name for row in NAMES for name in row})
    keys = torch.tensor([[texts.index(name) for name in row] for row in NAMES])
    how = {"temperature": 0.2, "symmetric": symmetric, "keys": keys}
    parts = [contrastive(embedded[a:b], embedded, a, **how) for a, b in ((0, 2), (2, 5))]
    want = loop(embedded, 0.2, symmetric, NAMES)
    assert (torch.cat(parts) - want).abs().max() <= 1e-10
    grads = [torch.autograd.grad(x.sum(), embedded, retain_graph=True)[0] for x in (*parts, want)]
    assert (grads[0] + grads[1] - grads[2]).abs().max() <= 1e-10
    assert (want - loop(embedded, 0.2, symmetric)).abs().max() > 1e-2


def test_keys_are_of_the_tokens():
    """In packed rows, in rows of one document, wherever they stand; the order of tokens counts, and their number."""
    texts = [[5, 6, 7], [5, 6, 7], [7, 6, 5], [5, 6], [5, 6, 7, 0]]
    row = torch.tensor([[token for text in texts for token in text]])
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    keys = document_keys(row, positions=positions, count=5, documents_of=torch.arange(5)[:, None]).flatten()
    assert keys[0] == keys[1] and len(keys.unique()) == 4
    alone = document_keys(torch.tensor([[5, 6, 7]]), positions=None, count=1, documents_of=torch.tensor([[0]]))
    assert alone.item() == keys[0]
    many = torch.randint(0, 30_000, (2000, 8), generator=torch.Generator().manual_seed(0))
    keys = document_keys(many, positions=None, count=2000, documents_of=torch.arange(2000)[:, None])
    assert len(keys.unique()) == len({tuple(text) for text in many.tolist()})
    low = keys.flatten() & 0xFFFF  # as evenly spread as random numbers, in which 2000 of 65536 meet 30 times
    assert 2000 - len(low.unique()) < 60


def test_ranks_leave_out_the_same_text():
    documents = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    queries = torch.tensor([[2.0, 0.1], [0.1, 2.0], [1.0, 0.9]])
    same = repeated(torch.tensor([[1, 7], [2, 7], [3, 8]]), 0, 3)
    assert same.tolist() == [[False, True, False], [True, False, False], [False, False, False]]
    assert ranks_of_own(queries, documents + torch.tensor([[0.0, 0.0], [0.0, 1e-3], [0.0, 0.0]])).tolist() == [2, 2, 3]
    assert ranks_of_own(
        queries, documents + torch.tensor([[0.0, 0.0], [0.0, 1e-3], [0.0, 0.0]]), left_out=same
    ).tolist() == [1, 2, 3]


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
