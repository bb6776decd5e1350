"""Chunked token likelihoods against F.cross_entropy on all logits, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from oracles import distance, gradients
from tiny import decoder, tokens

from torchft.losses.likelihood import token_nll


def labels_of(batch, share):
    """Shifted labels with about ``share`` of the tokens trained on, unevenly over the rows."""
    labels = batch.roll(-1, dims=1)
    keep = torch.rand(batch.shape, generator=torch.Generator().manual_seed(1)) < share
    keep[0, :] = False
    return labels.masked_fill(~keep, -100)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("share", "chunk"), [(1.0, 1024), (1.0, 7), (0.5, 16), (0.3, 1), (0.02, 5)])
def test_chunks_are_plain_cross_entropy(tied, share, chunk):
    model = decoder(tie_word_embeddings=tied)
    batch = tokens(3, 21)
    labels = labels_of(batch, share)
    plain = F.cross_entropy(model(batch).transpose(1, 2), labels, reduction="none")
    chunked = model(batch, head=lambda h, project: token_nll(h, project, labels=labels, chunk=chunk))
    assert chunked.shape == labels.shape and chunked.dtype == torch.float32
    assert (chunked[labels == -100] == 0).all()
    assert distance(chunked, plain)[1] <= 1e-6
    got, want = gradients(model, chunked.sum()), gradients(model, plain.sum())
    assert max(distance(got[n], want[n])[1] for n in want) <= 3e-6  # measured noise 9e-7


def test_nothing_supervised_is_zero_not_nan():  # D8, N6
    model = decoder()
    batch = tokens(2, 9)
    nll = model(batch, head=lambda h, project: token_nll(h, project, labels=torch.full_like(batch, -100)))
    assert torch.equal(nll, torch.zeros(2, 9))
    assert all(g.eq(0).all() for g in gradients(model, nll.sum()).values())


def test_at_most_one_chunk_of_logits():
    model, sizes = decoder(), []
    batch = tokens(2, 20)
    labels = labels_of(batch, 1.0)

    def head(hidden, project):
        def counted(x):
            sizes.append(len(x))
            return project(x)

        return token_nll(hidden, counted, labels=labels, chunk=6)

    model(batch, head=head).sum().backward()
    assert max(sizes) == 6
    assert sum(sizes) == 2 * 20  # only the 20 supervised tokens, forward and again in backward


def test_loss_of_a_bf16_model_is_fp32():
    model = decoder().bfloat16()
    batch = tokens(2, 20)
    labels = labels_of(batch, 1.0)
    nll = model(batch, head=lambda h, project: token_nll(h, project, labels=labels))
    logits = model(batch).float()
    assert nll.dtype == torch.float32
    assert distance(nll, F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"))[1] <= 1e-2
