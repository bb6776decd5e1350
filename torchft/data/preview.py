"""Samples as people read them: token texts with their mask; and what a run's data holds, gathered for a preview."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from torchft.data.batch import Batch
from torchft.data.loader import Loader
from torchft.data.samples import Sample
from torchft.data.stream_loader import StreamLoader
from torchft.data.summary import Summary
from torchft.losses.likelihood import IGNORE
from torchft.tokenizers.tokenizer import Tokenizer

BARS = 32  # of the histogram of lengths
MEASURED_BATCHES = 32  # that tell how full rows are


@dataclass(frozen=True, kw_only=True)
class Token:
    text: str  # "" of a token that ends a character which the one before it shows
    id: int
    is_trained: bool
    is_control: bool


@dataclass(frozen=True, kw_only=True)
class Document:
    """A sample of a row, or one of the two that a pair has."""

    where: str  # "data/train.jsonl:17"
    role: str  # chosen, rejected or ""
    tokens: list[Token]


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a run would see.

    Args:
        rows: the first ones, as batches have them: the documents of each, and its tokens of padding.
        bars: (from, to, how many samples have so many tokens).
        fill: share of the rows' tokens that are no padding.
        tokens: that the run trains through, padding left out.
    """

    summary: Summary
    rows: list[tuple[list[Document], int]]
    bars: list[tuple[int, int, int]]
    median: int
    fill: float
    steps: int
    rows_per_step: int
    tokens: int


def look(
    loader: Loader | StreamLoader,
    summary: Summary,
    tokenizer: Tokenizer,
    *,
    num_rows: int,
    micro_steps: int,
    epochs: int,
    max_steps: int | None,
) -> Preview:
    """The first rows of a loader that nobody else uses, and what a run over it comes to."""
    steps = loader.num_steps(micro_steps, epochs=epochs, max_steps=max_steps)
    lengths = sorted(loader.samples.lengths())
    batches = list(islice(loader, MEASURED_BATCHES))
    rows: list[tuple[list[Document], int]] = []
    for batch in batches:
        rows += _rows(batch, tokenizer) if len(rows) < num_rows else []
    real = sum(sum(batch.lengths) for batch in batches)  # tokens that are no padding, of this rank
    per_batch = real / len(batches) * loader.all_rows / loader.batch_size
    return Preview(
        summary=summary,
        rows=rows[:num_rows],
        bars=_bars(lengths),
        median=lengths[len(lengths) // 2],
        fill=real / sum(batch.num_tokens for batch in batches),
        steps=steps,
        rows_per_step=loader.all_rows * micro_steps,
        tokens=round(per_batch * micro_steps * steps),
    )


def masked_tokens(sample: Sample, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(text, is it trained on) of each token."""
    return list(zip(token_texts(sample.tokens, tokenizer), _is_trained(sample.labels), strict=True))


def judged_tokens(sample: Sample, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(text, is what is read there judged) of each token, where labels are of their own places: scores, embeddings."""
    judged = [label != IGNORE for label in sample.labels]
    return list(zip(token_texts(sample.tokens, tokenizer), judged, strict=True))


def token_texts(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token; where several make one character, the first has it and the others ''."""
    texts: list[str] = []
    while len(texts) < len(tokens):
        at = len(texts)
        decoded = (tokenizer.decode(tokens[at:end]) for end in range(at + 1, min(at + 5, len(tokens) + 1)))
        options = [next(decoded)]
        while "\ufffd" in options[-1] and (more := next(decoded, None)) is not None:
            options.append(more)
        whole = "\ufffd" not in options[-1]
        texts += [options[-1], *[""] * (len(options) - 1)] if whole else options[:1]
    return texts


def _is_trained(labels: Sequence[int]) -> list[bool]:
    return [False, *(label != IGNORE for label in labels[:-1])]  # labels are those of the next token


def _rows(batch: Batch, tokenizer: Tokenizer) -> Iterator[tuple[list[Document], int]]:
    """The documents of each row, in the order in which they stand there, and its padding."""
    owner = {d: (k, i) for k, of in enumerate(batch.documents_of.tolist()) for i, d in enumerate(of)}
    is_pair, number = batch.documents_of.shape[1] == 2, 0
    for r in range(len(batch.tokens)):
        starts = [0] if batch.positions is None else (batch.positions[r] == 0).nonzero().flatten().tolist()
        documents, padding = [], 0
        for start, stop in pairwise([*starts, batch.tokens.shape[1]]):
            if number in owner:
                sample, part = owner[number]
                if batch.positions is None:
                    stop, padding = batch.lengths[sample], stop - batch.lengths[sample]
                tokens, labels = batch.tokens[r, start:stop].tolist(), batch.labels[r, start:stop].tolist()
                role = ("chosen", "rejected")[part] if is_pair else ""
                documents.append(_document(batch.where[sample], role, tokens, labels, tokenizer))
            else:
                padding = stop - start
            number += 1
        yield documents, padding


def _document(where: str, role: str, tokens: list[int], labels: list[int], tokenizer: Tokenizer) -> Document:
    shown = zip(token_texts(tokens, tokenizer), tokens, _is_trained(labels), strict=True)
    return Document(
        where=where,
        role=role,
        tokens=[
            Token(text=text, id=id, is_trained=on, is_control=bool(text.strip()) and tokenizer.num_control(text) == 1)
            for text, id, on in shown
        ],
    )


def _bars(lengths: list[int]) -> list[tuple[int, int, int]]:
    """Ascending ``lengths`` as a histogram of equal steps."""
    step = -(-lengths[-1] // BARS)
    edges = list(range(0, lengths[-1] + step, step))
    return [(a + 1, b, bisect_right(lengths, b) - bisect_right(lengths, a)) for a, b in pairwise(edges)]
