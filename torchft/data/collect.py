"""From a row to its samples, with what happened to it; `collect` does it for all rows of a data set."""

import hashlib
from array import array
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torchft.data.messages import EmptyError, FilteredError, RowError, Values
from torchft.data.samples import Counts, Encoded, Limits, Notes, Sample, Samples, cut, learned
from torchft.data.sources import Row
from torchft.errors import UserError
from torchft.losses.likelihood import IGNORE

PROBLEMS_SHOWN = 5
PROBLEMS_LIMIT = 1000  # bad rows after which reading on is pointless


class Made(NamedTuple):
    """The samples of one row, or why there are none. It pickles, so that worker processes can make it."""

    samples: list[Sample]
    dropped: str = ""  # the reason
    problem: str = ""  # for the user, where the policy is to stop
    length: int = 0  # tokens before it was cut
    notes: Notes = Notes()


def make(values: Values, encode: Callable[[Values], Encoded], limits: Limits) -> Made:
    """The samples of one row. One that does not fit is dropped or, where its policy is "error", a problem.

    A row with nothing trained, or nothing left after its end was cut off, is always dropped.
    """
    try:
        encoded = encode(values)
    except FilteredError:
        return Made([], dropped="filtered out")
    except EmptyError as e:
        return Made([], "empty", f"{e} (to skip such rows: empty_rows: drop)" if limits.empty_rows == "error" else "")
    except RowError as e:
        return Made([], "broken", f"{e} (to skip such rows: bad_rows: drop)" if limits.bad_rows == "error" else "")
    length, notes = len(encoded.tokens), encoded.notes
    if length > limits.seq_len and limits.too_long in ("drop", "error"):
        ways = "raise seq_len, or too_long: truncate | drop"
        problem = f"{length} tokens are more than seq_len {limits.seq_len}; {ways}"
        return Made([], "too long", problem if limits.too_long == "error" else "", length, notes)
    pieces = cut(encoded, limits.seq_len, split=limits.too_long == "split")
    samples = [learned(piece) for piece in pieces]
    trained = [sample for sample in samples if any(label != IGNORE for label in sample.labels)]
    if not trained:
        why = "cut before the first trained token" if any(encoded.train[1:]) else "nothing to train on"
        return Made([], why, "", length, notes)
    return Made(trained, "", "", length, notes)


def note(made: Made, counts: Counts, limits: Limits) -> None:
    """Count in ``counts`` what happened to a row."""
    counts.rows += 1
    counts.longest = max(counts.longest, made.length)
    counts.notes.update(made.notes)
    if made.dropped:
        counts.dropped[made.dropped] += 1
    elif made.length > limits.seq_len:
        counts.truncated += limits.too_long == "truncate"
        counts.split += limits.too_long == "split"


def collect(rows: Iterable[Row], encode: Callable[[Values], Encoded], limits: Limits, *, pad_id: int) -> Samples:
    """The samples of every row. Problems are reported together."""
    samples = Samples(seq_len=limits.seq_len, pad_id=pad_id)
    problems: list[tuple[str, str]] = []  # what, where
    seen: set[bytes] = set()
    for row in rows:
        if len(problems) >= PROBLEMS_LIMIT:
            break
        made = make(row.values, encode, limits)
        if limits.deduplicate and made.samples:
            key = _digest(made.samples)
            if key in seen:
                made = made._replace(samples=[], dropped="the same as an earlier row")
            seen.add(key)
        note(made, samples.counts, limits)
        if made.problem:
            problems.append((made.problem, f"{row.origin}:{row.number}"))
        for sample in made.samples:
            samples.append(sample, origin=row.origin, number=row.number)
    if problems:
        raise _report(problems)
    return samples


def _digest(samples: list[Sample]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(array("i", sample.tokens))
        digest.update(array("i", [*sample.labels, sample.border]))
        digest.update(array("f", sample.targets))
    return digest.digest()


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
