"""Rewards: functions of one answer. A config names a factory below, or the user's own by ``--trust``.

    rewards:
      - {weight: 1.0, reward: {_component_: torchft.rl.rewards.exact_match}}
      - {weight: 0.2, reward: {_component_: my_rewards.polite}}       # def polite() -> Callable[[Attempt], float]

A reward that raises, or takes too long, is not known: the answer is left out of training, and counted.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torchft.data.prompts import Prompt
from torchft.errors import UserError
from torchft.generation.requests import Finish
from torchft.rl.math_answer import final_answer, is_equal, wanted_answer

Ending = Finish | Literal["environment_failed"]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """An answer to ``prompt``. ``text``: of its last turn, without the stop token; ``num_tokens``: of all its turns."""

    prompt: Prompt
    text: str
    num_tokens: int
    finish: Ending


Reward = Callable[[Attempt], float]


@dataclass(frozen=True, kw_only=True)
class BatchReward:
    """A reward that is asked about many attempts together, where that is faster."""

    score: Callable[[Sequence[Attempt]], list[float]]

    def __call__(self, attempt: Attempt) -> float:
        return self.score([attempt])[0]


def exact_match(*, column: str | None = None, ignore_case: bool = False) -> Reward:
    """1 if the answer is the data's (of ``column``, if it is not the usual one), white space around them aside."""

    def reward(attempt: Attempt) -> float:
        got, want = attempt.text.strip(), _wanted(attempt.prompt, column).strip()
        return float(got.lower() == want.lower() if ignore_case else got == want)

    return reward


def shared_start(*, column: str | None = None) -> Reward:
    """0 to 1: how much of the data's answer the attempt begins with, over the length of the longer one."""

    def reward(attempt: Attempt) -> float:
        got, want = attempt.text.strip(), _wanted(attempt.prompt, column).strip()
        same = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
        return same / max(len(got), len(want), 1)

    return reward


def math_answer(*, column: str | None = None) -> Reward:
    r"""1 if the attempt's answer (`final_answer`: its last \boxed{...}, or what else it ends in) has the value of the
    data's.

    A failure, not 0, where the data's answer has none.
    """

    def reward(attempt: Attempt) -> float:
        want = wanted_answer(_wanted(attempt.prompt, column), attempt.prompt.where)
        got = final_answer(attempt.text)
        return float(got is not None and is_equal(got, want))

    return reward


def regex(*, pattern: str, whole: bool = False) -> Reward:
    """1 if ``pattern`` is found in the answer, or with ``whole`` is all of it; "." matches line ends too."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as e:
        raise UserError(f"rewards: the pattern {pattern!r} is not a regular expression: {e}") from None

    def reward(attempt: Attempt) -> float:
        found = compiled.fullmatch(attempt.text.strip()) if whole else compiled.search(attempt.text)
        return float(found is not None)

    return reward


def length(*, low: int = 1, high: int, over: int = 0) -> Reward:
    """1 for ``low`` to ``high`` tokens, 0 for fewer; for more it falls in a line, to 0 at ``high + over``."""

    def reward(attempt: Attempt) -> float:
        if low <= attempt.num_tokens <= high:
            return 1.0
        return max(0.0, 1.0 - (attempt.num_tokens - high) / over) if over and attempt.num_tokens > high else 0.0

    return reward


def _wanted(prompt: Prompt, column: str | None) -> str:
    if column is None:
        if not prompt.answer:
            raise ValueError(f"{prompt.where}: the row has no answer to compare with; name a column")
        return prompt.answer
    if column not in prompt.values:
        raise ValueError(f"{prompt.where}: the row has no column {column!r}; it has {list(prompt.values)}")
    return str(prompt.values[column])
