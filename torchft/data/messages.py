"""A row of any known format -> a list of messages in OpenAI's form: {"role", "content", ...}.

The format is found once, from the first row, or named; then every row is held to it. A row that does not fit is a
RowError that says which rule it breaks, never a guess.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torchft.names import nearest

Values = Mapping[str, Any]
Message = dict[str, Any]

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
TURNS = ("messages", "conversations", "conversation")  # columns that hold a conversation, in either form
SYNONYMS = {  # what other data sets call our columns, to suggest a column_map
    "instruction": ("question", "query", "problem", "prompt", "user"),
    "prompt": ("question", "query", "problem", "instruction", "user"),
    "output": ("answer", "response", "completion", "solution", "assistant"),
    "completion": ("answer", "response", "output", "solution", "assistant"),
    "text": ("content", "document", "body", "article", "page"),
}


class RowError(Exception):
    """What is wrong with one row; the caller knows where the row is."""


class EmptyError(RowError):
    """A row whose text is null, empty or white space: nothing to learn from, and common in real data."""


class FilteredError(RowError):
    """A row that the data set's filters leave out."""


def openai(row: Values) -> list[Message]:
    """{"messages": [{"role", "content", ...}, ...]}."""
    column, turns = _turns(row)
    return [_message(turn, f"{column}[{i}]") for i, turn in enumerate(turns)]


def sharegpt(row: Values) -> list[Message]:
    """{"conversations": [{"from": "human" | "gpt" | ..., "value"}, ...]}."""
    column, turns = _turns(row)
    messages = []
    for i, turn in enumerate(turns):
        where = f"{column}[{i}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise RowError(f"{where} must be an object with 'from' and 'value', found {_found(turn)}")
        if turn["from"] == "function_call":
            messages.append({"role": "assistant", "tool_calls": _calls(turn["value"], where)})
            continue
        role = SHAREGPT_ROLES.get(str(turn["from"]))
        if role is None:
            raise RowError(f"{where}: unknown 'from' {turn['from']!r}{nearest(str(turn['from']), SHAREGPT_ROLES)}")
        messages.append({"role": role, "content": "" if is_null(turn["value"]) else turn["value"]})
    return messages


def alpaca(row: Values) -> list[Message]:
    """{"instruction", "input" (may be missing or empty), "output"}: one question and one answer."""
    question = text(row, "instruction")
    if not is_null(row.get("input")) and row["input"] != "":
        question += "\n\n" + text(row, "input")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": text(row, "output")}]


def prompt_completion(row: Values) -> list[Message]:
    """{"prompt", "completion"}, both text or both lists of messages; only the completion is trained."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        prompt = [{"role": "user", "content": text(row, "prompt")}]
        completion = [{"role": "assistant", "content": text(row, "completion")}]
    before = [_message(turn, f"prompt[{i}]") | {"train": False} for i, turn in enumerate(prompt)]
    return before + [_message(turn, f"completion[{i}]") for i, turn in enumerate(completion)]


def prompt_answer(row: Values) -> list[Message]:
    """{"prompt" (text or messages), "answer"}: a question of reinforcement learning with the answer to compare with."""
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        prompt = [{"role": "user", "content": text(row, "prompt")}]
    before = [_message(turn, f"prompt[{i}]") | {"train": False} for i, turn in enumerate(prompt)]
    return [*before, {"role": "assistant", "content": text(row, "answer")}]


FORMATS: dict[str, Callable[[Values], list[Message]]] = {
    "openai": openai,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
    "prompt_answer": prompt_answer,
}


def rename(row: Values, column_map: Mapping[str, str]) -> Values:
    """The row with ``column_map`` {our column: the data's column} applied."""
    for ours, theirs in column_map.items():
        if theirs not in row:
            hint = nearest(theirs, row)
            raise RowError(f"column_map.{ours}: no column {theirs!r}{hint}; the columns are {list(row)}")
    return {**row, **{ours: row[theirs] for ours, theirs in column_map.items()}}


def detect(row: Values) -> str:
    """The format whose columns ``row`` has. EmptyError if its conversation is empty."""
    for column in TURNS:
        if column in row:
            turns = row[column]
            if is_null(turns) or turns == []:
                raise EmptyError(f"{column} is empty")
            first = turns[0] if isinstance(turns, list) else turns
            if isinstance(first, dict) and ("role" in first or "from" in first):
                return "openai" if "role" in first else "sharegpt"
            raise RowError(f"{column!r} must list {{role, content}} or {{from, value}} objects, found {_found(first)}")
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if "prompt" in row and "answer" in row:
        return "prompt_answer"
    if "instruction" in row and "output" in row:
        return "alpaca"
    other = next((c for c, v in row.items() if isinstance(v, list) and v and isinstance(v[0], dict)), None)
    if other:
        raise RowError(f"no column 'messages'; the columns are {list(row)}. Try column_map: {{messages: {other}}}")
    hint = ", or torchft.data.datasets.completion for raw text" if "text" in row else ""
    raise RowError(f"no column 'messages' of a conversation, and {missing(('instruction', 'output'), row)}{hint}")


def missing(columns: Iterable[str], row: Values) -> str:
    """The problem "these columns are not in the row", with the row's own columns and a column_map to try."""
    absent = [c for c in columns if c not in row]
    tries = {c: next((s for s in SYNONYMS.get(c, ()) if s in row), "YOUR_COLUMN") for c in absent}
    example = ", ".join(f"{ours}: {theirs}" for ours, theirs in tries.items())
    return f"no column {', '.join(map(repr, absent))}; the columns are {list(row)}. Try column_map: {{{example}}}"


def without_empty(messages: list[Message]) -> list[Message]:
    """The messages less an empty system message, which some data sets have in every row. EmptyError for another one."""
    messages = [m for m in messages if m["role"] != "system" or not _is_blank(m)]
    if not messages:
        raise EmptyError("no messages")
    for message in messages:
        if message["role"] in ("user", "assistant") and _is_blank(message) and not message.get("tool_calls"):
            raise EmptyError(f"{message['role']} message is empty")
    return messages


def with_system(messages: list[Message], prompt: str) -> list[Message]:
    """The messages with ``prompt`` as their only system message."""
    return [{"role": "system", "content": prompt}, *(m for m in messages if m["role"] != "system")]


def text(row: Values, column: str) -> str:
    """A column that must hold text."""
    if column not in row:
        raise RowError(missing([column], row))
    value = row[column]
    if is_null(value) or (isinstance(value, str) and not value.strip()):
        raise EmptyError(f"{column!r} is empty")
    if not isinstance(value, str):
        raise RowError(f"{column!r} must be text, found {_found(value)}")
    return value


def fill(template: str, row: Values) -> str:
    """``template`` with each {column} replaced by the row's text, '' where that is null or empty."""

    def value(match: re.Match[str]) -> str:
        column = match[1]
        if column not in row:
            raise RowError(f"prompt_template names {{{column}}}: {missing([column], row)}")
        return "" if is_null(row[column]) or row[column] == "" else text(row, column)

    return re.sub(r"\{(\w+)\}", value, template)


def is_null(value: object) -> bool:
    """None, or the NaN that tables write for a missing value."""
    return value is None or (isinstance(value, float) and value != value)


def _turns(row: Values) -> tuple[str, list[Any]]:
    column = next((c for c in TURNS if c in row), None)
    if column is None:
        raise RowError(missing(["messages"], row))
    turns = row[column]
    if is_null(turns):
        raise EmptyError(f"{column} is empty")
    if not isinstance(turns, list):
        raise RowError(f"{column!r} must be a list of messages, found {_found(turns)}")
    return column, turns


def _message(turn: Any, where: str) -> Message:
    """One message less its null fields, which parquet writes, OpenAI's weight as "train". Rendering checks the rest."""
    if not isinstance(turn, dict) or "role" not in turn:
        raise RowError(f"{where} must be an object with 'role' and 'content', found {_found(turn)}")
    if not isinstance(turn["role"], str):
        raise RowError(f"{where}.role must be text, found {_found(turn['role'])}")
    message = {k: v for k, v in turn.items() if not is_null(v)}
    weight = message.pop("weight", None)
    if weight not in (None, 0, 1):
        raise RowError(f"{where}.weight must be 0 or 1, found {weight!r}")
    if weight is not None and message["role"] == "assistant":
        message.setdefault("train", bool(weight))
    return message


def _calls(value: Any, where: str) -> list[Any]:
    """ShareGPT's call of tools: the JSON text of one {"name", "arguments"}, or of a list of them."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError as e:
        raise RowError(f"{where}: a function_call must be JSON: {e}") from None
    return calls if isinstance(calls, list) else [calls]


def _is_blank(message: Message) -> bool:
    content = message.get("content", "")
    if isinstance(content, list):  # parts
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        return all(isinstance(t, str) and not t.strip() for t in texts)
    return isinstance(content, str) and not content.strip()


def _found(value: object) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
