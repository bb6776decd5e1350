"""How much an optimizer keeps per weight, measured: it takes one step over small stand-ins of the parameters."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchft.training.memory import stored_bytes

log = logging.getLogger(__name__)

SIDE = 256  # of a stand-in, at most: low-bit optimizers keep small tensors in full


def optimizer_bytes(
    build: Callable[[Any], Optimizer], groups: Sequence[dict[str, Any]], *, device: torch.device
) -> int | None:
    """Bytes of state that ``build(groups)`` will keep on ``device``; None if it cannot be measured.

    The parameters may be on the meta device.

    One stand-in is measured for all layers' parameters of one name, since optimizers choose by name, shape and dtype.
    States in host memory do not count. Nor does what an optimizer allocates when it is built: build it before you look
    at what is free.
    """
    small, measured = [], []
    for group in groups:
        kinds: dict[str, list[Tensor]] = {}  # name without the layer's number -> parameters
        for name, p in group["params"]:
            kinds.setdefault(re.sub(r"\b\d+\b", "0", name), []).append(p)
        named = [(name, _stand_in(params[0], device)) for name, params in kinds.items()]
        small.append({**group, "params": named})
        measured += [(p, sum(q.numel() for q in kinds[name])) for name, p in named]
    optimizer = build(small)
    for p, _ in measured:
        p.grad = torch.zeros_like(p)
    try:
        with torch.compiler.set_stance("force_eager"):  # to compile a step that is taken once would last seconds
            optimizer.step()
    except (RuntimeError, ValueError) as e:
        log.warning("%s cannot step over small weights, so two states each are assumed: %s", type(optimizer), e)
        return None
    return round(sum(_state_bytes(optimizer, p) / p.numel() * count for p, count in measured))


def _state_bytes(optimizer: Optimizer, p: Tensor) -> int:
    values = optimizer.state[p].values()
    return sum(stored_bytes(t) for t in values if isinstance(t, Tensor) and t.device == p.device and t.ndim)


def _stand_in(p: Tensor, device: torch.device) -> nn.Parameter:
    """Zeros, no longer than SIDE in any direction if ``p`` is a matrix."""
    shape = p.shape if p.ndim < 2 else [min(n, SIDE) for n in p.shape]
    return nn.Parameter(torch.zeros(shape, dtype=p.dtype, device=device))
