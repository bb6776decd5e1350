"""Which rows a data set takes: conditions on columns, written as data.

    filters:
      language: en                  # equal
      source: [wiki, books]         # one of them
      score: {min: 4}               # min, max: numbers, or text in its order
      meta.license: {not: [null, unknown]}   # a dot reads a field of an object
      text: {matches: "\\d"}        # a regular expression found in the text
      output: {min_chars: 20, max_chars: 8000}

Every condition must hold.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torchft.data.messages import RowError, Values, is_null
from torchft.errors import UserError
from torchft.names import nearest


def check(filters: Mapping[str, Any]) -> None:
    """UserError with every condition that means nothing."""
    problems = []
    for column, condition in filters.items():
        for key, value in condition.items() if isinstance(condition, Mapping) else ():
            if key not in CONDITIONS:
                problems.append(
                    f"filters.{column}: unknown condition {key!r}{nearest(key, CONDITIONS)}; {', '.join(CONDITIONS)}"
                )
            elif key == "matches":
                try:
                    re.compile(value)
                except (re.error, TypeError) as e:
                    problems.append(f"filters.{column}.matches: {value!r} is not a regular expression: {e}")
            elif key in ("min_chars", "max_chars") and not isinstance(value, int):
                problems.append(f"filters.{column}.{key}: {value!r} is not a number of characters")
    if problems:
        raise UserError(*(f"dataset.{problem}" for problem in problems))


def passes(row: Values, filters: Mapping[str, Any]) -> bool:
    """Whether ``row`` meets every condition. RowError for a column that it does not have, or cannot be compared."""
    return all(_holds(_read(row, column), condition, column) for column, condition in filters.items())


def _read(row: Values, column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise RowError(f"filters: no column {column!r}{nearest(column, row)}; the columns are {list(row)}")
        value = value[name]
    return value


def _holds(value: Any, condition: Any, column: str) -> bool:
    value = None if is_null(value) else value
    if not isinstance(condition, Mapping):
        return _is_among(value, condition)
    if value is None and set(condition) != {"not"}:
        return False
    try:
        return all(CONDITIONS[key](value, limit) for key, limit in condition.items())
    except TypeError as e:
        raise RowError(
            f"filters.{column}: {condition} does not fit {type(value).__name__} {value!r:.40}: {e}"
        ) from None


def _is_among(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list) else bool(value == wanted)


CONDITIONS: dict[str, Callable[[Any, Any], bool]] = {
    "min": lambda value, limit: value >= limit,
    "max": lambda value, limit: value <= limit,
    "not": lambda value, refused: not _is_among(value, refused),
    "matches": lambda value, pattern: re.search(pattern, value) is not None,
    "min_chars": lambda value, limit: len(value) >= limit,
    "max_chars": lambda value, limit: len(value) <= limit,
}
