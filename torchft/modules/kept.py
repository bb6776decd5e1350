"""A mark for small tensors that took long to compute: a compiler that recomputes under a budget shall keep them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

WORTH = 2**30  # FLOPs a row that the compiler believes to save: more than a block has, and few enough to add in fp32


def kept(x: Tensor) -> Tensor:
    """x, which is small and dear: at any budget that has room for it, it is kept, and what it came from is not needed.

    With gradients a copy, as an operator's output has to be. Without a compiler autograd keeps what it keeps.
    """
    return _kept(x) if torch.is_grad_enabled() else x


@torch.library.custom_op("torchft::kept", mutates_args=())
def _kept(x: Tensor) -> Tensor:
    return x.clone()


@_kept.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


_kept.register_autograd(lambda ctx, grad: grad)


@register_flop_formula(torch.ops.torchft.kept)
def _worth(shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return WORTH * shape[0]


UNCOUNTED = {torch.ops.torchft.kept: lambda *args, **kwargs: 0}  # for a FlopCounterMode that is asked about time
