"""Token likelihoods as heads of ``Decoder.forward``, projected chunk by chunk: all logits never exist at once.

Shapes: b batch, s sequence, d model dim, v vocabulary. ``labels[i]`` is the token to predict *at* i (already shifted);
ignored tokens are dropped before they are projected. What ``project`` may be: see ``chunked``.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from torchft.losses.chunked import Head, Logps, NLLSum, Project, trained_leaves, values

IGNORE = -100  # the label of a token that is not trained on
CHUNK = 4096  # tokens projected at a time: 1 GiB of bf16 logits for 128k words


def token_nll(hidden: Tensor, project: Project, *, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """-log p(label) [b, s] fp32 in nats, 0 where ``labels`` [b, s] is -100. Differentiable as ``token_logps``.

    For the sum of them prefer ``nll_sum``, which trains a head at less cost.
    """
    return 0 - token_logps(hidden, project, labels=labels, chunk=chunk)  # not -x: ignored tokens would be -0


def nll_sum(
    hidden: Tensor, project: Project, *, labels: Tensor, num_supervised: int | None = None, chunk: int = CHUNK
) -> Tensor:
    """Sum of -log p(label) over the tokens of ``labels`` [b, s] that are not -100: scalar fp32 in nats.

    ``num_supervised``: how many these are; None: counted, for which the host waits for the device.

    The training loss. Its gradient is complete after forward, that of a trained head too, and backward only scales it:
    2 matrix products of t x d x v for t supervised tokens, 3 with a trained head.
    """
    h, y, _ = _supervised(hidden, labels, num_supervised)
    head = Head(project=project, chunk=chunk, temperature=1.0, entropy=False)
    params = trained_leaves(project, h)
    if _needs_grad(h, params):
        return NLLSum.apply(h, y, head, *params)
    return (-values(head, h, y)[0]).sum()


@overload
def token_logps(
    hidden: Tensor,
    project: Project,
    *,
    labels: Tensor,
    temperature: float = 1.0,
    entropy: Literal[False] = False,
    chunk: int = CHUNK,
) -> Tensor: ...


@overload
def token_logps(
    hidden: Tensor,
    project: Project,
    *,
    labels: Tensor,
    temperature: float = 1.0,
    entropy: Literal[True],
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]: ...


def token_logps(
    hidden: Tensor,
    project: Project,
    *,
    labels: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int = CHUNK,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(label) [b, s] fp32 in nats with p = softmax(logits / temperature), 0 where ``labels`` [b, s] is -100.

    With ``entropy`` also that of p, [b, s] fp32 in nats. Both are differentiable, each token with its own upstream
    gradient. Cost in matrix products of t x d x v, for t supervised tokens: with a frozen head 2, both in forward; with
    a trained head 1 in forward and 3 in backward. A gradient through the entropy adds 2 to a frozen head's; an entropy
    that is only logged adds none.
    """
    h, y, rows = _supervised(hidden, labels)
    head = Head(project=project, chunk=chunk, temperature=temperature, entropy=entropy)
    params = trained_leaves(project, h)
    logp, ent = Logps.apply(h, y, head, *params) if _needs_grad(h, params) else values(head, h, y)
    logps = _at(rows, logp, labels)
    return logps if ent is None else (logps, _at(rows, ent, labels))


@torch.no_grad()
def token_collision_logps(hidden: Tensor, project: Project, *, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """log sum p^2 [b, s] fp32 in nats, how likely two draws agree; 0 where ``labels`` [b, s] is -100. No gradient."""
    h, _, rows = _supervised(hidden, labels)
    collisions = [(2 * project(part).float().log_softmax(-1)).logsumexp(-1) for part in h.split(chunk)]
    return _at(rows, torch.cat(collisions), labels)


def _supervised(hidden: Tensor, labels: Tensor, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [t, d] and labels [t] of the tokens to train on, and their places [t] among all b * s.

    How many there are, ``count``, the host must know: without it this is the one wait for the device in here.
    """
    chosen = (labels != IGNORE).flatten()
    rows = (chosen.nonzero() if count is None else chosen.nonzero_static(size=count)).squeeze(1)
    h, y = hidden.flatten(0, -2), labels.flatten()
    if len(rows) < len(y):
        h, y = h.index_select(0, rows), y.index_select(0, rows)
    return h, y, rows


def _needs_grad(h: Tensor, params: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and (h.requires_grad or bool(params))


def _at(rows: Tensor, values: Tensor, labels: Tensor) -> Tensor:
    """``values`` [t] at ``rows`` of a tensor in the shape of ``labels``, 0 elsewhere."""
    zeros = torch.zeros(labels.numel(), dtype=values.dtype, device=values.device)
    return zeros.index_copy(0, rows, values).view(labels.shape)
