"""The step from a row to tokens with a mask. An encoder is one of these functions with all but the row given."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torchft.data.messages import Message, RowError, Values, fill, is_null, text, with_system, without_empty
from torchft.data.samples import CONTROL_TEXT, Encoded, Notes
from torchft.errors import UserError
from torchft.tokenizers.chat import Rendered
from torchft.tokenizers.tokenizer import Tokenizer

Encoder = Callable[[Values], Encoded]

PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


def conversation(
    row: Values,
    *,
    tokenizer: Tokenizer,
    messages_of: Callable[[Values], list[Message]],
    train_on: str,
    new_system_prompt: str | None = None,
    system_into_question: bool = False,
) -> Encoded:
    """Messages in the checkpoint's chat format."""
    messages = without_empty(messages_of(row))
    if new_system_prompt is not None:
        messages = with_system(messages, new_system_prompt)
    if system_into_question:
        messages = system_in_question(messages)
    try:
        rendered = tokenizer.render(messages, tools=_tools(row), train_on=train_on)
    except UserError as e:
        raise RowError(str(e)) from None
    return Encoded(rendered.tokens, rendered.train, notes_of(rendered))


def prompt_and_answer(row: Values, *, tokenizer: Tokenizer, template: str | None, train_on: str) -> Encoded:
    """Plain text: the template filled in, the answer, the end-of-text token. The last two are trained.

    The answer is the column "completion", or "output". Without a template it is "{prompt}", or PROMPT for an
    "instruction".
    """
    if template is not None:
        prompt = fill(template, row)
    elif "prompt" in row:
        prompt = text(row, "prompt")
    else:
        text(row, "instruction")  # which, unlike "input", must not be empty
        prompt = fill(PROMPT if is_null(row.get("input")) or row["input"] == "" else PROMPT_WITH_INPUT, row)
    answer = text(row, "completion" if "completion" in row else "output")
    before = [*start_ids(tokenizer), *plain_ids(tokenizer, prompt)]
    after = [*plain_ids(tokenizer, answer), tokenizer.eos_id]
    train = [train_on == "all"] * len(before) + [True] * len(after)
    return Encoded(before + after, train, control_notes(tokenizer, prompt, answer))


def document(row: Values, *, tokenizer: Tokenizer, add_eos: bool) -> Encoded:
    """The column "text", all of it trained, with the end-of-text token."""
    content = text(row, "text")
    tokens = [*start_ids(tokenizer), *plain_ids(tokenizer, content), *[tokenizer.eos_id] * add_eos]
    return Encoded(tokens, [True] * len(tokens), control_notes(tokenizer, content))


def ids(row: Values) -> Encoded:
    """Tokens that are ids already: "input_ids" with "labels" (the same ids, or -100 where nothing is trained), with a
    "loss_mask" of 0 and 1, or with neither: then every token is trained."""
    tokens = _integers(row, "input_ids")
    if min(tokens) < 0:
        raise RowError(f"input_ids[{tokens.index(min(tokens))}] is {min(tokens)}; ids start at 0")
    mask = next((column for column in ("labels", "loss_mask") if not is_null(row.get(column))), None)
    if mask is None:
        return Encoded(tokens, [True] * len(tokens))
    values = _integers(row, mask)
    if len(values) != len(tokens):
        raise RowError(f"'{mask}' has {len(values)} values, but 'input_ids' {len(tokens)}")
    if mask == "loss_mask":
        return Encoded(tokens, [value != 0 for value in values])
    for i, (token, label) in enumerate(zip(tokens, values)):
        if label not in (-100, token):
            raise RowError(
                f"labels[{i}] is {label}, but input_ids[{i}] is {token}: a label is the id at its own place, or -100. "
                "torchft shifts labels itself"
            )
    return Encoded(tokens, [label != -100 for label in values])


def rendered(tokenizer: Tokenizer, messages_of: Callable[[Values], list[Message]], **options: Any) -> Encoder:
    """`conversation` for a checkpoint with a chat template. UserError for one without."""
    if not tokenizer.has_chat:
        raise UserError(
            "dataset: this checkpoint has no chat template. Start from an instruct checkpoint, name a chat_format, or "
            "use torchft.data.datasets.instruct, which needs none"
        )
    return partial(conversation, tokenizer=tokenizer, messages_of=messages_of, **options)


def start_ids(tokenizer: Tokenizer) -> list[int]:
    """The beginning-of-text token, if this checkpoint puts it before a text."""
    return [i for i in tokenizer.encode("", add_special_tokens=True)[:1] if i == tokenizer.bos_id]


def plain_ids(tokenizer: Tokenizer, content: str) -> list[int]:
    """The tokens of text in which nothing is a control token."""
    try:
        return tokenizer.encode(content, control=False)
    except UserError as e:
        raise RowError(str(e)) from None


def notes_of(rendered: Rendered) -> Notes:
    """What is odd about a rendered conversation."""
    found = {f"hold {what} that the chat format leaves out" for what in rendered.left_out}
    return Notes(found | {CONTROL_TEXT} if rendered.num_escaped else found)


def control_notes(tokenizer: Tokenizer, *texts: str) -> Notes:
    """Of plain texts, in which nothing is a control token."""
    return Notes([CONTROL_TEXT] if any(map(tokenizer.num_control, texts)) else [])


def system_in_question(messages: list[Message]) -> list[Message]:
    """A system message written at the beginning of the first question, for chat formats that have no place for one."""
    match messages:
        case [{"role": "system", "content": str(system)}, {"role": "user", "content": str(question)}, *others]:
            return [{"role": "user", "content": f"{system}\n\n{question}"}, *others]
        case [{"role": "system"}, *_]:
            raise RowError("system_into_question: the system message and the question after it must be text")
    return messages


def _integers(row: Values, column: str) -> list[int]:
    values = row.get(column)
    if isinstance(values, Sequence) and not isinstance(values, str) and all(type(value) is int for value in values):
        if not values:
            raise RowError(f"{column!r} is empty")
        return list(values)
    raise RowError(f"{column!r} must be a list of token ids, found {values!r:.60}")


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
    if not isinstance(tools, list) or not all(
        isinstance(t, dict) and isinstance(t.get("function", t), dict) for t in tools
    ):
        raise RowError("'tools' must be a list of objects that describe functions")
    return tools or None
