"""What may enter the weights: no step that is not finite, and no silence when the loss leaps.

guard = Guard(config.guard)
if guard.allows(step + 1, loss=loss, grad_norm=grad_norm, model=model, rows=rows, own_loss=own_loss):
    optimizer.step()
"""

import logging
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from torchft.config import Range
from torchft.errors import UserError
from torchft.ranks import gather
from torchft.training.optim import check_finite

log = logging.getLogger(__name__)

WINDOW = 100  # losses whose mean a leap is measured against
MOST_SKIPS = 10  # in a row: then something else is wrong than a batch
SHOWN = 20  # rows of a batch that a message names


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """The ``guard:`` section of a config."""

    not_finite: Literal["stop", "skip"] = (
        "stop"  # a NaN or infinite loss or gradient: end the run, or leave that step out
    )
    spike: Literal["ignore", "warn", "stop"] = "warn"  # a loss far above the mean of the last 100
    spike_factor: Annotated[float, Range(above=1)] = 2.0  # how far: times that mean
    spike_steps: Annotated[int, Range(min=1)] = 4  # for how many steps on end


class Guard:
    """Looks at each optimizer step before it is taken. All ranks make one, and call it alike."""

    def __init__(self, config: GuardConfig) -> None:
        self.skipped = 0  # steps left out
        self._config = config
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._high = self._skips = 0  # on end

    def allows(
        self,
        step: int,
        *,
        loss: Tensor,
        grad_norm: Tensor,
        model: nn.Module,
        rows: Iterable[object] = (),
        own_loss: Tensor | None = None,
    ) -> bool:
        """Whether to take the step; waits for the device. Arguments of `check_finite`. UserError to end the run."""
        rows = list(rows)
        try:
            check_finite(step, loss=loss, grad_norm=grad_norm, model=model, rows=rows, own_loss=own_loss)
        except UserError as e:
            self._skips += 1
            if self._config.not_finite == "stop":
                raise
            if self._skips > MOST_SKIPS:
                raise UserError(f"{e}. guard.not_finite: {self._skips} steps on end are none", is_shared=True) from None
            self.skipped += 1
            log.warning("step left out, %d so far: %s", self.skipped, e)
            return False
        self._skips = 0
        if self._config.spike != "ignore":
            self._watch(step, float(loss), rows)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "high": self._high, "skips": self._skips, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """None, of a checkpoint that has none, leaves all as it is."""
        if state is not None:
            self._losses.extend(state["losses"])
            self._high, self._skips, self.skipped = state["high"], state["skips"], state["skipped"]

    def _watch(self, step: int, loss: float, rows: list[object]) -> None:
        limit = self._config.spike_factor * sum(self._losses) / len(self._losses) if self._losses else math.inf
        is_high = len(self._losses) == WINDOW and loss > limit
        self._high = self._high + 1 if is_high else 0
        if not is_high:
            self._losses.append(loss)  # what leaps does not move what it is measured against
        if self._high == 0 or self._high % self._config.spike_steps:
            return
        names = [str(row) for theirs in gather(rows) for row in theirs]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        text = (
            f"step {step}: the loss has been over {self._config.spike_factor:g} times its mean ({limit:.4g}) for "
            f"{self._high} steps, now {loss:.4g}; rows of this batch: {', '.join(names[:SHOWN])}{more}. Look at these "
            "rows, lower the learning rate, or lengthen the warm-up"
        )
        if self._config.spike == "stop":
            raise UserError(f"{text}; guard.spike: warn goes on from the newest checkpoint", is_shared=True)
        log.warning("%s", text)
