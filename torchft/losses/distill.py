"""How far a student's next-token distribution is from its teacher's; projected chunk by chunk, both of them.

A divergence takes log-probabilities [n, v] of student and teacher and gives nats per token, [n]. The teacher has no
gradient. Sums of it as a head of ``Decoder.forward``: `distill_sum`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchft.losses.chunked import Project, scaled, trained_leaves
from torchft.losses.likelihood import IGNORE

CHUNK = 1024  # tokens projected at a time: of 128k words half a GiB of fp32 log-probabilities for each model
Divergence = Callable[[Tensor, Tensor], Tensor]
RowLoss = Callable[[Tensor, slice], Tensor]  # (a chunk's logits [n, v], which rows they are) -> [n]


def forward_kl(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """KL(teacher || student): the student covers all that the teacher might say (https://arxiv.org/abs/1503.02531)."""
    return (teacher_logps.exp() * (teacher_logps - student_logps)).sum(-1)


def reverse_kl(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """KL(student || teacher): the student says only what the teacher might (https://arxiv.org/abs/2306.08543)."""
    return (student_logps.exp() * (student_logps - teacher_logps)).sum(-1)


def symmetric_kl(student_logps: Tensor, teacher_logps: Tensor, *, reverse_weight: float = 0.5) -> Tensor:
    """(1 - ``reverse_weight``) x `forward_kl` + ``reverse_weight`` x `reverse_kl`."""
    forward, reverse = forward_kl(student_logps, teacher_logps), reverse_kl(student_logps, teacher_logps)
    return (1 - reverse_weight) * forward + reverse_weight * reverse


def jensen_shannon(student_logps: Tensor, teacher_logps: Tensor, *, beta: float = 0.5) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student, never above ln 2:
    https://arxiv.org/abs/2306.13649, eq. 1. At 0 and 1, where that vanishes, what it is in proportion to beta and
    1 - beta near there: `forward_kl` and `reverse_kl`."""
    if beta in (0.0, 1.0):
        return reverse_kl(student_logps, teacher_logps) if beta else forward_kl(student_logps, teacher_logps)
    mixture = torch.logaddexp(student_logps + math.log1p(-beta), teacher_logps + math.log(beta))
    return beta * forward_kl(mixture, teacher_logps) + (1 - beta) * forward_kl(mixture, student_logps)


def distill_sum(
    hidden: Tensor,
    project: Project,
    *,
    labels: Tensor,
    num_supervised: int,
    teacher: Callable[[Tensor], Tensor],
    divergence: Divergence,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    vocab_size: int,
    chunk: int = CHUNK,
) -> Tensor:
    """A head: sum over the tokens of ``labels`` [b, s] that are not -100 of ``kd_weight`` x divergence + the rest x
    -log p(label), scalar fp32 in nats.

    Its gradient is complete after forward, as `nll_sum`'s is: no logits are kept, of either model.

    Args:
        num_supervised: how many tokens have a label.
        teacher: gives the teacher's logits [n, v'] of some of these tokens, by their numbers in reading order.
        temperature: of both distributions in the divergence; their difference is not multiplied by its square.
        vocab_size: words that both models know; what either has behind them is padding.
    """
    h = chosen(hidden, labels=labels, count=num_supervised)
    y = chosen(labels[..., None], labels=labels, count=num_supervised)[:, 0]
    numbers = torch.arange(num_supervised, device=h.device)

    def loss_of(logits: Tensor, rows: slice) -> Tensor:
        losses = torch.zeros((), device=logits.device)
        logits = _wide(logits[:, :vocab_size])
        if kd_weight > 0:
            with torch.no_grad():
                theirs = _wide(teacher(numbers[rows])[:, :vocab_size] / temperature).log_softmax(-1)
            losses = losses + kd_weight * divergence((logits / temperature).log_softmax(-1), theirs)
        if kd_weight < 1:
            logps = logits.log_softmax(-1).gather(1, y[rows, None])[:, 0]
            losses = losses - (1 - kd_weight) * logps
        return losses

    return chunked_sum(h, project, loss_of, chunk=chunk)


def top_k_logps(
    hidden: Tensor, project: Project, *, labels: Tensor, count: int, k: int, temperature: float, vocab_size: int
) -> Tensor:
    """A head: of each of the ``count`` tokens with a label the ids of the ``k`` likeliest next words and their log p,
    [n, 2, k + 1] fp32; last the id -1, and log p of all other words together. No gradient."""
    found = []
    with torch.no_grad():
        for part in chosen(hidden, labels=labels, count=count).split(CHUNK):
            logits = _wide(project(part)[:, :vocab_size] / temperature)
            ids = logits.topk(k, dim=-1).indices
            logps = bucket_logps(logits, ids)
            found.append(torch.stack([torch.cat([ids, ids.new_full((len(ids), 1), -1)], 1).to(logps.dtype), logps], 1))
    return torch.cat(found)


def bucket_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of the words ``ids`` [n, k] < v, and of all others together: [n, k + 1] of logits [n, v]."""
    total = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(1, ids), rest], dim=1) - total


def distill_top_k_sum(
    hidden: Tensor,
    project: Project,
    *,
    labels: Tensor,
    num_supervised: int,
    teacher: Tensor,
    divergence: Divergence,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    vocab_size: int,
    chunk: int = CHUNK,
) -> Tensor:
    """`distill_sum` with what `top_k_logps` gave of the teacher at the same temperature, [n, 2, k + 1].

    The divergence is that of the k + 1 events "this word" and "another one", at most that of all words.
    """
    h = chosen(hidden, labels=labels, count=num_supervised)
    y = chosen(labels[..., None], labels=labels, count=num_supervised)[:, 0]

    def loss_of(logits: Tensor, rows: slice) -> Tensor:
        logits = _wide(logits[:, :vocab_size])
        ids = teacher[rows, 0, :-1].long()
        kd = divergence(bucket_logps(logits / temperature, ids), teacher[rows, 1].to(logits.dtype))
        return kd_weight * kd - (1 - kd_weight) * logits.log_softmax(-1).gather(1, y[rows, None])[:, 0]

    return chunked_sum(h, project, loss_of, chunk=chunk)


def chosen(values: Tensor, *, labels: Tensor, count: int) -> Tensor:
    """``values`` [b, s, ...] where ``labels`` [b, s] are not -100, which are ``count``, in reading order: [n, ...]."""
    places = (labels != IGNORE).flatten().nonzero_static(size=count).squeeze(1)
    return values.flatten(0, 1).index_select(0, places)


def chunked_sum(h: Tensor, project: Project, loss_of: RowLoss, *, chunk: int) -> Tensor:
    """Sum over rows h [t, d] of ``loss_of(project(h))``, scalar; differentiable for h and what ``project`` trains."""
    params = trained_leaves(project, h)
    if torch.is_grad_enabled() and (h.requires_grad or params):
        return _ChunkedSum.apply(h, project, loss_of, chunk, *params)
    parts = [slice(start, start + chunk) for start in range(0, len(h), chunk)]
    with torch.no_grad():
        return sum((loss_of(project(h[part]), part).sum() for part in parts), torch.zeros((), device=h.device))


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, project: Project, loss_of: RowLoss, chunk: int, *params: Tensor) -> Tensor:
        grad_h = torch.zeros_like(h) if ctx.needs_input_grad[0] else None
        totals = [torch.zeros(p.shape, dtype=_wide_dtype(p), device=p.device) for p in params]
        value = torch.zeros((), device=h.device, dtype=_wide_dtype(h))
        for start in range(0, len(h), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                rows = h[part].detach().requires_grad_(grad_h is not None)
                loss = loss_of(project(rows), part).sum()
            inputs = [rows, *params] if grad_h is not None else list(params)
            grads = list(torch.autograd.grad(loss, inputs))
            if grad_h is not None:
                grad_h[part] = grads.pop(0)
            for total, grad in zip(totals, grads):
                total += grad
            value += loss.detach()
        ctx.save_for_backward(grad_h, *(total.to(p.dtype) for total, p in zip(totals, params)))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *of_params = (None if g is None else scaled(g, upstream) for g in ctx.saved_tensors)
        return of_hidden, None, None, None, *of_params


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))
