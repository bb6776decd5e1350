"""Learning-rate schedules: pure functions of the step, as factors of the base learning rate.

    factor = cosine(total_steps=1000, warmup_steps=50)
    schedule = attach(optimizer, factor, step=0)   # a LambdaLR; call schedule.step() after optimizer.step()

Each warms up linearly from 0 in ``warmup_steps`` steps, or in ``warmup_share`` of all steps. As nothing but the step
enters, resuming is ``attach(optimizer, factor, step=n)``. ``total_steps`` counts optimizer steps; the recipe gives it.
"""

import logging
import math
from collections.abc import Callable
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchft.errors import UserError

log = logging.getLogger(__name__)

Factor = Callable[[int], float]


def constant(*, total_steps: int, warmup_steps: int = 0, warmup_share: float = 0.0) -> Factor:
    """1 after warm-up."""
    return _warmed(total_steps, warmup_steps, warmup_share, lambda done, of: 1.0)


def linear(*, total_steps: int, warmup_steps: int = 0, warmup_share: float = 0.0, min_lr_share: float = 0.0) -> Factor:
    """A straight line from 1 to ``min_lr_share``."""
    return _warmed(total_steps, warmup_steps, warmup_share, _floored(min_lr_share, lambda done, of: (of - done) / of))


def cosine(*, total_steps: int, warmup_steps: int = 0, warmup_share: float = 0.0, min_lr_share: float = 0.0) -> Factor:
    """Half a cosine from 1 to ``min_lr_share``: (1 + cos(pi t)) / 2. https://arxiv.org/abs/1608.03983"""

    def shape(done: int, of: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * (done / of)))

    return _warmed(total_steps, warmup_steps, warmup_share, _floored(min_lr_share, shape))


def wsd(
    *,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_share: float = 0.0,
    decay_share: float = 0.2,
    decay: Literal["1-sqrt", "linear"] = "1-sqrt",
    min_lr_share: float = 0.0,
) -> Factor:
    """Warm-up, stable, decay: 1 until the last ``decay_share`` of all steps, then down to ``min_lr_share``.

    https://arxiv.org/abs/2404.06395; the decay 1 - sqrt(t) and the share of 20% are those of
    https://arxiv.org/abs/2405.18392.
    """
    _check_share("decay_share", decay_share)
    decay_steps = max(1, round(decay_share * total_steps))

    def shape(done: int, of: int) -> float:
        t = max(0, decay_steps - (of - done)) / decay_steps
        return 1 - (math.sqrt(t) if decay == "1-sqrt" else t)

    return _warmed(total_steps, warmup_steps, warmup_share, _floored(min_lr_share, shape))


def rex(*, total_steps: int, warmup_steps: int = 0, warmup_share: float = 0.0, min_lr_share: float = 0.0) -> Factor:
    """Reflected exponential, (1 - t) / (1/2 + (1 - t) / 2): high for long, steep at the end.

    https://arxiv.org/abs/2107.04197
    """

    def shape(done: int, of: int) -> float:
        left = (of - done) / of
        return left / (0.5 + 0.5 * left)

    return _warmed(total_steps, warmup_steps, warmup_share, _floored(min_lr_share, shape))


def attach(optimizer: Optimizer, factor: Factor, *, step: int = 0) -> LambdaLR:
    """A LambdaLR at ``step`` finished optimizer steps, scaling each group's own lr (``initial_lr`` if it has one)."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    return LambdaLR(optimizer, factor, last_epoch=step - 1)


def is_due(step: int, every: int | None, total_steps: int) -> bool:
    """Whether what happens every so many steps (None: only at the end) happens after ``step`` of them."""
    return step == total_steps or (every is not None and step % every == 0)


def _warmed(total_steps: int, warmup_steps: int, warmup_share: float, shape: Callable[[int, int], float]) -> Factor:
    """``step / warm-up`` during warm-up, then ``shape(done, of)`` of the steps after it; stays at its end."""
    _check_share("warmup_share", warmup_share)
    if total_steps < 1 or warmup_steps < 0:
        raise UserError(f"total_steps must be 1 or more and warmup_steps 0 or more, not {total_steps}, {warmup_steps}")
    if warmup_steps and warmup_share:
        raise UserError(f"give warmup_steps ({warmup_steps}) or warmup_share ({warmup_share}), not both")
    warmup = warmup_steps or math.ceil(warmup_share * total_steps)
    if warmup >= total_steps and total_steps > 1:
        log.warning("the warm-up of %d steps never ends: this run has %d steps", warmup, total_steps)
    of = max(1, total_steps - warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return shape(min(step - warmup, of), of)

    return factor


def _floored(min_lr_share: float, shape: Callable[[int, int], float]) -> Callable[[int, int], float]:
    _check_share("min_lr_share", min_lr_share)
    return lambda done, of: shape(done, of) * (1 - min_lr_share) + min_lr_share


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} must lie between 0 and 1, not {value}")
