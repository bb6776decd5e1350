"""Texts, or two texts together, that get a label or a score: `classes` for classification, `graded` and `candidates`
for rerankers (cross-encoders). A config names these functions as it does those of preferences.py.

    dataset: {_component_: torchft.data.labelled.classes, source: train.jsonl, labels: [negative, positive]}
    dataset: {_component_: torchft.data.labelled.candidates, source: train.jsonl, num_negatives: 7}

A text has the tokenizer's special tokens around it, two texts those of a pair: what transformers' tokenizers make of
them, with ``truncation=True`` to ``text_len`` tokens.
"""

import json
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torchft.data.builder import builder
from torchft.data.encoders import Encoder, control_notes
from torchft.data.judged import number
from torchft.data.messages import RowError, Values, missing, text
from torchft.data.samples import ENDS, Encoded, Notes
from torchft.errors import UserError
from torchft.losses.likelihood import IGNORE
from torchft.names import nearest
from torchft.tokenizers.tokenizer import Tokenizer


@builder(whole=True, too_long="drop")
def classes(
    tokenizer: Tokenizer,
    example: Values,
    *,
    labels: list[str],
    text: str = "text",
    text_pair: str | None = None,
    label: str = "label",
    several: bool = False,
    text_len: int = 512,
) -> Encoder:
    """Columns text and label, which is one of ``labels``; with ``text_pair`` a second text, as in entailment.

    Args:
        labels: all there are, in the order of the model's scores. Numbers, true and false are written as in JSON.
        text, text_pair, label: the columns' names.
        several: whether a row's label is a list of them, which may be empty (the loss is binary_cross_entropy then).
        text_len: tokens of a text, or of both, special ones included; what is longer loses its end.
    """
    if len(set(labels)) < 2 - several or len(set(labels)) < len(labels):
        raise UserError(f"dataset.labels: {labels} are not {1 if several else 2} different labels or more")
    return partial(
        labelled, tokenizer=tokenizer, texts=_columns(text, text_pair, text_len), column=label, labels=labels,
        several=several, text_len=text_len,
    )  # fmt: skip


@builder(whole=True, too_long="drop")
def graded(
    tokenizer: Tokenizer,
    example: Values,
    *,
    scores: list[str],
    text: str = "query",
    text_pair: str | None = "document",
    text_len: int = 512,
) -> Encoder:
    """Columns query and document, and numbers that judge how they go together: 0 or 1, or any from 0 to 1.

    Args:
        scores: the columns with the numbers, for example [relevance].
        text, text_pair: the columns' names; without ``text_pair`` a text alone is judged.
        text_len: tokens of both, special ones included; what is longer loses its end.
    """
    if not scores:
        raise UserError("dataset.scores: name at least one column of numbers")
    columns = _columns(text, text_pair, text_len)
    return partial(scored, tokenizer=tokenizer, texts=columns, scores=scores, text_len=text_len)


@builder(whole=True, too_long="drop")
def candidates(
    tokenizer: Tokenizer,
    example: Values,
    *,
    query: str = "query",
    positive: str = "positive",
    negative: str = "negative",
    num_negatives: int = 1,
    text_len: int = 512,
) -> Encoder:
    """Columns with a query, the text that answers it and ones that do not, a list or one text.

    A row is one sample: the query with each of the texts, the right one first. Of one negative it is a pair, as
    preferences.py makes them.

    Args:
        query, positive, negative: the columns' names.
        num_negatives: texts of ``negative`` that are taken, the first ones; each row must have as many.
        text_len: tokens of the query and a text, special ones included; what is longer loses its end.
    """
    if num_negatives < 1:
        raise UserError(f"dataset.num_negatives: {num_negatives} leaves nothing to compare with; at least 1")
    columns = (*_columns(query, positive, text_len), negative)
    return partial(compared, tokenizer=tokenizer, columns=columns, num_negatives=num_negatives, text_len=text_len)


def labelled(
    row: Values, *, tokenizer: Tokenizer, texts: tuple[str, ...], column: str, labels: list[str], several: bool,
    text_len: int,
) -> Encoded:  # fmt: skip
    """Its targets are 1.0 for each label that the row has, else 0.0."""
    if column not in row:
        raise RowError(missing([column], row))
    value = row[column]
    if several and not isinstance(value, list):
        raise RowError(f"{column!r} must be a list of labels, found {value!r:.60}")
    found = [_label(v, column, labels) for v in (value if several else [value])]
    return _document(row, texts, tokenizer, text_len)._replace(targets=tuple(float(name in found) for name in labels))


def scored(row: Values, *, tokenizer: Tokenizer, texts: tuple[str, ...], scores: list[str], text_len: int) -> Encoded:
    """Its targets are the numbers in ``scores``."""
    return _document(row, texts, tokenizer, text_len)._replace(targets=tuple(number(row, name) for name in scores))


def compared(
    row: Values, *, tokenizer: Tokenizer, columns: tuple[str, ...], num_negatives: int, text_len: int
) -> Encoded:
    """The query with each text, as documents of their own."""
    query, positive, negative = columns
    if absent := [column for column in columns if column not in row]:
        raise RowError(missing(absent, row))
    negatives = row[negative] if isinstance(row[negative], list) else [row[negative]]
    if len(negatives) < num_negatives:
        raise RowError(f"{negative!r} has {len(negatives)} texts, but num_negatives is {num_negatives}")
    values = {positive: row[positive]} | {f"{negative}[{i}]": v for i, v in enumerate(negatives[:num_negatives])}
    parts = [_document({**row, **values}, (query, name), tokenizer, text_len) for name in values]
    for name, part in zip(values, parts):
        if part is not parts[0] and part.tokens == parts[0].tokens:
            raise RowError(f"{name!r} is the text of {positive!r}, which cannot be right and wrong; remove it")
    return Encoded(
        [token for part in parts for token in part.tokens],
        [trained for part in parts for trained in part.train],
        Notes().union(*(part.notes for part in parts)),
        border=ENDS if num_negatives > 1 else len(parts[0].tokens),
        labels=[label for part in parts for label in part.labels or []],
    )


def label_names(settings: Iterable[Mapping[str, Any]], *, num_scores: int) -> list[str]:
    """What a model calls its scores: the labels of the data sets with these arguments, else score_0 and so on."""
    found = [list(args["labels"]) if "labels" in args else None for args in settings]
    if any(labels != found[0] for labels in found):
        raise UserError(f"dataset.labels: all data sets need the same ones in the same order, found {found}")
    return found[0] or [f"score_{i}" for i in range(num_scores)]


def _columns(one: str, other: str | None, text_len: int) -> tuple[str, ...]:
    if text_len < 5:
        raise UserError(f"dataset.text_len: {text_len} tokens leave no room for texts; at least 5")
    return (one,) if other is None else (one, other)


def _document(row: Values, columns: tuple[str, ...], tokenizer: Tokenizer, text_len: int) -> Encoded:
    """One or two texts; what is learned is learned at their last token."""
    if absent := [column for column in columns if column not in row]:
        raise RowError(missing(absent, row))
    parts = [text(row, column) for column in columns]
    if len(parts) == 1:
        tokens = tokenizer.encode_within(parts[0], text_len)
    else:
        tokens = tokenizer.encode_pair_within(parts[0], parts[1], text_len)
    labels = [IGNORE] * (len(tokens) - 1) + [0]
    return Encoded(tokens, [label != IGNORE for label in labels], control_notes(tokenizer, *parts), labels=labels)


def _label(value: Any, column: str, labels: list[str]) -> str:
    name = value if isinstance(value, str) else json.dumps(value)
    if name not in labels:
        known = f"{', '.join(labels)}{nearest(name, labels)}"
        raise RowError(f"{column!r} is {name!r}, which is none of the labels {known}")
    return name
