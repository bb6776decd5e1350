"""Texts that belong together, to train embeddings with: a question, what answers it and, if wanted, what does not.

    dataset: {_component_: torchft.data.texts.texts, source: data/train.jsonl, num_negatives: 1}

A row is one sample of 2 + num_negatives documents, in this order, each with the tokenizer's special tokens around it.
"""

from functools import partial

from torchft.data.builder import builder
from torchft.data.encoders import Encoder, control_notes
from torchft.data.messages import RowError, Values, missing, text
from torchft.data.samples import ENDS, Encoded, Samples
from torchft.errors import UserError
from torchft.losses.likelihood import IGNORE
from torchft.tokenizers.tokenizer import Tokenizer


@builder(whole=True, too_long="drop")
def texts(
    tokenizer: Tokenizer,
    example: Values,
    *,
    query: str = "query",
    positive: str = "positive",
    negative: str = "negative",
    num_negatives: int = 0,
    text_len: int = 128,
    query_prompt: str = "",
    document_prompt: str = "",
) -> Encoder:
    """Columns with a query, the text that belongs to it and ones that do not, a list or one text.

    Args:
        query, positive, negative: the columns' names.
        num_negatives: texts of ``negative`` that are taken, the first ones; each row must have as many.
        text_len: tokens of a text, special ones included; what is longer loses its end.
        query_prompt, document_prompt: put before each text, for example "query: ".
    """
    if num_negatives < 0 or text_len < 2:
        raise UserError(f"dataset: num_negatives is {num_negatives}, text_len {text_len}; at least 0 and 2")
    columns = (query, positive, *([negative] if num_negatives else []))
    return partial(
        encode, tokenizer=tokenizer, columns=columns, num_negatives=num_negatives, text_len=text_len,
        prompts=(query_prompt, document_prompt),
    )  # fmt: skip


def encode(
    row: Values,
    *,
    tokenizer: Tokenizer,
    columns: tuple[str, ...],
    num_negatives: int,
    text_len: int,
    prompts: tuple[str, str],
) -> Encoded:
    """The row's documents, each of which ends at the one token that has a label, 0."""
    if absent := [column for column in columns if column not in row]:
        raise RowError(missing(absent, row))
    parts = [text(row, columns[0]), text(row, columns[1])]
    if num_negatives:
        negatives = row[columns[2]] if isinstance(row[columns[2]], list) else [row[columns[2]]]
        if len(negatives) < num_negatives:
            raise RowError(f"{columns[2]!r} has {len(negatives)} texts, but num_negatives is {num_negatives}")
        for i, value in enumerate(negatives[:num_negatives]):
            name = f"{columns[2]}[{i}]"
            parts.append(text({name: value}, name))
            if parts[-1] == parts[1]:
                raise RowError(f"{name!r} is the text of {columns[1]!r}, which cannot be right and wrong; remove it")
    tokens: list[int] = []
    labels: list[int] = []
    for part, prompt in zip(parts, (prompts[0], *[prompts[1]] * (len(parts) - 1)), strict=True):
        ids = tokenizer.encode_within(prompt + part, text_len)
        tokens += ids
        labels += [IGNORE] * (len(ids) - 1) + [0]
    notes = control_notes(tokenizer, *parts)
    return Encoded(tokens, [label != IGNORE for label in labels], notes, border=ENDS, labels=labels)


def check_lengths(samples: Samples | None, num_positions: int) -> None:
    """UserError for a document with more tokens than ``num_positions``."""
    if samples is None:
        return
    longest = max(place.stop - place.start for i in range(len(samples)) for place in samples.documents(i))
    if longest > num_positions:
        raise UserError(f"dataset.text_len: a text has {longest} tokens, but the model has {num_positions} positions")
