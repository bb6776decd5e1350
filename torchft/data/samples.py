"""Tokenised samples in flat arrays, and `collect`, which turns rows into them and counts what happens on the way."""

import hashlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from torchft.data.messages import EmptyError, RowError, Values
from torchft.data.sources import Row
from torchft.errors import UserError
from torchft.losses.likelihood import IGNORE

Policy = Literal["drop", "error"]

PROBLEMS_SHOWN = 5
PROBLEMS_LIMIT = 1000  # bad rows after which reading on is pointless


class Encoded(NamedTuple):
    """A row's tokens, which of them are trained, and whether its text spells a control token."""

    tokens: list[int]
    train: list[bool]
    has_control_text: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What becomes of rows that do not fit. "drop" counts them, "error" reports them together."""

    seq_len: int
    too_long: Literal["truncate", "split", "drop", "error"]
    empty_rows: Policy = "drop"
    bad_rows: Policy = "error"

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise UserError(f"seq_len: {self.seq_len} leaves no token to predict; at least 2")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """``labels[i]`` is the token after ``tokens[i]`` if that one is trained, else IGNORE; the last is IGNORE."""

    tokens: list[int]
    labels: list[int]


@dataclass
class Counts:
    """What happened between the rows and the samples."""

    rows: int = 0
    longest: int = 0  # tokens of a row before it was cut
    truncated: int = 0  # rows that lost their end
    split: int = 0  # rows that became several samples
    control_text: int = 0  # rows whose text spells a control token
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows


class Samples:
    """The samples of a data set, each at most ``seq_len`` tokens; 8 bytes per token, whatever their number.

    Sample i is ``tokens[starts[i] : starts[i + 1]]``, and the same for ``labels``. ``pad_id`` is what batches pad with.
    """

    def __init__(self, *, seq_len: int, pad_id: int) -> None:
        self.seq_len, self.pad_id = seq_len, pad_id
        self.tokens, self.labels, self.starts = array("i"), array("i"), array("q", [0])
        self.counts = Counts()
        self.numbers = array("q")  # where a sample came from: its row's number ...
        self.origins: list[tuple[int, str]] = []  # ... and (first sample, origin), ascending
        self.cache: Path | None = None  # the file that they were read from instead of being made
        self._fingerprint = ""

    def append(self, sample: Sample, *, origin: str, number: int) -> None:
        if not self.origins or self.origins[-1][1] != origin:
            self.origins.append((len(self), origin))
        self.tokens.extend(sample.tokens)
        self.labels.extend(sample.labels)
        self.starts.append(len(self.tokens))
        self.numbers.append(number)
        self._fingerprint = ""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self.starts[index], self.starts[index + 1]
        return Sample(tokens=self.tokens[start:stop].tolist(), labels=self.labels[start:stop].tolist())

    def lengths(self) -> list[int]:
        return [stop - start for start, stop in zip(self.starts, self.starts[1:], strict=False)]

    def where(self, index: int) -> str:
        """'data/train.jsonl:17': the line (or row, in formats without lines) that sample ``index`` came from."""
        _, origin = self.origins[bisect_right(self.origins, index, key=lambda entry: entry[0]) - 1]
        return f"{origin}:{self.numbers[index]}"

    def fingerprint(self) -> str:
        """Hex digest of every token, label and border: it changes with the data, the tokenizer or the template."""
        if not self._fingerprint:  # of a billion tokens it takes seconds
            digest = hashlib.sha256()
            for part in (self.starts, self.tokens, self.labels):
                digest.update(part)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint


def shift(tokens: list[int], train: list[bool]) -> Sample:
    """The sample that predicts every trained token from those before it."""
    labels = [token if trained else IGNORE for token, trained in zip(tokens[1:], train[1:], strict=True)]
    return Sample(tokens=tokens, labels=[*labels, IGNORE])


def cut(encoded: Encoded, seq_len: int, *, split: bool) -> list[Encoded]:
    """The first ``seq_len`` tokens or, with ``split``, pieces that overlap by one: each token is predicted once.

    Nothing is appended at a cut: an end-of-text token there would teach the model to stop in mid-sentence.
    """
    starts = range(0, max(len(encoded.tokens) - 1, 1), seq_len - 1) if split else [0]
    return [Encoded(encoded.tokens[i : i + seq_len], encoded.train[i : i + seq_len]) for i in starts]


def collect(rows: Iterable[Row], encode: Callable[[Values], Encoded], limits: Limits, *, pad_id: int) -> Samples:
    """Encode every row. A row that does not fit is dropped and counted or, where its policy is "error", reported.

    A row with nothing trained, or nothing left after its end was cut off, is always dropped and counted.
    """
    seq_len, too_long = limits.seq_len, limits.too_long
    samples = Samples(seq_len=seq_len, pad_id=pad_id)
    counts = samples.counts
    problems: list[tuple[str, str]] = []  # what, where

    def drop(row: Row, reason: str, problem: str = "", *, policy: str = "drop") -> None:
        counts.dropped[reason] += 1
        if policy == "error":
            problems.append((problem, f"{row.origin}:{row.number}"))

    for row in rows:
        if len(problems) >= PROBLEMS_LIMIT:
            break
        counts.rows += 1
        try:
            encoded = encode(row.values)
        except EmptyError as e:
            drop(row, "empty", f"{e} (to skip such rows: empty_rows: drop)", policy=limits.empty_rows)
            continue
        except RowError as e:
            drop(row, "broken", f"{e} (to skip such rows: bad_rows: drop)", policy=limits.bad_rows)
            continue
        length = len(encoded.tokens)
        counts.longest = max(counts.longest, length)
        counts.control_text += encoded.has_control_text
        if length > seq_len and too_long in ("drop", "error"):
            ways = "raise seq_len, or too_long: truncate | drop"
            drop(row, "too long", f"{length} tokens are more than seq_len {seq_len}; {ways}", policy=too_long)
            continue
        pieces = [shift(piece.tokens, piece.train) for piece in cut(encoded, seq_len, split=too_long == "split")]
        trained = [piece for piece in pieces if any(label != IGNORE for label in piece.labels)]
        if not trained:
            drop(row, "cut before the first trained token" if any(encoded.train[1:]) else "nothing to train on")
            continue
        counts.truncated += length > seq_len and too_long == "truncate"
        counts.split += length > seq_len and too_long == "split"
        for piece in trained:
            samples.append(piece, origin=row.origin, number=row.number)
    if problems:
        raise _report(problems)
    return samples


def _report(problems: list[tuple[str, str]]) -> UserError:
    """The first few problems, each with its first row and how many rows share it."""
    places: dict[str, list[str]] = {}
    for problem, where in problems:
        places.setdefault(problem, []).append(where)
    lines = []
    for problem, rows in list(places.items())[:PROBLEMS_SHOWN]:
        others = f" and {len(rows) - 1} more rows" if len(rows) > 1 else ""
        lines.append(f"{rows[0]}{others}: {problem}")
    if unshown := sum(map(len, list(places.values())[PROBLEMS_SHOWN:])):
        lines.append(f"{unshown} other rows have problems too")
    if len(problems) >= PROBLEMS_LIMIT:
        lines.append(f"stopped reading after {len(problems)} bad rows")
    return UserError(*lines)
