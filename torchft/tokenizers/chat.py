"""Conversations: the segments that a chat format makes of one, what they render to, and the rules they must keep.

A chat format is a function in its family's file, of registry kind "chat_format":
``chat(messages, *, tools=None, add_generation_prompt=False, **options) -> list[Segment]``.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchft.errors import UserError
from torchft.names import nearest

Message = dict[str, Any]  # OpenAI's form: role, content, tool_calls, name, tool_call_id; "train": bool is ours

_SURROGATE = re.compile(r"[\ud800-\udfff]")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; templates read the first
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered conversation. Only ``control`` text is searched for control tokens, the rest never is."""

    text: str
    control: bool = False
    train: bool = False  # every token that overlaps it is supervised


@dataclass(frozen=True)
class Rendered:
    """The ids of a conversation. ``train[i]``: token i is to be learned."""

    tokens: list[int]
    train: list[bool]
    num_escaped: int = 0  # strings in message text that look like control tokens and were encoded as plain text
    left_out: tuple[str, ...] = ()  # what the messages hold and the chat format does not say, such as "reasoning"


def prepare(messages: Sequence[Message], *, add_generation_prompt: bool, train_on: str) -> list[Message]:
    """The messages as formats want them, each assistant one with ``train``. Raises UserError naming message and rule.

    With a generation prompt nothing is to be learned. Keys that are None and lists of no tool calls are dropped, and
    tool-call arguments that are JSON text (OpenAI's form) are parsed.
    """
    if train_on not in ("assistant", "last", "all"):
        raise UserError(
            f"train_on is {train_on!r}{nearest(train_on, ('assistant', 'last', 'all'))}; use assistant, last or all"
        )
    if not messages:
        raise UserError("the conversation has no messages")
    prepared = [_message(i, message) for i, message in enumerate(messages)]
    answers = [i for i, message in enumerate(prepared) if message["role"] == "assistant"]
    if not answers and not add_generation_prompt:
        raise UserError(f"no message of {len(prepared)} has the role 'assistant', so there is nothing to learn")
    for i, message in enumerate(prepared):
        role = message["role"]
        if i and role in ("system", "developer"):
            raise UserError(f"message {i}: role {role!r} is allowed only as the first message")
        if i and role in ("user", "assistant") and role == prepared[i - 1]["role"]:
            raise UserError(f"messages {i - 1} and {i} both have the role {role!r}; join them into one")
        if role == "assistant":
            default = train_on != "last" or i == answers[-1]
            message["train"] = not add_generation_prompt and message.get("train", default)
        elif message.pop("train", False):
            raise UserError(
                f"message {i}: 'train: true' on role {role!r}; only assistant messages can be chosen one by one"
            )
    return prepared


def check_unicode(text: str) -> None:
    """Raise UserError for a lone surrogate, which JSON can spell and no tokenizer can encode."""
    if not text.isascii() and (bad := _SURROGATE.search(text)):
        raise UserError(
            f"text holds a lone surrogate ({bad[0]!r} at character {bad.start()}), which is not valid Unicode"
        )


def join_parts(content: Any, index: int) -> str:
    """Message content as one string, for a format without images. Raises UserError for parts that are not text."""
    if not isinstance(content, list):
        return str(content)
    for part in content:
        if part.get("type") != "text":
            raise UserError(
                f"message {index}: content has a part of type {part.get('type')!r}; this model reads only text"
            )
    return "".join(part["text"] for part in content)


def split_thought(message: Message, index: int) -> tuple[str, str]:
    """An answer's reasoning, "" if it has none, and its text: from a field of its own, or from <think> in the text."""
    content = join_parts(message.get("content") or "", index)
    for key in REASONING:
        if key in message:
            return message[key], content
    if "</think>" not in content:
        return "", content
    before, *_, content = content.split("</think>")
    return before.rstrip("\n").rpartition("<think>")[2].lstrip("\n"), content.lstrip("\n")


def left_out(messages: Sequence[Message], tools: list[Any] | None, text: str) -> tuple[str, ...]:
    """What ``text``, the conversation as it is rendered, does not say: formats drop what they have no place for.

    Of reasoning only that of answers to be learned counts: most formats leave earlier turns' out on purpose.
    """

    def lacks(part: Any) -> bool:
        return isinstance(part, str) and part.strip() not in text

    names = [tool.get("function", tool).get("name") for tool in tools or [] if isinstance(tool, dict)]
    found = {
        "tools": any(map(lacks, names)),
        "a system message": any(m["role"] in ("system", "developer") and lacks(m.get("content")) for m in messages),
        "reasoning": any(m.get("train") and any(lacks(m.get(key)) for key in REASONING) for m in messages),
        "text beside a tool call": any("tool_calls" in m and lacks(m.get("content")) for m in messages),
    }
    return tuple(what for what, is_lacking in found.items() if is_lacking)


def _message(i: int, message: Message) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"message {i}: expected a mapping with 'role' and 'content', found {type(message).__name__}")
    message = {key: value for key, value in message.items() if value is not None and (key, value) != ("tool_calls", [])}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise UserError(f"message {i}: unknown role {role!r}{hint}; known: {', '.join(ROLES)}")
    if content is None and not (role == "assistant" and message.get("tool_calls")):
        raise UserError(f"message {i} ({role}): has no content")
    if not (content is None or isinstance(content, str) or role in ("tool", "ipython") or _is_parts(content)):
        raise UserError(
            f"message {i} ({role}): content must be text or a list of parts, found {type(content).__name__}"
        )
    if not isinstance(message.get("train", False), bool):
        raise UserError(f"message {i} ({role}): 'train' must be true or false, found {message['train']!r}")
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(i, call) for call in message["tool_calls"]]
    return message


def _is_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(p, dict) and isinstance(p.get("text", ""), str) for p in content
    )


def _tool_call(i: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"message {i}: a tool call needs a function with a name, found {call!r:.80}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as e:
            raise UserError(f"message {i}: arguments of {function['name']!r} are not JSON: {e}") from None
    outer = call if "function" in call else {}
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}
