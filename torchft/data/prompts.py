"""Questions for generation and reinforcement learning: messages to answer, and what a judge of the answer may need."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchft.data.messages import FORMATS, TURNS, Message, RowError, Values, detect, rename, text, with_system
from torchft.data.sources import Source, rows
from torchft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """``messages`` end before the answer. ``answer``: the data's own, "" if it has none. ``values``: its whole row."""

    messages: list[Message]
    answer: str
    values: Values
    where: str  # file:line


def prompts(
    source: str | list[str],
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    max_rows: int | None = None,
    column_map: dict[str, str] | None = None,
    new_system_prompt: str | None = None,
) -> list[Prompt]:
    """Every row of ``source``: a conversation in any of the data sets' formats, or the column "prompt", text or
    messages, with an "answer" if there is one. UserError with file:line for a row that is neither.
    """
    found = []
    read = Source(path=source, split=split, subset=subset, revision=revision, max_rows=max_rows)
    for row in rows(read):
        where = f"{row.origin}:{row.number}"
        try:
            values = rename(row.values, column_map or {})
            messages, answer = _question(values)
        except RowError as e:
            raise UserError(f"{where}: {e}") from None
        if new_system_prompt is not None:
            messages = with_system(messages, new_system_prompt)
        found.append(Prompt(messages=messages, answer=answer, values=values, where=where))
    return found


class PromptLoader:
    """Prompts in an order by the seed, epoch after epoch. All ranks take the same ones, and answer their part."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self.taken = 0  # since the first epoch
        text = json.dumps([[p.messages, p.answer] for p in prompts], sort_keys=True, default=str)
        self._fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._orders: dict[int, list[int]] = {}  # of the epochs at hand

    def take(self, count: int) -> list[Prompt]:
        """The next ``count``; where an epoch ends the next begins."""
        found = [self.prompts[self._at(i)] for i in range(self.taken, self.taken + count)]
        self.taken += count
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "seed": self.seed, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there. UserError if the prompts or their order have changed."""
        if (state["seed"], state["fingerprint"]) != (self.seed, self._fingerprint):
            raise UserError(
                "cannot resume: the prompts or the seed are not those of the saved run, whose position would point at "
                "others. Restore them, or start a new run"
            )
        self.taken = state["taken"]

    def _at(self, i: int) -> int:
        epoch, place = divmod(i, len(self.prompts))
        if epoch not in self._orders:
            digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
            order = torch.randperm(len(self.prompts), generator=generator).tolist()
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: order}
        return self._orders[epoch][place]


def _question(values: Values) -> tuple[list[Message], str]:
    """The messages before the last answer, and that answer."""
    if isinstance(values.get("answer"), int | float):
        values = {**values, "answer": str(values["answer"])}
    is_prompt_alone = "prompt" in values and not {"completion", "answer", *TURNS} & values.keys()
    messages: list[dict[str, Any]]
    if is_prompt_alone:
        messages = FORMATS["prompt_answer"]({**values, "answer": "?"})[:-1]
    elif list(values) == ["text"]:  # a .txt file
        messages = [{"role": "user", "content": text(values, "text")}]
    else:
        messages = FORMATS[detect(values)](values)
    messages = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    answer = ""
    if messages[-1]["role"] == "assistant":
        content = messages.pop().get("content")
        answer = content if isinstance(content, str) else ""
    if not messages or messages[-1]["role"] == "assistant":
        raise RowError("there is no question before the answer")
    return messages, answer
