"""What a block keeps for backward, whatever the compiler's budget is, if that keeps anything at all."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

WORTH = 2**50  # FLOPs that the compiler believes to save: more than a block has


@torch.library.custom_op("torchft::kept", mutates_args=())
def kept(x: Tensor) -> Tensor:
    """x, which is small and dear: a compiler that recomputes under a budget keeps it, and so not what it came from.

    A copy, as an operator's output has to be. Elsewhere autograd keeps what it keeps.
    """
    return x.clone()


@kept.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


kept.register_autograd(lambda ctx, grad: grad)


@register_flop_formula(torch.ops.torchft.kept)
def _worth(*args: Any, **kwargs: Any) -> int:
    return WORTH


UNCOUNTED = {torch.ops.torchft.kept: lambda *args, **kwargs: 0}  # for a FlopCounterMode that is asked about time
