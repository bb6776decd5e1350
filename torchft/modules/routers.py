"""Which experts a token goes to, with what weight. Shapes: t tokens, d model dim, e experts, k experts per token."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.kernels.top_k import top_k


class Router(nn.Module):
    """A logit per expert, [t, d] -> [t, e]. A kind of router says how experts are chosen by them.

    No nn.Linear, so that adapters and quantisation leave it alone. ``in_fp32``: the product too, not only what follows.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, *, bias: bool = False, in_fp32: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        self.num_experts, self.top_k, self.in_fp32 = num_experts, top_k, in_fp32
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_fp32:
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())
        return F.linear(x, self.weight, self.bias)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [t, k] fp32 and experts [t, k] int64 for logits [t, e]."""
        raise NotImplementedError

    def probabilities(self, logits: Tensor) -> Tensor:
        """[t, e] fp32, as the load-balancing loss takes them."""
        return logits.float().softmax(-1)


class SoftmaxRouter(Router):
    """The k largest of all probabilities (Switch, Mixtral, Qwen 3), which ``renormalises`` makes add up to 1."""

    def __init__(self, dim: int, num_experts: int, top_k: int, *, renormalises: bool = True) -> None:
        super().__init__(dim, num_experts, top_k)
        self.renormalises = renormalises

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = top_k(logits.float().softmax(-1), self.top_k)
        return weights / weights.sum(-1, keepdim=True) if self.renormalises else weights, chosen


class ChosenSoftmaxRouter(Router):
    """Softmax over the k largest logits only, after they are chosen (gpt-oss)."""

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        best, chosen = top_k(logits.float(), self.top_k)
        return best.softmax(-1), chosen


class SigmoidRouter(Router):
    """A sigmoid of each of the k largest logits (Llama 4, with k = 1)."""

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        best, chosen = top_k(logits.float(), self.top_k)
        return best.sigmoid(), chosen


class GroupedRouter(Router):
    """Sigmoids, chosen with a correction that balances the load and is no part of the weights (DeepSeek V3).

    Of ``num_groups`` groups of experts those ``top_groups`` take part whose two best experts are best. Weights are
    renormalised if so said, then scaled. https://arxiv.org/abs/2412.19437, section 2.1.2
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int = 1,
        top_groups: int = 1,
        renormalises: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__(dim, num_experts, top_k, in_fp32=True)
        self.correction = nn.Parameter(torch.zeros(num_experts), requires_grad=False)  # not trained by gradients
        self.num_groups, self.top_groups = num_groups, top_groups
        self.renormalises, self.scale = renormalises, scale

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        corrected = (scores + self.correction).detach()  # [t, e]
        if self.top_groups < self.num_groups:
            groups = corrected.unflatten(-1, (self.num_groups, -1))  # [t, groups, e / groups]
            best = groups.topk(2, dim=-1)[0].sum(-1).topk(self.top_groups, dim=-1)[1]  # [t, top groups]
            allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
            corrected = groups.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
        chosen = top_k(corrected, self.top_k)[1]
        weights = scores.gather(1, chosen)
        if self.renormalises:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale, chosen

    def probabilities(self, logits: Tensor) -> Tensor:
        scores = logits.float().sigmoid()
        return scores / scores.sum(-1, keepdim=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As ever (``to``, ``cuda`` ...), but the correction keeps its fp32: experts differ in its third digit."""

        def kept(t: Tensor) -> Tensor:
            new = fn(t)
            return t.to(new.device) if t is self.correction and new.dtype != t.dtype else new

        return super()._apply(kept, recurse)
