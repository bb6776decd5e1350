"""Answers to a list of prompts, in text."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchft.generation.engine import Engine
from torchft.generation.requests import Finish, Request
from torchft.generation.sampling import Sampling
from torchft.generation.text import answer_text
from torchft.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Reply:
    """``tokens`` with the stop token, and their log-probabilities; ``text`` without it."""

    text: str
    tokens: list[int]
    logps: list[float]
    finish: Finish


def answers(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    num_samples: int = 1,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> list[list[Reply]]:
    """``num_samples`` answers to each of ``prompts``, each prompt computed once.

    ``seed`` decides them, with each prompt's number: its place, or that in a larger whole by ``numbers``.
    """
    requests = [
        Request(prompt=prompt, sampling=sampling, seed=(seed << 32) + i * num_samples + j)
        for i, prompt in zip(numbers or range(len(prompts)), prompts)
        for j in range(num_samples)
    ]
    replies = [
        Reply(text=answer_text(tokenizer, c, stop=sampling.stop), tokens=c.tokens, logps=c.logps, finish=c.finish)
        for c in engine.complete(requests)
    ]
    return [replies[i : i + num_samples] for i in range(0, len(replies), num_samples)]
