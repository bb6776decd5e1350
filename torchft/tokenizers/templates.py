"""A checkpoint's own chat template as a chat format: its text as segments, the learned spans found.

Spans come from the template's ``{% generation %}`` marks, else from rendering prefixes of the conversation: what
follows the generation prompt, to the end of the turn, is what the model must produce. A template that renders a prefix
differently once more messages follow has no such spans, and is refused.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torchft.errors import UserError
from torchft.names import nearest
from torchft.tokenizers.added import AddedTokens
from torchft.tokenizers.chat import REASONING, Message, Segment, check_unicode, join_parts
from torchft.tokenizers.jinja import END, GUARD, START, Template

PROBE = "probe text"


class TemplateChat:
    """The chat format that a template describes."""

    def __init__(self, sources: dict[str, str], where: str, special: dict[str, str], added: AddedTokens) -> None:
        """``sources``: templates by name, "default" and perhaps "tool_use". ``special``: bos_token, eos_token ..."""
        self.templates = {name: Template(source, where) for name, source in sources.items()}
        self.special = special
        self._added = added
        self._guards = {special_only: _Guard(added, special_only) for special_only in (False, True)}
        self._parts = not self._can_render([{"role": "user", "content": PROBE}])
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": PROBE}}}
        ask: Message = {"role": "user", "content": "x"}
        answer: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        self._text_arguments = not self._can_render([ask, answer]) and self._can_render([ask, _text_calls(answer)])
        asked: list[Message] = [ask, _text_calls(answer) if self._text_arguments else answer]
        result: Message = {"role": "tool", "content": {"probe": 1}}
        as_json = '"probe": 1'  # Python's own spelling, which some templates leave, is none
        self._text_results = not self._can_render([*asked, result], as_json)
        self._text_results &= self._can_render([*asked, _text_result(result)], as_json)

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Any] | None = None,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> list[Segment]:
        """The conversation's segments. Raises UserError when the template refuses it or its spans cannot be found."""
        template = self._template(tools)
        self._check(template, messages, options)
        prepared = [self._adapt(i, message) for i, message in enumerate(messages)]
        options = self._guards[False].copy(options)
        tools = self._guards[False].copy(tools)

        def render(count: int, prompt: bool) -> str:
            variables = {"tools": tools, "documents": None, **self.special, **options}
            return template.render(messages=prepared[:count], add_generation_prompt=prompt, **variables)

        text = render(len(messages), add_generation_prompt)
        train = [message.get("train", True) if message["role"] == "assistant" else None for message in messages]
        if template.has_marks:
            runs = _marked_runs(text, [t for t in train if t is not None], template.where)
        else:
            spans = []
            closing = self.special.get("eos_token", "")  # Phi puts it behind the whole conversation
            length = partial(_prefix, text, where=template.where, has_system=messages[0]["role"] == "system")
            for i in (i for i, wanted in enumerate(train) if wanted):
                start = length(render(i, True), i)
                is_last = i + 1 == len(messages)
                end = len(text) if is_last else length(render(i + 1, False), i, closing)
                if start == end and (messages[i].get("content") or "tool_calls" in messages[i]):
                    raise UserError(f"message {i}: {template.where} renders nothing of it to learn")
                spans.append((start, self._turn_end(text, start, end)))
            runs = _span_runs(text, spans)
        return [
            Segment(part, control=True, train=learned) for run, learned in runs for part in run.split(GUARD) if part
        ]

    def text(self, messages: Sequence[Message], **options: Any) -> str:
        """The conversation as the template renders it, and nothing else."""
        return "".join(segment.text for segment in self([{**m, "train": False} for m in messages], **options))

    def _template(self, tools: list[Any] | None) -> Template:
        return self.templates.get("tool_use", self.templates["default"]) if tools else self.templates["default"]

    def _check(self, template: Template, messages: Sequence[Message], options: dict[str, Any]) -> None:
        if unknown := set(options) - template.variables:
            name = min(unknown)
            raise UserError(
                f"{template.where}: the chat template has no option {name!r}{nearest(name, template.variables)}"
            )
        for i, message in enumerate(messages):
            if "tool_calls" in message and "tool_calls" not in template.source:
                raise UserError(
                    f"message {i} calls a tool, but the chat template of {template.where} cannot render tool calls"
                )

    def _adapt(self, i: int, message: Message) -> Message:
        """The message as this template reads it, with the control tokens in its strings disarmed."""
        message = {key: value for key, value in message.items() if key != "train"}
        if reasoning := next((message[key] for key in REASONING if key in message), None):
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        content = message.get("content")
        if self._parts and isinstance(content, str):
            message["content"] = [{"type": "text", "text": content}]
        elif not self._parts and isinstance(content, list) and message["role"] not in ("tool", "ipython"):
            message["content"] = join_parts(content, i)
        if self._text_arguments:
            message = _text_calls(message)
        if self._text_results:
            message = _text_result(message)
        role = message.pop("role")
        # an assistant may write markup such as <think>, but no special token
        return {"role": role, **self._guards[role == "assistant"].copy(message)}

    def _can_render(self, messages: list[Message], text: str = PROBE) -> bool:
        variables = {"tools": None, "documents": None, **self.special}
        try:
            return text in self.templates["default"].render(messages=messages, add_generation_prompt=False, **variables)
        except UserError:
            return False

    def _turn_end(self, text: str, start: int, end: int) -> int:
        """Where the turn's last control token ends, if nothing but white space follows it."""
        last = max((stop for _, stop, _ in self._added.find(text[start:end], [(end - start, True)])), default=0)
        return start + last if last and not text[start + last : end].strip() else end


class _Guard:
    """Puts GUARD into strings, so that neither a control token in them nor a piece of one at an edge can act as one."""

    def __init__(self, added: AddedTokens, special_only: bool) -> None:
        contents = added.contents(special_only=special_only)
        heads = sorted({c[:i] for c in contents for i in range(1, len(c))}, key=len, reverse=True)
        tails = sorted({c[i:] for c in contents for i in range(1, len(c))}, key=len, reverse=True)
        self._inside = _any(contents)
        self._at_end = re.compile(f"(?:{_any(heads).pattern})\\Z")
        self._at_start = _any(tails)

    def copy(self, value: Any) -> Any:
        """``value``, of JSON types, with every string in it disarmed. Raises UserError for other types."""
        if isinstance(value, str):
            check_unicode(value)  # the marks are lone surrogates
            value = self._inside.sub(lambda match: match[0][0] + GUARD + match[0][1:], value)
            value = self._at_end.sub(lambda match: match[0] + GUARD, value)
            return GUARD + value if self._at_start.match(value) else value
        if isinstance(value, dict):
            return {self.copy(key): self.copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.copy(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise UserError(
            f"a message holds a {type(value).__name__}; only text, numbers, lists and mappings can be rendered"
        )


def _any(strings: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, strings)) or "(?!)")


def _text_calls(message: Message) -> Message:
    """The message with its tool calls' arguments as JSON text, which some templates paste."""
    if "tool_calls" not in message:
        return message
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _text_result(message: Message) -> Message:
    """The message with a tool's result as JSON text, if it is an object, which some templates do not render as such."""
    if message["role"] != "tool" or not isinstance(message["content"], dict):
        return message
    return {**message, "content": json.dumps(message["content"], ensure_ascii=False)}


def _prefix(text: str, head: str, i: int, closing: str = "", *, where: str, has_system: bool) -> int:
    """The length of ``head``, or of that without ``closing``, which ``text`` must start with."""
    for start in (head, head.removesuffix(closing)):
        if text.startswith(start):
            return len(start)
    hint = ". Of templates that show the system message in the last question alone, as Mistral's, a data set's "
    hint += "system_into_question makes the first one begin with it"
    raise UserError(
        f"message {i}: {where} is not prefix-stable: it renders a conversation up to here differently once an answer "
        "or more messages follow (it may drop earlier reasoning), so which tokens the model must produce cannot be "
        "told. Use train_on: last, single turns, a chat_format that keeps the reasoning of every turn (qwen3, qwen3_5, "
        "deepseek_v3), or a chat_format .jinja file with {% generation %} marks" + hint * has_system
    )


def _span_runs(text: str, spans: list[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    done = 0
    for start, end in spans:
        yield text[done:start], False
        yield text[start:end], True
        done = end
    yield text[done:], False


def _marked_runs(text: str, train: list[bool], where: str) -> Iterator[tuple[str, bool]]:
    """(text, learned) between the marks; the k-th mark is the k-th assistant message."""
    runs = re.split(f"{START}([^{END}]*){END}", text)
    num_marks = len(runs) // 2
    if train and not num_marks:
        raise UserError(f"{where}: the chat template's {{% generation %}} marks nothing in this conversation")
    if num_marks != len(train) and any(train) and not all(train):
        raise UserError(
            f"{where}: the chat template marks {num_marks} spans in {len(train)} assistant messages, so these cannot "
            "be chosen one by one with 'train' or train_on: last"
        )
    learned = train if num_marks == len(train) else [any(train)] * num_marks
    for i, run in enumerate(runs):
        yield run, i % 2 == 1 and learned[i // 2]
