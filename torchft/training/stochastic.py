"""AdamW for weights in pure bf16: the update is computed in fp32 and rounded up or down at random, right on average.

Rounded to the nearest, a bf16 weight (8 bits of mantissa) ignores every update below 1/512 of itself: at small learning
rates most weights never move. Stochastic rounding (https://arxiv.org/abs/2010.06192) needs no fp32 master weights.
"""

from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchft.errors import UserError
from torchft.ranks import local, region

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROW = 1024  # values: tensors made of such rows share a faster kernel


class AdamWStochastic(Optimizer):
    """AdamW (https://arxiv.org/abs/1711.05101) that rounds stochastically what it stores in bf16; fp32 stays exact.

    Weights and second moments are rounded stochastically: at betas[1] = 0.999 a bf16 second moment rounded to the
    nearest could not decay either. First moments move by a tenth a step and are rounded to the nearest. The random bits
    are a hash of (seed, step, element): no generator is read, and a resumed run rounds alike.

    One kernel per parameter on CUDA, 14 bytes read and written per bf16 weight with bf16 states, 22 with fp32 states.

    Args:
        state_dtype: of both moments; bf16 takes 4 bytes per weight, fp32 8.
        seed: of the rounding.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        state_dtype: Literal["bf16", "fp32"] = "bf16",
        seed: int = 0,
    ) -> None:
        if state_dtype not in DTYPES:
            raise UserError(f"optimizer.state_dtype: {state_dtype!r} is not one of {', '.join(DTYPES)}")
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(
                f"optimizer: lr {lr}, eps {eps} and weight_decay {weight_decay} must be 0 or more, "
                f"betas {tuple(betas)} at least 0 and less than 1"
            )
        self.state_dtype = DTYPES[state_dtype]
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "seed": seed}
        super().__init__(params, defaults)
        every = [p for group in self.param_groups for p in group["params"]]
        starts = accumulate((p.numel() for p in every), initial=0)  # of each parameter's elements among all
        # This rank's first element of each: so that a sharded parameter is rounded as a whole one.
        firsts = (
            start + sum(s.start * step for s, step in zip(region(p), p.stride())) for p, start in zip(every, starts)
        )
        self.starts = {p: torch.tensor(_signed(first), dtype=torch.int32) for p, first in zip(every, firsts)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            known: dict[int, dict[str, Tensor]] = {}  # nearly always one entry: all parameters are at the same step
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    for key in ("exp_avg", "exp_avg_sq"):
                        state[key] = torch.zeros_like(p, dtype=self.state_dtype, memory_format=torch.contiguous_format)
                state["step"] += 1
                if state["step"] not in known:
                    known[state["step"]] = scalars(group, state["step"])
                self.update(p, p.grad, state, known[state["step"]])
        return loss

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], given: dict[str, Tensor]) -> None:
        """One parameter's step. ``given``: `scalars`."""
        moments = local(state["exp_avg"]), local(state["exp_avg_sq"])
        adamw(local(p), local(grad), *moments, self.starts[p], given)


def scalars(group: dict[str, Any], step: int) -> dict[str, Tensor]:
    """What a step needs besides the tensors, as 0-dim CPU tensors: no recompilation, no wait for the device."""
    beta1, beta2 = group["betas"]
    lr, correction1, correction2 = float(group["lr"]), 1 - beta1**step, 1 - beta2**step
    values = {
        "decay": lr * group["weight_decay"],
        "weight1": 1 - beta1,
        "weight2": 1 - beta2,
        "step_size": lr / correction1,
        "correction2_sqrt": correction2**0.5,
        "eps": group["eps"],
    }
    key = 0
    for part in (group["seed"], step):  # murmur3's finaliser on 64 bits
        key = (key ^ part) * 0xFF51AFD7ED558CCD % 2**64
        key = (key ^ key >> 33) * 0xC4CEB9FE1A85EC53 % 2**64
        key ^= key >> 33
    floats = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
    return floats | {"key": torch.tensor(_signed(key), dtype=torch.int32)}


def adamw(
    p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, first: Tensor, given: dict[str, Tensor]
) -> None:
    """One step of one contiguous parameter, in place. Compiled on CUDA.

    ``first``: number of its first element, int32, which chooses the random bits. ``given``: `scalars`.
    """
    tensors = [p.detach().view(-1), grad.reshape(-1), exp_avg.view(-1), exp_avg_sq.view(-1)]
    if not p.is_cuda:
        _adamw(*tensors, first=first, **given)
        return
    if p.numel() % ROW == 0 and p.numel() > ROW:  # the compiler then knows how its loads are aligned
        tensors = [t.view(-1, ROW) for t in tensors]
    if p.numel() > 1:  # any size is one compilation
        for t in tensors:
            torch._dynamo.mark_dynamic(t, 0)
    _compiled()(*tensors, first=first, **given)


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 ``x`` to one of the two bf16 neighbours, the upper with the probability that makes the mean exact.

    ``bits``: random int32 in [0, 2^16). Adding them to the bits that bf16 lacks carries into the last that it has with
    the probability of their share. Infinities and NaNs stay.
    """
    carried = ((x.view(torch.int32) + bits) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), carried, x).to(torch.bfloat16)


def random_bits(like: Tensor, key: Tensor, first: Tensor) -> Tensor:
    """Hash of ``key`` and each element's place, from ``first`` on: int32 of the shape of ``like``, all 32 bits random.

    The mixer lowbias32, https://nullprogram.com/blog/2018/07/31/. Masks make the shifts of signed integers logical.
    """
    x = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    x = (x + first) * -1640531527 ^ key  # by 2^32 / golden ratio: neighbours differ in their high bits too
    x = (x ^ x >> 16 & 0xFFFF) * 0x7FEB352D
    x = (x ^ x >> 15 & 0x1FFFF) * -2073254261  # 0x846ca68b
    return x ^ x >> 16 & 0xFFFF


def rounds_stochastically(optimizer: Optimizer) -> bool:
    """Whether bf16 weights move under ``optimizer`` however small the learning rate."""
    return isinstance(optimizer, AdamWStochastic) or getattr(optimizer, "bf16_stochastic_round", False)  # torchao's


def _signed(value: int) -> int:
    """The low 32 bits as a signed integer."""
    return (value + 2**31) % 2**32 - 2**31


@cache
def _compiled() -> Callable[..., None]:
    return torch.compile(_adamw, fullgraph=True, dynamic=False)  # dynamic only where marked


def _adamw(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    decay: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    step_size: Tensor,
    correction2_sqrt: Tensor,
    eps: Tensor,
    key: Tensor,
    first: Tensor,
) -> None:
    """Elementwise, so that it compiles to one kernel: reads four tensors, writes three."""
    g = grad.float()
    m = exp_avg.float()
    v = exp_avg_sq.float()
    m = m + weight1 * (g - m)
    v = v + weight2 * (g * g - v)
    w = p.float()
    w = w - decay * w - step_size * m / (v.sqrt() / correction2_sqrt + eps)
    bits = random_bits(p, key, first)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(stochastic_round(v, bits >> 16 & 0xFFFF) if exp_avg_sq.dtype == torch.bfloat16 else v)
    p.copy_(stochastic_round(w, bits & 0xFFFF) if p.dtype == torch.bfloat16 else w)
