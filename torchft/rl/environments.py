"""Environments: what answers the model's turns, until an episode ends. Without one an episode is one answer.

An environment is a factory that a config names, ``() -> Environment``; each episode gets its own.
"""

import re
from typing import Protocol

from torchft.data.prompts import Prompt
from torchft.rl.math_answer import evaluate
from torchft.tokenizers.chat import Message


class Environment(Protocol):
    def reset(self, prompt: Prompt) -> list[Message]:
        """The conversation that the model's first turn follows."""

    def step(self, text: str) -> list[Message]:
        """What is said after the model's turn ``text``, a stop text in it too; nothing ends the episode."""


class Calculator:
    """Computes what stands in the last <calc>...</calc> of a turn; a turn without one is the answer."""

    def __init__(self, role: str) -> None:
        self._role = role

    def reset(self, prompt: Prompt) -> list[Message]:
        return list(prompt.messages)

    def step(self, text: str) -> list[Message]:
        calls = re.findall(r"<calc>(.*?)</calc>", text, re.DOTALL)
        if not calls:
            return []
        try:
            result = f"{evaluate(calls[-1]):.10g}"
        except ValueError as e:
            result = f"error: {e}"
        return [{"role": self._role, "content": result}]


def calculator(*, role: str = "tool") -> Environment:
    """``role``: of its messages; "user" for chat formats without tools."""
    return Calculator(role)
