"""Conversations as messages, for decoding instead of training."""

from typing import Any

from torchft.data.messages import FORMATS, RowError, detect
from torchft.data.sources import Source, rows
from torchft.errors import UserError


def conversations(source: str, *, max_rows: int) -> list[list[dict[str, Any]]]:
    """The conversations of ``source`` (as a dataset's) that end in an answer. UserError with file:line for any other."""
    found = []
    for row in rows(Source(path=source, max_rows=max_rows)):
        try:
            messages = FORMATS[detect(row.values)](row.values)
        except RowError as e:
            raise UserError(f"{row.origin}:{row.number}: {e}") from None
        if len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise UserError(f"{row.origin}:{row.number}: the last message must be the assistant's, after a question")
        found.append(messages)
    return found
