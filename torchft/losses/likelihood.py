"""Token likelihoods as heads of ``Decoder.forward``, projected chunk by chunk: all logits never exist at once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # the label of a token that is not trained on


def token_nll(hidden: Tensor, project: Callable[[Tensor], Tensor], *, labels: Tensor, chunk: int = 1024) -> Tensor:
    """-log p(label) [b, s] fp32 in nats, 0 where ``labels`` [b, s] is -100.

    ``labels[i]`` is the token to predict *at* i (already shifted). Only supervised tokens of ``hidden`` [b, s, d] are
    projected, ``chunk`` at a time, and logits are recomputed in backward: at most chunk x v of them are alive.
    """
    keep = labels != IGNORE
    h, y = hidden[keep], labels[keep]  # [t, d], [t]
    losses = [checkpoint(_nll, a, b, project, use_reentrant=False) for a, b in zip(h.split(chunk), y.split(chunk))]
    return torch.zeros(labels.shape, device=hidden.device).masked_scatter(keep, torch.cat(losses))


def _nll(hidden: Tensor, labels: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(project(hidden).float(), labels, reduction="none")
