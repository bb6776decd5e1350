"""Values and gradients of the rows of a projection that is never whole: the core under ``likelihood``.

The forward pass already computes the gradient, while it has a chunk's logits: projecting, grad hidden and (of a trained
head) grad weight are then all the matrix products there are, where recomputing in backward projects twice. The idea is
that of Liger (https://arxiv.org/abs/2410.10989).

t tokens to train on, d model dim, v vocabulary. ``project`` [t, d] -> [t, v] may be any differentiable function: a
linear layer, a tied embedding, LoRA, a soft cap after it. Its last operation must not keep its own output for backward
(tanh, exp), because logits turn into their gradient in place; PyTorch raises for one that does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchft.kernels.nll import row_logps

Project = Callable[[Tensor], Tensor]
Upstream = tuple[Tensor, Tensor | None]  # gradients of the log-probabilities and of the entropies, [t] fp32 each


@dataclass(frozen=True, kw_only=True)
class Head:
    project: Project
    chunk: int  # tokens projected at a time
    temperature: float
    entropy: bool  # whether to compute it


class NLLSum(torch.autograd.Function):
    """(h [t, d], labels [t], head, *trained leaves of head) -> sum of -log p(label), scalar fp32."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, y: Tensor, head: Head, *params: Tensor) -> Tensor:
        minus = torch.full(y.shape, -1.0, device=y.device)
        logp, _, grads = gradients(head, h, y, params, (minus, None), of_hidden=ctx.needs_input_grad[0])
        ctx.save_for_backward(*grads)  # frees them after backward, even if somebody keeps the loss
        return (-logp).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *of_params = (None if g is None else scaled(g, upstream) for g in ctx.saved_tensors)
        return of_hidden, None, None, *of_params


class Logps(torch.autograd.Function):
    """(h [t, d], labels [t], head, *trained leaves of head) -> log p(label) and entropy, [t] fp32 each, or None.

    A token's gradient for h is its own upstream times what forward computed. The gradient of a weight mixes tokens, so
    that it has to wait for their upstream, as has one that comes through the entropy: those project again in backward.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, y: Tensor, head: Head, *params: Tensor) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs nothing in backward
        ctx.head, ctx.params, ctx.rng = head, params, _rng_state(h.device)
        if params:
            (logp, ent), of_hidden = values(head, h, y), None
        else:
            upstream = torch.ones(y.shape, device=y.device), None
            logp, ent, (of_hidden,) = gradients(head, h, y, (), upstream, of_hidden=True)
        may_project_again = bool(params) or head.entropy
        ctx.save_for_backward(h if may_project_again else None, y, of_hidden)
        return logp, ent

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        h, y, of_hidden = ctx.saved_tensors
        if grad_logp is None:
            grad_logp = torch.zeros(y.shape, device=y.device)
        if grad_entropy is None and of_hidden is not None:
            return scaled(of_hidden, grad_logp), None, None
        upstream, wanted = (grad_logp, grad_entropy), ctx.needs_input_grad[0]
        with torch.random.fork_rng([h.device] if h.is_cuda else []):
            _set_rng_state(h.device, ctx.rng)  # a dropout in the head draws forward's masks again
            _, _, (of_hidden, *of_params) = gradients(ctx.head, h, y, ctx.params, upstream, of_hidden=wanted)
        return of_hidden, None, None, *of_params


def values(head: Head, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """log p(label) and, if the head computes it, entropy: [t] fp32 each, without a graph."""
    with torch.no_grad():
        chunks = zip(h.split(head.chunk), y.split(head.chunk))  # of no token: one empty chunk
        return _joined([_rows(head, head.project(a), b) for a, b in chunks])


def gradients(
    head: Head, h: Tensor, y: Tensor, params: tuple[Tensor, ...], upstream: Upstream, *, of_hidden: bool
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """``values``, and the gradients of h [t, d] (None unless ``of_hidden``) and ``params``, each in its own dtype.

    Those of ``params`` are summed over chunks in fp32 (4 bytes a weight, at a time when few other gradients exist) and
    rounded once; in bf16 every chunk would round all that came before it.
    """
    grad_h = torch.empty_like(h) if of_hidden else None
    rows, totals = [], list[Tensor]()
    for start in range(0, max(len(h), 1), head.chunk):
        part = slice(start, start + head.chunk)
        chunk_upstream = (upstream[0][part], None if upstream[1] is None else upstream[1][part])
        chunk_rows, grads = _chunk(head, h[part], y[part], params, chunk_upstream, of_hidden=of_hidden)
        rows.append(chunk_rows)
        if grad_h is not None:
            grad_h[part] = grads.pop(0)
        if not totals:
            totals = grads if len(h) <= head.chunk else [g.float() for g in grads]
        else:
            for total, g in zip(totals, grads):
                total += g
    return *_joined(rows), [grad_h, *(total.to(p.dtype) for total, p in zip(totals, params))]


def trained_leaves(project: Project, h: Tensor) -> list[Tensor]:
    """The leaves that ``project`` hands gradients to, found in the graph of one token's logits.

    They are arguments of the functions above, so that autograd accumulates (and FSDP reduces) their gradients.
    """
    if not torch.is_grad_enabled():
        return []
    pending, seen, leaves = [project(h[:1].detach()).grad_fn], set(), []
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.append(node.variable)  # type: ignore[attr-defined]  # an AccumulateGrad has it
        pending += [following for following, _ in node.next_functions]
    return leaves


def _chunk(
    head: Head, h: Tensor, y: Tensor, params: tuple[Tensor, ...], upstream: Upstream, *, of_hidden: bool
) -> tuple[tuple[Tensor, Tensor | None], list[Tensor]]:
    """Values and gradients of one chunk. Its logits die with this call, before the next chunk's are made."""
    with torch.enable_grad():
        h = h.detach().requires_grad_(of_hidden)
        logits = head.project(h)
    grad = logits.detach()  # the same memory
    rows = _rows(head, grad, y, upstream)
    inputs = [h, *params] if of_hidden else list(params)
    return rows, list(torch.autograd.grad(logits, inputs, grad))


def _rows(head: Head, logits: Tensor, y: Tensor, upstream: Upstream | None = None) -> tuple[Tensor, Tensor | None]:
    grad_logp, grad_entropy = upstream or (None, None)
    return row_logps(
        logits,
        y,
        temperature=head.temperature,
        entropy=head.entropy,
        grad_logp=grad_logp,
        grad_entropy=grad_entropy,
    )


def _joined(rows: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    logps, entropies = zip(*rows)
    return torch.cat(logps), None if entropies[0] is None else torch.cat(entropies)


def scaled(grad: Tensor, by: Tensor) -> Tensor:
    """``grad`` [t, ...] times ``by`` fp32, [t] or a scalar, in the dtype of ``grad``.

    The product is fp32: a scalar would be cast to bf16 first, and its rounding change the length of all the gradient.
    """
    by = by.reshape(-1, *[1] * (grad.ndim - 1))
    return torch.mul(grad, by, out=torch.empty_like(grad))


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_rng_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    on_cpu, on_gpu = state
    torch.set_rng_state(on_cpu)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, device)
