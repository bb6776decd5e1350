"""The step from a row that judges answers to tokens with a mask; `preferences` has the functions that a config names.

A prompt and an answer are both messages, or both plain text.
"""

from array import array
from typing import Any

from torchft.data.encoders import control_notes, notes_of, plain_ids, start_ids
from torchft.data.messages import (
    FORMATS,
    TURNS,
    Message,
    RowError,
    Values,
    detect,
    is_null,
    missing,
    text,
    without_empty,
)
from torchft.data.samples import Encoded, Samples
from torchft.errors import UserError
from torchft.losses.likelihood import IGNORE
from torchft.tokenizers.tokenizer import Tokenizer

Side = str | list[Message]  # a prompt or an answer

YES, NO = ("1", "true", "yes"), ("0", "-1", "false", "no")


def pair(row: Values, *, tokenizer: Tokenizer, margin_column: str | None) -> Encoded:
    """Both answers with their prompt, chosen first, as two documents."""
    if absent := [column for column in ("chosen", "rejected") if column not in row]:
        raise RowError(missing(absent, row))
    for column in ("chosen", "rejected"):
        if _is_blank(row[column]):
            raise RowError(f"{column!r} is empty: a pair needs both answers")
    if row["chosen"] == row["rejected"]:
        raise RowError("'chosen' and 'rejected' are the same, so that neither is preferred; remove the row")
    prompt, *answers = split_pair(row, has_chat=tokenizer.has_chat)
    one, other = (answered(prompt, answer, tokenizer=tokenizer) for answer in answers)
    if one.tokens == other.tokens:
        raise RowError("'chosen' and 'rejected' become the same tokens, so that neither is preferred; remove the row")
    return Encoded(
        one.tokens + other.tokens,
        one.train + other.train,
        one.notes | other.notes,
        border=len(one.tokens),
        targets=() if margin_column is None else (number(row, margin_column),),
    )


def rated(row: Values, *, tokenizer: Tokenizer) -> Encoded:
    """An answer with its prompt; its target is 1.0 if the column "label" says that it is good, 0.0 if bad."""
    if "label" not in row:
        raise RowError(missing(["label"], row))
    answer = answered(*split_answer(row, has_chat=tokenizer.has_chat), tokenizer=tokenizer)
    return answer._replace(targets=(float(_is_yes(row["label"], "label")),))


def scored(row: Values, *, tokenizer: Tokenizer, columns: list[str]) -> Encoded:
    """An answer with its prompt; its targets are the numbers in ``columns``."""
    answer = answered(*split_answer(row, has_chat=tokenizer.has_chat), tokenizer=tokenizer)
    return answer._replace(targets=tuple(number(row, column) for column in columns))


def steps(row: Values, *, tokenizer: Tokenizer, end: list[int]) -> Encoded:
    """A prompt and steps of reasoning, each with the tokens ``end``, where its label, 1 or 0, is what is learned."""
    parts, judgements = _list(row, "completions"), _list(row, "labels")
    if len(parts) != len(judgements):
        raise RowError(f"'completions' has {len(parts)} steps, but 'labels' has {len(judgements)}")
    prompt = text(row, "prompt")
    if tokenizer.has_chat:
        tokens = list(tokenizer.render([{"role": "user", "content": prompt}], add_generation_prompt=True).tokens)
    else:
        tokens = [*start_ids(tokenizer), *plain_ids(tokenizer, prompt)]
    labels, texts = [IGNORE] * len(tokens), [prompt]
    for i, (part, judgement) in enumerate(zip(parts, judgements)):
        content = text({f"completions[{i}]": part}, f"completions[{i}]")
        ids = [*plain_ids(tokenizer, content), *end]
        tokens += ids
        labels += [IGNORE] * (len(ids) - 1) + [int(_is_yes(judgement, f"labels[{i}]"))]
        texts.append(content)
    return Encoded(tokens, [label != IGNORE for label in labels], control_notes(tokenizer, *texts), labels=labels)


def answered(prompt: Side, answer: Side, *, tokenizer: Tokenizer) -> Encoded:
    """A prompt, and its answer with its end, which alone is trained."""
    if isinstance(prompt, str) and isinstance(answer, str):
        before = [*start_ids(tokenizer), *plain_ids(tokenizer, prompt)]
        after = [*plain_ids(tokenizer, answer), tokenizer.eos_id]
        notes = control_notes(tokenizer, prompt, answer)
        return Encoded(before + after, [False] * len(before) + [True] * len(after), notes)
    assert isinstance(prompt, list) and isinstance(answer, list)
    messages = without_empty([*({**message, "train": False} for message in prompt), *answer])
    try:
        rendered = tokenizer.render(messages)
    except UserError as e:
        raise RowError(str(e)) from None
    return Encoded(rendered.tokens, rendered.train, notes_of(rendered))


def read_at_ends(samples: Samples) -> Samples:
    """``samples`` whose documents are judged at their last token, which alone has a label, 0. Changed in place."""
    labels = array("i", [IGNORE]) * len(samples.tokens)
    for i in range(len(samples)):
        for document in samples.documents(i):
            labels[document.stop - 1] = 0
    samples.labels = labels
    samples._fingerprint = ""
    return samples


def safe_pad_id(samples: Samples) -> int | None:
    """What may pad rows of these documents for transformers, which reads the last token that is no padding.

    None if a document ends in the padding token: then it takes one row at a time, and reads the last token.
    """
    ends = {samples.tokens[document.stop - 1] for i in range(len(samples)) for document in samples.documents(i)}
    return None if samples.pad_id in ends else samples.pad_id


def split_pair(row: Values, *, has_chat: bool) -> tuple[Side, Side, Side]:
    """The prompt and the two answers of a row, whichever way it writes them."""
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = next((row[column] for column in ("prompt", *TURNS) if not is_null(row.get(column))), None)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            start = _common_text(chosen, rejected)
            return start, chosen[len(start) :], rejected[len(start) :]
        if isinstance(prompt, str) and not has_chat:
            return text(row, "prompt"), chosen, rejected
    sides = [_messages(answer, column) for answer, column in ((chosen, "chosen"), (rejected, "rejected"))]
    if prompt is None or any(side[0]["role"] != "assistant" for side in sides):  # whole conversations
        common = _common_messages(*sides)
        return sides[0][:common], sides[0][common:], sides[1][common:]
    return _messages(prompt, "prompt", role="user"), sides[0], sides[1]


def split_answer(row: Values, *, has_chat: bool) -> tuple[Side, Side]:
    """The prompt and the answer of a row: "prompt" and "completion", or a conversation's last message."""
    if "prompt" in row and "completion" in row:
        prompt, answer = row["prompt"], row["completion"]
        if _is_blank(answer):
            raise RowError("'completion' is empty: there is no answer to judge")
        if isinstance(prompt, str) and isinstance(answer, str) and not has_chat:
            return text(row, "prompt"), answer
        return _messages(prompt, "prompt", role="user"), _messages(answer, "completion")
    messages = FORMATS[detect(row)](row)
    if messages[-1]["role"] != "assistant":
        raise RowError(f"the last message is the {messages[-1]['role']}'s: there is no answer to judge")
    return messages[:-1], messages[-1:]


def _messages(value: Any, column: str, role: str = "assistant") -> list[Message]:
    """Messages in either form, one of them, or its text alone, which is of ``role``."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    row = {"messages": [value] if isinstance(value, dict) else value}
    try:
        return FORMATS[detect(row)](row)
    except RowError as e:
        raise RowError(f"{column!r}: {e}") from None


def _common_messages(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages both conversations begin with, their answers left out."""
    common = 0
    for one, other in zip(chosen[:-1], rejected[:-1]):
        if one != other:
            break
        common += 1
    if not common:
        raise RowError("'chosen' and 'rejected' answer different prompts: their first messages differ")
    return common


def _common_text(chosen: str, rejected: str) -> str:
    """What both texts begin with, up to the white space before the first word that differs."""
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    start = chosen[: max(0, *(chosen.rfind(space, 0, same) for space in " \n\t"))]
    if not start.strip() or any(not side[len(start) :].strip() for side in (chosen, rejected)):
        raise RowError("'chosen' and 'rejected' are texts that begin differently: give their prompt in a column")
    return start


def _is_blank(value: Any) -> bool:
    return is_null(value) or value == [] or (isinstance(value, str) and not value.strip())


def _is_yes(value: Any, name: str) -> bool:
    word = str(int(value) if isinstance(value, float) and value.is_integer() else value).lower()
    if word not in (*YES, *NO):
        raise RowError(f"{name} is {value!r}: a judgement is true or 1, false or 0")
    return word in YES


def number(row: Values, column: str) -> float:
    if column not in row:
        raise RowError(missing([column], row))
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise RowError(f"{column!r} must be a number, found {value!r:.60}")
    return float(value)


def _list(row: Values, column: str) -> list[Any]:
    if column not in row:
        raise RowError(missing([column], row))
    if not isinstance(row[column], list) or not row[column]:
        raise RowError(f"{column!r} must be a list with an item for each step, found {row[column]!r:.60}")
    return row[column]
