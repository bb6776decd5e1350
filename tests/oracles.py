"""The bars of numeric parity, and our model against transformers' on logits, loss and every gradient."""

from functools import partial

import torch

from torchft import models
from torchft.losses.likelihood import token_nll

MAX_ABS, RELATIVE = 1e-4, 1e-5
# Gradients of DeltaNet's gates nearly cancel (1e-2 of the others): some processors are 1.5e-5 apart.
CANCELLING, OF_CANCELLING = ("A_log", "dt_bias"), 4e-5


def distance(got, want):
    """(max |got - want|, relative L2)."""
    delta = (got - want).double()
    return delta.abs().max().item(), (delta.norm() / want.double().norm().clamp_min(1e-12)).item()


def violations(pairs):
    """The named pairs (ours, theirs) that miss the bars."""
    distances = {name: distance(*pair) for name, pair in pairs.items()}
    bars = {name: OF_CANCELLING if name.endswith(CANCELLING) else RELATIVE for name in pairs}
    return {n: d for n, d in distances.items() if not (d[0] <= MAX_ABS and d[1] <= bars[n])}


def gradients(model, loss):
    """Gradient of every parameter by name, but for those that are not trained by gradients."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()))))


def shifted(labels):
    """Labels as transformers takes them -> as ours: the token to predict at each place."""
    return torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), dim=1)


def mean_nll(model, tokens, labels, positions=None, *, count=None):
    """The training loss of shifted labels: mean over these supervised tokens, or over ``count`` of a larger batch."""
    nll = model(tokens, positions, head=partial(token_nll, labels=labels))
    return nll.sum() / (count or (labels != -100).sum())


def supervised(tokens):
    """Labels as transformers takes them; the first third is not trained on."""
    labels = tokens.clone()
    labels[:, : tokens.shape[1] // 3] = -100
    return labels


def in_our_names(theirs, folder, gradients):
    """transformers' gradients as a checkpoint that our loader reads: by our names and in our shapes."""
    with torch.no_grad():
        weights = {name: p.clone() for name, p in theirs.named_parameters()}
        for name, p in theirs.named_parameters():
            p.copy_(gradients[name])
        theirs.save_pretrained(folder)
        for name, p in theirs.named_parameters():
            p.copy_(weights[name])
    return {n: p for n, p in models.load(folder, dtype=torch.float32).named_parameters() if p.requires_grad}


def against_transformers(ours, theirs, tokens, folder):
    """Logits, loss and gradients of both models, by our names. ``folder`` is for transformers' gradients."""
    labels = supervised(tokens)
    out = theirs(tokens, labels=labels)
    loss = mean_nll(ours, tokens, shifted(labels))
    got, want = gradients(ours, loss), in_our_names(theirs, folder, gradients(theirs, out.loss))
    assert got.keys() == want.keys()
    pairs = {"logits": (ours(tokens), out.logits), "loss": (loss, out.loss)}
    return pairs | {name: (got[name], want[name]) for name in want}
