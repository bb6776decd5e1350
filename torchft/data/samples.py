"""Tokenised samples in flat arrays, the parts that they come from, and counts of what happened on the way."""

import hashlib
from array import array
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from torchft.errors import UserError
from torchft.losses.likelihood import IGNORE

Policy = Literal["drop", "error"]
ENDS = -1  # a sample's border where it has several documents, each of which ends at a token with a label


CONTROL_TEXT = "spell a control token in their text; encoded as plain text"
Notes = frozenset[str]  # what is odd about a row, as the end of a sentence that begins "12 rows"


class Encoded(NamedTuple):
    """A row's tokens, which of them are trained, and what is odd about it."""

    tokens: list[int]
    train: list[bool]
    notes: Notes = Notes()
    border: int = 0  # tokens of the first of two documents, a pair; 0: all are of one; ENDS: of several
    targets: tuple[float, ...] = ()  # numbers to learn besides
    labels: list[int] | None = None  # what is to be learned at each token, if not the next one


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What becomes of rows that do not fit. "drop" counts them, "error" reports them together."""

    seq_len: int
    too_long: Literal["truncate", "split", "drop", "error"]
    empty_rows: Policy = "drop"
    bad_rows: Policy = "error"
    deduplicate: bool = False  # leave out a row whose tokens an earlier one has

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise UserError(f"seq_len: {self.seq_len} leaves no token to predict; at least 2")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """``labels[i]`` is the token after ``tokens[i]`` if that one is trained, else IGNORE; the last is IGNORE."""

    tokens: list[int]
    labels: list[int]
    border: int = 0  # tokens of the first of two documents; 0: there is one; ENDS: several
    targets: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Part:
    """The samples [start, stop) of one data set among several, and how they are mixed with the others."""

    name: str
    start: int
    stop: int
    weight: float | None = None  # share of an epoch's samples, relative to the other parts of its stage
    stage: int = 0  # an epoch has the samples of a lower stage first


@dataclass
class Counts:
    """What happened between the rows and the samples."""

    rows: int = 0
    longest: int = 0  # tokens of a row before it was cut
    truncated: int = 0  # rows that lost their end
    split: int = 0  # rows that became several samples
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    notes: Counter[str] = field(default_factory=Counter)  # what is odd about them -> rows

    def add(self, other: "Counts") -> None:
        """Count what another data set's rows met too."""
        self.rows += other.rows
        self.longest = max(self.longest, other.longest)
        self.truncated += other.truncated
        self.split += other.split
        self.dropped += other.dropped
        self.notes += other.notes


class Samples:
    """The samples of a data set, each at most ``seq_len`` tokens; 8 bytes per token, whatever their number.

    Sample i is ``tokens[starts[i] : starts[i + 1]]``, and the same for ``labels``. ``pad_id`` is what batches pad with.
    """

    def __init__(self, *, seq_len: int, pad_id: int) -> None:
        self.seq_len, self.pad_id = seq_len, pad_id
        self.tokens, self.labels, self.starts = array("i"), array("i"), array("q", [0])
        self.borders = array("i")  # of each sample, tokens of the first of its two documents; 0: it is one; ENDS
        self.targets = array("f")  # numbers to learn, as many for each sample
        self.counts = Counts()
        self.numbers = array("q")  # where a sample came from: its row's number ...
        self.origins: list[tuple[int, str]] = []  # ... and (first sample, origin), ascending
        self.parts: list[Part] = []  # where they are of several data sets: together all samples
        self.cache: Path | None = None  # the file that they were read from instead of being made
        self._fingerprint = ""

    def append(self, sample: Sample, *, origin: str, number: int) -> None:
        if not self.origins or self.origins[-1][1] != origin:
            self.origins.append((len(self), origin))
        self.tokens.extend(sample.tokens)
        self.labels.extend(sample.labels)
        self.starts.append(len(self.tokens))
        self.borders.append(sample.border)
        self.targets.extend(sample.targets)
        self.numbers.append(number)
        self._fingerprint = ""

    def extend(self, other: "Samples", part: Part) -> None:
        """Append all samples of another data set as a part of this one. UserError if they are of another kind."""
        kinds = [
            (samples.are_pairs, samples.num_documents, samples.num_targets) for samples in (self, other) if samples
        ]
        if len(set(kinds)) > 1:
            raise UserError(
                f"datasets: {part.name} holds another kind of samples than those before it; do not mix them"
            )
        self.origins += [(first + len(self), origin) for first, origin in other.origins]
        end = len(self.tokens)
        self.starts.extend(array("q", [end + start for start in other.starts[1:]]))
        self.tokens.extend(other.tokens)
        self.labels.extend(other.labels)
        self.borders.extend(other.borders)
        self.targets.extend(other.targets)
        self.numbers.extend(other.numbers)
        self.counts.add(other.counts)
        self.parts.append(part)
        self._fingerprint = ""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self.starts[index], self.starts[index + 1]
        return Sample(
            tokens=self.tokens[start:stop].tolist(),
            labels=self.labels[start:stop].tolist(),
            border=self.borders[index],
            targets=tuple(self.targets[index * self.num_targets : (index + 1) * self.num_targets]),
        )

    @property
    def num_targets(self) -> int:
        """Numbers to learn of each sample."""
        return len(self.targets) // max(len(self), 1)

    @property
    def num_documents(self) -> int:
        """Of each sample."""
        return len(self.documents(0))

    @property
    def are_pairs(self) -> bool:
        """Whether each sample is two documents that are compared: the chosen one, then the rejected one."""
        return bool(self.borders) and self.borders[0] > 0

    @property
    def are_several(self) -> bool:
        """Whether each sample is several documents, of which two would be no pair."""
        return bool(self.borders) and self.borders[0] == ENDS

    def documents(self, index: int) -> list[slice]:
        """The places in ``tokens`` of sample ``index``'s documents."""
        start, border, stop = self.starts[index], self.borders[index], self.starts[index + 1]
        if border == ENDS:
            ends = [i + 1 for i in range(start, stop) if self.labels[i] != IGNORE]
            return [slice(*place) for place in zip([start, *ends], ends)]
        return [slice(start, start + border), slice(start + border, stop)] if border else [slice(start, stop)]

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
            for part in (self.starts, self.tokens, self.labels, self.borders, self.targets):
                digest.update(part)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint


def shift(tokens: list[int], train: list[bool]) -> Sample:
    """The sample that predicts every trained token from those before it, so never the first of a document."""
    labels = [token if trained else IGNORE for token, trained in zip(tokens[1:], train[1:], strict=True)]
    return Sample(tokens=tokens, labels=[*labels, IGNORE])


def learned(encoded: Encoded) -> Sample:
    """The sample of a row whose tokens fit."""
    if encoded.labels is not None:
        return Sample(tokens=encoded.tokens, labels=encoded.labels, border=encoded.border, targets=encoded.targets)
    return replace(shift(encoded.tokens, encoded.train), border=encoded.border, targets=encoded.targets)


def cut(encoded: Encoded, seq_len: int, *, split: bool) -> list[Encoded]:
    """The first ``seq_len`` tokens or, with ``split``, pieces that overlap by one: each token is predicted once.

    Nothing is appended at a cut: an end-of-text token there would teach the model to stop in mid-sentence.
    """
    if len(encoded.tokens) <= seq_len:
        return [encoded]
    assert not encoded.border, "a pair is kept whole or dropped"
    starts = range(0, max(len(encoded.tokens) - 1, 1), seq_len - 1) if split else [0]
    labels, targets = encoded.labels, encoded.targets
    return [
        Encoded(
            encoded.tokens[i : i + seq_len],
            encoded.train[i : i + seq_len],
            targets=targets,
            labels=None if labels is None else labels[i : i + seq_len],
        )
        for i in starts
    ]
