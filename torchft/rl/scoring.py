"""Several rewards of many attempts, each with a limit of time; what fails is NaN and counted."""

import logging
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
        found = {name: torch.tensor(self._all(name, reward, attempts)) for name, (reward, _) in self._rewards.items()}
        total = torch.stack([weight * found[name] for name, (_, weight) in self._rewards.items()]).sum(0)
        return Scores(
            by_reward=found, total=total, num_failed={name: int(values.isnan().sum()) for name, values in found.items()}
        )

    def _all(self, name: str, reward: Reward, attempts: Sequence[Attempt]) -> list[float]:
        if isinstance(reward, BatchReward):
            try:
                with time_limit(self._timeout_s * max(len(attempts), 1)):
                    return reward.score(attempts)
            except Exception as e:  # as below: then one by one, so that only those that fail are left out
                log.warning("reward %s raised %r for %d answers together; asking one by one", name, e, len(attempts))
        return [self._one(name, reward, attempt) for attempt in attempts]

    def _one(self, name: str, reward: Reward, attempt: Attempt) -> float:
        try:
            with time_limit(self._timeout_s):
                return float(reward(attempt))
        except Exception as e:  # the user's code may raise anything; it is counted, and told once
            if name not in self._told:
                self._told.add(name)
                why = f"took over {self._timeout_s:g} s" if isinstance(e, _TimeUp) else f"raised {e!r}"
                log.warning("reward %s %s, for %.200r; such answers are left out and counted", name, why, attempt.text)
            return float("nan")


class _TimeUp(Exception):
    pass


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
