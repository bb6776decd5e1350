"""The step from a row to tokens with a mask: `conversation`, `prompt_and_answer`, `document` make such a function."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from torchft.data.messages import (
    FORMATS,
    RowError,
    Values,
    detect,
    fill,
    is_null,
    rename,
    text,
    with_system,
    without_empty,
)
from torchft.data.samples import Encoded
from torchft.errors import UserError
from torchft.tokenizers.tokenizer import Tokenizer

Encoder = Callable[[Values], Encoded]

PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


def conversation(
    tokenizer: Tokenizer, format: str, column_map: Mapping[str, str], *, train_on: str, new_system_prompt: str | None
) -> Encoder:
    """Messages in the checkpoint's chat format. ``format``: a key of FORMATS, or "auto": the first row decides."""
    found = format

    def encode(row: Values) -> Encoded:
        nonlocal found
        row = rename(row, column_map)
        if found == "auto":
            found = detect(row)
        messages = without_empty(FORMATS[found](row))
        if new_system_prompt is not None:
            messages = with_system(messages, new_system_prompt)
        try:
            rendered = tokenizer.render(messages, tools=_tools(row), train_on=train_on)
        except UserError as e:
            raise RowError(str(e)) from None
        return Encoded(rendered.tokens, rendered.train, has_control_text=rendered.num_escaped > 0)

    return encode


def prompt_and_answer(
    tokenizer: Tokenizer, template: str | None, column_map: Mapping[str, str], *, train_on: str
) -> Encoder:
    """Plain text: the template filled in, the answer, the end-of-text token. The last two are trained.

    The answer is the column "completion", or "output". Without a template it is "{prompt}", or PROMPT for an
    "instruction".
    """
    start = _start(tokenizer)

    def encode(row: Values) -> Encoded:
        row = rename(row, column_map)
        if template is not None:
            prompt = fill(template, row)
        elif "prompt" in row:
            prompt = text(row, "prompt")
        else:
            text(row, "instruction")  # which, unlike "input", must not be empty
            prompt = fill(PROMPT if is_null(row.get("input")) or row["input"] == "" else PROMPT_WITH_INPUT, row)
        answer = text(row, "completion" if "completion" in row else "output")
        before = [*start, *_plain(tokenizer, prompt)]
        after = [*_plain(tokenizer, answer), tokenizer.eos_id]
        train = [train_on == "all"] * len(before) + [True] * len(after)
        return Encoded(before + after, train, tokenizer.num_control(prompt) + tokenizer.num_control(answer) > 0)

    return encode


def document(tokenizer: Tokenizer, column_map: Mapping[str, str], *, add_eos: bool) -> Encoder:
    """The column "text", all of it trained, with the end-of-text token."""
    start, end = _start(tokenizer), [tokenizer.eos_id] * add_eos

    def encode(row: Values) -> Encoded:
        content = text(rename(row, column_map), "text")
        tokens = [*start, *_plain(tokenizer, content), *end]
        return Encoded(tokens, [True] * len(tokens), tokenizer.num_control(content) > 0)

    return encode


def _start(tokenizer: Tokenizer) -> list[int]:
    """The beginning-of-text token, if this checkpoint puts it before a text."""
    return [i for i in tokenizer.encode("", add_special_tokens=True)[:1] if i == tokenizer.bos_id]


def _plain(tokenizer: Tokenizer, content: str) -> list[int]:
    """The tokens of text in which nothing is a control token."""
    try:
        return tokenizer.encode(content, control=False)
    except UserError as e:
        raise RowError(str(e)) from None


def _tools(row: Values) -> list[dict[str, Any]] | None:
    """The column "tools": a list of function descriptions, or the same as JSON text, which tables need."""
    tools = row.get("tools")
    if is_null(tools) or tools in ("", []):
        return None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as e:
            raise RowError(f"'tools' is not valid JSON: {e}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("'tools' must be a list of objects that describe functions")
    return tools or None
