"""The bars of numeric parity, and our model against transformers' on logits, loss and every gradient."""

from functools import partial

import torch

from torchft.losses.likelihood import token_nll

MAX_ABS, RELATIVE = 1e-4, 1e-5


def distance(got, want):
    """(max |got - want|, relative L2)."""
    delta = (got - want).double()
    return delta.abs().max().item(), (delta.norm() / want.double().norm().clamp_min(1e-12)).item()


def violations(pairs):
    """The named pairs (ours, theirs) that miss the bars."""
    distances = {name: distance(*pair) for name, pair in pairs.items()}
    return {n: d for n, d in distances.items() if not (d[0] <= MAX_ABS and d[1] <= RELATIVE)}


def gradients(model, loss):
    """Gradient of every parameter by name."""
    params = dict(model.named_parameters())
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()))))


def shifted(labels):
    """Labels as transformers takes them -> as ours: the token to predict at each place."""
    return torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), dim=1)


def mean_nll(model, tokens, labels, positions=None, *, count=None):
    """The training loss of shifted labels: mean over these supervised tokens, or over ``count`` of a larger batch."""
    nll = model(tokens, positions, head=partial(token_nll, labels=labels))
    return nll.sum() / (count or (labels != -100).sum())


def against_transformers(ours, theirs, tokens):
    """Logits, loss and gradients of both models by name; a third of the labels, the first ones, is not trained on."""
    labels = tokens.clone()
    labels[:, : tokens.shape[1] // 3] = -100
    out = theirs(tokens, labels=labels)
    loss = mean_nll(ours, tokens, shifted(labels))
    rename = ours.hub_format.names.rename
    got = {rename(name): grad for name, grad in gradients(ours, loss).items()}
    want = gradients(theirs, out.loss)
    assert got.keys() == want.keys()
    pairs = {"logits": (ours(tokens), out.logits), "loss": (loss, out.loss)}
    return pairs | {name: (got[name], want[name]) for name in want}
