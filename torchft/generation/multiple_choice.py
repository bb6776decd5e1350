"""Multiple choice: which of some written answers a model finds likeliest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from torchft.config import Range
from torchft.errors import UserError
from torchft.losses.likelihood import IGNORE, token_logps
from torchft.modules.decoder import Decoder, Project
from torchft.modules.kv_cache import KVCache
from torchft.tokenizers.chat import Message
from torchft.tokenizers.tokenizer import Tokenizer

PROBLEMS_SHOWN = 20  # rows


@dataclass(frozen=True, kw_only=True)
class MultipleChoiceConfig:
    """The ``multiple_choice:`` section of a config: rows with a prompt, "choices", and an "answer" (text or number)."""

    source: str  # as a dataset's source
    max_rows: Annotated[int, Range(min=1)] | None = None
    normalise: Literal["none", "tokens", "bytes"] = "bytes"  # a choice's log-probability is divided by its length
    batch_size: Annotated[int, Range(min=1)] = 32  # choices computed together


@dataclass(frozen=True, kw_only=True)
class Question:
    """``context`` and ``answers`` in tokens; ``choices``: the answers' texts, of which number ``right`` is right."""

    context: list[int]
    answers: list[list[int]]
    choices: list[str]
    right: int
    where: str  # file:line

    @property
    def num_tokens(self) -> int:
        """With the longest answer."""
        return len(self.context) + max(map(len, self.answers))


def question(messages: Sequence[Message], values: Mapping[str, Any], *, where: str, tokenizer: Tokenizer) -> Question:
    """Of a row's ``messages`` before the answer, and its ``values``. UserError if choices or answer do not fit."""
    choices = values.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"{where}: 'choices' must list at least two answers, text")
    if values.get("answer") is None:
        raise UserError(f"{where}: the row has no 'answer': the number, letter or text of one choice")
    right = right_choice(values["answer"], choices, where)
    context = tokenizer.render(messages, add_generation_prompt=True).tokens
    answers = [tokenizer.encode(text, control=False) for text in choices]
    return Question(context=context, answers=answers, choices=choices, right=right, where=where)


def raise_some(problems: Sequence[str]) -> None:
    """All ranks: UserError with the first ``problems`` of rows, and how many more there are; nothing without any."""
    more = len(problems) - PROBLEMS_SHOWN
    if problems:
        rest = [f"{more} more rows have problems too"] if more > 0 else []
        raise UserError(*problems[:PROBLEMS_SHOWN], *rest, is_shared=True)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # blocks compiled for training would compile again for every length
def continuation_logps(
    model: Decoder, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int
) -> list[tuple[float, bool]]:
    """Of each (context, continuation) in tokens: the continuation's log-probability, nats, and whether greedy decoding
    would say it. A context has at least one token."""
    device = model.embed_tokens.weight.device
    found: list[tuple[float, bool]] = []
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))  # the longest fit, or none
    for start in range(0, len(order), batch_size):
        batch = [pairs[i] for i in order[start : start + batch_size]]
        longest = max(len(a) + len(b) for a, b in batch)
        tokens, labels = torch.zeros(len(batch), longest, dtype=torch.long), torch.full((len(batch), longest), IGNORE)
        for row, (a, b) in enumerate(batch):
            tokens[row, : len(a) + len(b)] = torch.tensor([*a, *b])
            labels[row, len(a) - 1 : len(a) + len(b) - 1] = torch.tensor(b)
        cache = KVCache(len(model.layers), num_slots=None) if model.shards else None  # so each rank has whole rows
        sums, greedy = model(tokens.to(device), head=partial(_sums, labels=labels.to(device)), cache=cache).tolist()
        found += [(total, bool(is_greedy)) for total, is_greedy in zip(sums, greedy)]
    back = {place: i for i, place in enumerate(order)}
    return [found[back[i]] for i in range(len(pairs))]


def right_choice(answer: object, choices: Sequence[str], where: str) -> int:
    """The place of ``answer`` among ``choices``: its number from 0, its letter, or its text."""
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return answer
    text = str(answer).strip()
    if text in choices:
        return list(choices).index(text)
    if len(text) == 1 and 0 <= ord(text.upper()) - ord("A") < len(choices):
        return ord(text.upper()) - ord("A")
    if text.isdecimal() and int(text) < len(choices):
        return int(text)
    raise UserError(
        f"{where}: the answer {answer!r} is none of the {len(choices)} choices, nor a number or letter of one"
    )


def pick(logps: Sequence[float], choices: Sequence[str], num_tokens: Sequence[int], normalise: str) -> int:
    """The likeliest choice, by log-probability per token, byte or choice."""
    lengths = {"none": [1] * len(choices), "tokens": num_tokens, "bytes": [len(c.encode()) for c in choices]}[normalise]
    scores = [logp / max(length, 1) for logp, length in zip(logps, lengths)]
    return scores.index(max(scores))


def _sums(hidden: Tensor, project: Project, *, labels: Tensor) -> Tensor:
    """[2, b]: the sum of each row's log-probabilities, and whether all its labels are the likeliest tokens."""
    sums = token_logps(hidden, project, labels=labels).sum(-1)
    chosen = (labels != IGNORE).flatten().nonzero().squeeze(1)
    is_best = torch.ones(labels.numel(), dtype=torch.bool, device=labels.device)
    is_best[chosen] = project(hidden.flatten(0, 1)[chosen]).argmax(-1) == labels.flatten()[chosen]
    return torch.stack((sums, is_best.view(labels.shape).all(-1).float()))
