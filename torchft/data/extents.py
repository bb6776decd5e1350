"""Where a stream reads: which rows of which files, from any row on, and what tells that they have changed."""

import hashlib
import logging
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torchft.data.readers import count, read
from torchft.data.sources import Row, Source, absolute, files_of, hub_rows, parse_split
from torchft.errors import UserError

log = logging.getLogger(__name__)

WAITS_S = (1, 5, 30, 120)  # before a stream from the Hub is opened again
ENDS = 1 << 16  # bytes at each end of a file that tell whether it has changed


class Extent(NamedTuple):
    """Rows [start, stop) of one file, or of a Hub name; ``stop`` None: to its end."""

    origin: str
    start: int
    stop: int | None
    file: Path | None


def extents(source: Source) -> list[Extent]:
    """What a stream reads, in the order of the files. A slice or a cap counts their rows, which reads them once."""
    files, (_, bounds) = files_of(source), parse_split(source.split)
    if not files:
        assert isinstance(source.path, str)
        return [Extent(f"{source.path}[{source.split}]", 0, source.max_rows, None)]
    if bounds is None and source.max_rows is None:
        return [Extent(str(file), 0, None, file) for file in files]
    counts = [count(file) for file in files]
    first, last = absolute(bounds or ("", ""), sum(counts))
    last = last if source.max_rows is None else min(last, first + source.max_rows)
    found, before = [], 0
    for file, num_rows in zip(files, counts):
        start, stop = max(first - before, 0), min(last - before, num_rows)
        if start < stop:
            found.append(Extent(str(file), start, stop, file))
        before += num_rows
    return found


def streamed(source: Source) -> Iterator[Row]:
    """Every row in the order of the data, read as they are asked for: nothing of the Hub is downloaded whole."""
    for extent in extents(source):
        yield from rows_of(source, extent, skip=0)


def fingerprint(source: Source) -> list[Any]:
    """What tells a change of the data without reading it all: names, sizes and both ends of files; a Hub revision."""
    found: list[Any] = [str(source), source.split, source.subset, source.revision, source.max_rows]
    for file in files_of(source):
        size = file.stat().st_size
        with open(file, "rb") as f:
            ends = hashlib.sha256(f.read(ENDS))
            f.seek(max(size - ENDS, 0))
            ends.update(f.read(ENDS))
        found.append([str(file), size, ends.hexdigest()])
    return found


def rows_of(source: Source, extent: Extent, *, skip: int) -> Iterator[Row]:
    """The rows of an extent after its first ``skip``, read as they are asked for."""
    skip += extent.start
    num_rows = None if extent.stop is None else extent.stop - skip
    if extent.file is None:
        assert isinstance(source.path, str)
        return islice(_patient(source.path, source, skip), num_rows)
    numbered = read(extent.file, skip=skip)
    return (Row(extent.origin, number, values) for number, values in islice(numbered, num_rows))


def _patient(name: str, source: Source, skip: int) -> Iterator[Row]:
    """Rows of the Hub after the first ``skip``; when the network fails it tries again from the next row on."""
    failed = 0
    while True:
        try:
            for row in hub_rows(name, source, streaming=True, skip=skip):
                yield row
                skip, failed = row.number, 0
            return
        except OSError as e:  # the client's own errors are of this kind, and come after its own retries
            if failed == len(WAITS_S):
                raise UserError(
                    f"{name}: no row after row {skip} came from the Hub in {failed + 1} tries: {e}. Check the network; "
                    "the run goes on from its last checkpoint"
                ) from e
            log.warning("%s: after row %d: %s; again in %d s", name, skip, e, WAITS_S[failed])
            time.sleep(WAITS_S[failed])
            failed += 1
