"""Several rewards of many attempts, each with a limit of time; what fails is NaN and counted."""

import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Annotated

import torch
from torch import Tensor

from torchft.config import Component, Kind
from torchft.rl.rewards import Attempt, BatchReward, Reward

log = logging.getLogger(__name__)

VOID = ("too_long", "not_finite", "environment_failed")  # ends of attempts that nothing can be learned from


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One of the ``rewards:`` of a config."""

    reward: Annotated[Component, Kind("reward")]
    weight: float = 1.0  # of it in the sum


@dataclass(frozen=True, kw_only=True)
class Scores:
    """``by_reward``: {name: [n] fp32}, NaN where it failed. ``total`` [n]: their weighted sum, NaN if any is."""

    by_reward: dict[str, Tensor]
    total: Tensor
    num_failed: dict[str, int]


def choose(found: Sequence[Scores], numbers: Sequence[int]) -> Scores:
    """The scores of ``numbers``, counted through all of ``found``; failures are those of all."""
    index = torch.tensor(list(numbers), dtype=torch.long)
    names = found[0].by_reward
    return Scores(
        by_reward={name: torch.cat([s.by_reward[name] for s in found])[index] for name in names},
        total=torch.cat([s.total for s in found])[index],
        num_failed={name: sum(s.num_failed[name] for s in found) for name in names},
    )


class Scorer:
    """The rewards of a run. It says what a reward raises, the first time."""

    def __init__(self, configs: Sequence[RewardConfig], *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._rewards: dict[str, tuple[Reward, float]] = {}
        self._told: set[str] = set()
        for config in configs:
            name = short = config.reward.name.rpartition(".")[2]
            while name in self._rewards:
                name = f"{short}_{len(self._rewards) + 1}"
            self._rewards[name] = (config.reward.build(), config.weight)

    def score(self, attempts: Sequence[Attempt]) -> Scores:
        """Attempts that came to nothing (`VOID`) are not judged: NaN, and no failures of a reward."""
        judged = torch.tensor([attempt.finish not in VOID for attempt in attempts], dtype=torch.bool)
        wanted = [attempt for attempt in attempts if attempt.finish not in VOID]
        found, num_failed = {}, {}
        for name, (reward, _) in self._rewards.items():
            values = torch.tensor(self._all(name, reward, wanted), dtype=torch.float32)
            found[name] = torch.full((len(attempts),), torch.nan).masked_scatter(judged, values)
            num_failed[name] = int(values.isnan().sum())
        total = torch.stack([weight * found[name] for name, (_, weight) in self._rewards.items()]).sum(0)
        return Scores(by_reward=found, total=total, num_failed=num_failed)

    def _all(self, name: str, reward: Reward, attempts: Sequence[Attempt]) -> list[float]:
        if isinstance(reward, BatchReward) and attempts:
            try:
                with time_limit(self._timeout_s * len(attempts)):
                    values = list(map(float, reward.score(attempts)))
                if len(values) != len(attempts):
                    raise ValueError(f"{len(values)} rewards for {len(attempts)} answers")
                return [self._finite(name, value, attempt) for value, attempt in zip(values, attempts)]
            except (Exception, _TimeUp) as e:  # as below: then one by one, so that only those that fail are left out
                log.warning("reward %s raised %r for %d answers together; asking one by one", name, e, len(attempts))
        return [self._one(name, reward, attempt) for attempt in attempts]

    def _one(self, name: str, reward: Reward, attempt: Attempt) -> float:
        try:
            with time_limit(self._timeout_s):
                value = float(reward(attempt))
        except (Exception, _TimeUp) as e:  # the user's code may raise anything; it is counted, and told once
            why = f"took over {self._timeout_s:g} s" if isinstance(e, _TimeUp) else f"raised {e!r}"
            return self._failed(name, why, attempt)
        return self._finite(name, value, attempt)

    def _finite(self, name: str, value: float, attempt: Attempt) -> float:
        return value if math.isfinite(value) else self._failed(name, f"is {value}", attempt)

    def _failed(self, name: str, why: str, attempt: Attempt) -> float:
        if name not in self._told:
            self._told.add(name)
            log.warning("reward %s %s, for %.200r; such answers are left out and counted", name, why, attempt.text)
        return math.nan


class _TimeUp(BaseException):
    """None that a reward's own ``except Exception`` takes for one of its errors."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises inside after so long, by a signal: for Python code, regular expressions too, on the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TimeUp

    handler, began = signal.signal(signal.SIGALRM, stop), time.monotonic()
    timer, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:  # another's timer goes on
        left = max(timer - (time.monotonic() - began), 1e-3) if timer else 0.0
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)
