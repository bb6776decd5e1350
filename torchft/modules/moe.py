"""Mixture of experts (https://arxiv.org/abs/1701.06538): each token goes through its own few of many gated MLPs.

Shapes: b batch, s sequence, d model dim, e experts, t tokens (b * s), k experts per token, n = t * k rows that experts
compute, f an expert's width. Nothing waits for the device: how many rows an expert gets stays there, in ``offsets``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchft.modules.grouped import Routes, StackedLinear, collect, pick, spread
from torchft.modules.routers import Router
from torchft.token_shards import gather, sum_parts


@dataclass(frozen=True)
class ExpertShards:
    """Which of the ranks that share a layer's experts this one is."""

    size: int
    rank: int
    group: str  # name of the process group

    def of_all(self, x: Tensor) -> Tensor:
        """[t, ...] of each rank -> [size * t, ...]; gradients are summed."""
        return gather(x, self.size, self.group).flatten(0, 1)

    def sum_own(self, x: Tensor) -> Tensor:
        """[size * t, ...], a summand on each rank -> the sum, of which each gets its own tokens, [t, ...]."""
        return sum_parts(x.unflatten(0, (self.size, -1)), self.size, self.group)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 f], the gate's half first -> [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


class Experts(nn.Module):
    """The gated MLPs of all experts: down(act(gate_up(x))), with stacked weights [e, 2 f, d] and [e, d, f].

    ``weighs_input``: what goes into an expert is scaled instead of what comes out (Llama 4).
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        act: Callable[[Tensor], Tensor] = swiglu,
        bias: bool = False,
        weighs_input: bool = False,
    ) -> None:
        super().__init__()
        self.gate_up_proj = StackedLinear(num_experts, dim, 2 * hidden_dim, bias=bias)
        self.down_proj = StackedLinear(num_experts, hidden_dim, dim, bias=bias)
        self.act, self.weighs_input = act, weighs_input

    def forward(self, x: Tensor, weights: Tensor, routes: Routes) -> Tensor:
        """The weighted sum of each token's experts: x [t, d], weights [t, k] -> [t, d]."""
        rows, scale = spread(x, routes), pick(weights.reshape(-1, 1), routes.order)  # [n, d], [n, 1]
        if self.weighs_input:
            rows = self.down_proj(self.act(self.gate_up_proj(rows * scale, routes.offsets)), routes.offsets)
        else:
            rows = self.down_proj(self.act(self.gate_up_proj(rows, routes.offsets)), routes.offsets, scale)
        return collect(rows, routes, num_tokens=len(x))


class SharedGate(nn.Module):
    """How much of the shared experts a token takes: a sigmoid, [t, d] -> [t, 1]. No nn.Linear: as ``Router``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(nn.functional.linear(x, self.weight))


class MoE(nn.Module):
    """Each token's experts, weighted by the router, and the shared experts that all tokens use; [b, s, d] -> [b, s, d].

    ``shared`` is a gated MLP; its output is scaled by a sigmoid if it ``has_shared_gate`` (Qwen).
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        shared: nn.Module | None = None,
        has_shared_gate: bool = False,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.shared_gate = SharedGate(router.weight.shape[1]) if has_shared_gate else None
        self.balance = 0.0  # weight of this layer's load-balancing loss: training/routing.py
        self.shards: ExpertShards | None = None  # other ranks hold other experts: adapters/expert_parallel.py
        self.counts: Tensor | None = None  # [e] int64 to which forward adds the tokens of each expert: likewise

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)  # [t, d]
        logits = self.router(flat)  # [t, e]
        weights, chosen = self.router.choose(logits)  # [t, k]
        learns = self.training and torch.is_grad_enabled()
        if self.counts is not None and learns:
            self.counts.add_(expert_counts(chosen, logits.shape[1]))
        if self.balance and learns:
            loss = balance_loss(self.router.probabilities(logits), chosen)
            weights = _WithLoss.apply(weights, self.balance * loss)
        out = self._routed(flat, weights.type_as(x), chosen)
        if self.shared is not None:
            every = self.shared(flat)
            out = out + (every if self.shared_gate is None else self.shared_gate(flat) * every)
        return out.view(x.shape)

    def _routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Sum over each token's experts: x [t, d], weights and ``chosen`` experts [t, k] -> [t, d].

        Where other ranks hold other experts, all their tokens come here first, rows of this rank's experts are sorted
        before all others, and what the ranks have computed for a token is summed.
        """
        num_experts, shards = self.router.num_experts, self.shards
        if shards is not None:
            x, weights, chosen = shards.of_all(x), shards.of_all(weights), shards.of_all(chosen)
            chosen = (chosen - shards.rank * (num_experts // shards.size)) % num_experts
            num_experts //= shards.size
        experts, order = chosen.flatten().to(torch.int16).sort(stable=True)  # [n]; a radix sort passes over each byte
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))  # its inverse
        every = torch.arange(num_experts, dtype=experts.dtype, device=x.device)
        offsets = torch.searchsorted(experts, every, right=True, out_int32=True)
        out = self.experts(x, weights, Routes(order, place, offsets, experts if shards is None else None))
        return out if shards is None else shards.sum_own(out)


def expert_counts(chosen: Tensor, num_experts: int) -> Tensor:
    """How many tokens of ``chosen`` [t, k] each expert gets, [e] int64."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=chosen.device)
    return counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten()))


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """e * sum over experts of (share of the t tokens that it gets) * (its mean probability), k if all are alike; fp32.

    Switch Transformer (https://arxiv.org/abs/2101.03961), equations 4 to 6, with k choices per token as in Mixtral.
    """
    num_tokens, num_experts = probabilities.shape
    share = expert_counts(chosen, num_experts) / num_tokens
    return num_experts * (share * probabilities.float().mean(0)).sum()


class _WithLoss(torch.autograd.Function):
    """x as it is; in backward ``loss`` gets the gradient 1, as if it had been added to what is differentiated.

    So that a block can have a loss of its own and yet return nothing but its output.
    """

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:  # type: ignore[no-untyped-def]  # the context has no public type
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)
