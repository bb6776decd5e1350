"""Conversations as messages, for decoding instead of training."""

from typing import Any

from torchft.data.messages import FORMATS, RowError, detect
from torchft.data.sources import Source, rows
from torchft.errors import UserError


def conversations(source: str, *, max_rows: int) -> list[list[dict[str, Any]]]:
    """The conversations of ``source`` (as a dataset's). UserError with file:line for one that ends in no answer."""
    found = []
    for row in rows(Source(path=source, max_rows=max_rows)):
        try:
            messages = FORMATS[detect(row.values)](row.values)
        except RowError as e:
            raise UserError(f"{row.origin}:{row.number}: {e}") from None
        is_text = all(isinstance(message.get("content"), str) for message in messages[-2:])
        if len(messages) < 2 or messages[-1]["role"] != "assistant" or not is_text:
            raise UserError(f"{row.origin}:{row.number}: the last two messages must be a question and its answer, text")
        found.append(messages)
    return found
