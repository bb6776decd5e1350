"""Rows of a data set: local files, folders and globs, or a name on the Hugging Face Hub.

JSON is parsed here with the standard library: an error then names file, line and excerpt, one huge line cannot fill
the memory, and a start does not wait seconds for `import datasets`, which only Hub names need.
"""

import glob
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torchft.data.readers import READERS, count, read
from torchft.errors import UserError
from torchft.names import nearest

log = logging.getLogger(__name__)

SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


class Row(NamedTuple):
    """One row: ``origin`` is the file or Hub name, ``number`` its line (text formats) or row, both from 1."""

    origin: str
    number: int
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What to read.

    ``path``: a file (.jsonl .json .csv .parquet .txt), a folder of them, a glob, a list of these, or a Hub name.
    ``split``: "train", or with a slice in file order, "train[:95%]", "train[-500:]": the Hub's words, local files too.
    ``subset``, ``revision``: of a Hub name; a subset with a slash is a folder of it. ``max_rows``: stop after so many.
    """

    path: str | list[str]
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    max_rows: int | None = None

    def __str__(self) -> str:
        return self.path if isinstance(self.path, str) else ", ".join(self.path)


def capped(path: str | list[str], max_rows: int | None) -> tuple[str | list[str], int | None]:
    """("data.jsonl#1000", None) -> ("data.jsonl", 1000): a path's own cap, if it is no file of that name."""
    found = re.fullmatch(r"(.+)#(\d+)", path) if isinstance(path, str) and not Path(path).exists() else None
    if found is None:
        return path, max_rows
    if max_rows is not None:
        raise UserError(f"dataset.max_rows: {max_rows}, but source is {path!r}; say how many rows in one of them")
    return found[1], int(found[2])


def rows(source: Source) -> Iterator[Row]:
    """Every row of ``source`` in file order. UserError if there is none."""
    if source.max_rows is not None and source.max_rows < 1:
        raise UserError(f"dataset.max_rows: {source.max_rows} must be at least 1")
    paths = [source.path] if isinstance(source.path, str) else source.path
    if not paths:
        raise UserError("dataset.source: the list is empty; name a file, a folder, a glob or a Hub data set")
    if any(_is_hub_name(path) for path in paths):
        if len(paths) > 1:
            raise UserError(f"dataset.source: [{source}] mixes Hub names into a list; a list is for local files")
        found = hub_rows(paths[0], source)
    else:
        found = _sliced(files_of(source), parse_split(source.split)[1])
    empty = True
    for row in islice(found, source.max_rows):
        empty = False
        yield row
    if empty:
        raise UserError(f"{source}: split {source.split!r} has 0 rows; check the file, the split and its slice")


def files_of(source: Source) -> list[Path]:
    """The local files that `rows` reads, in order; none for a Hub name."""
    paths = [source.path] if isinstance(source.path, str) else source.path
    if any(_is_hub_name(path) for path in paths):
        return []
    return [file for path in paths for file in _files(path, parse_split(source.split)[0])]


def _is_hub_name(path: str) -> bool:
    """Whether ``path`` is "name" or "org/name", nothing on this disk, and does not look like a file."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None
    return named and Path(path).suffix not in READERS and not Path(path).exists()


def hub_rows(name: str, source: Source, *, streaming: bool = False, skip: int = 0) -> Iterator[Row]:
    import datasets  # takes seconds: only for Hub names

    try:
        subset, is_folder = source.subset, "/" in (source.subset or "")
        where = {"data_dir": subset} if is_folder else {"name": subset}
        data = datasets.load_dataset(name, **where, split=source.split, revision=source.revision, streaming=streaming)
        data = data.skip(skip) if skip else data
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        raise UserError(
            f"{name} is nothing local, and as a Hub data set (subset {source.subset}, split {source.split!r}, "
            f"revision {source.revision}) it cannot be loaded: {e}. Check the name, `hf auth login` and the network"
        ) from e
    origin = f"{name}[{source.split}]"
    return (Row(origin, number, values) for number, values in enumerate(data, skip + 1))


def _files(path: str, split: str) -> list[Path]:
    """Files behind one local path. A folder's files belong to the split that their name or folder says, or to train."""
    place = Path(path).expanduser()
    if place.is_dir():
        every = [f for f in sorted(place.rglob("*")) if f.suffix in READERS and not _hidden(f.relative_to(place))]
        kinds = sorted({f.suffix for f in every})
        if len(kinds) > 1:
            raise UserError(f"{path} holds {', '.join(kinds)} files; name one kind by a glob: {path}/**/*{kinds[0]}")
        found = [f for f in every if (_split_of(f.relative_to(place)) or "train") == _canonical(split)]
        if not found:
            splits = sorted({_split_of(f.relative_to(place)) or "train" for f in every})
            have = f"its files hold the splits {splits}" if every else f"it holds no {', '.join(READERS)} file"
            raise UserError(f"{path}: no split {split!r} in this folder; {have}")
        return found
    found = [place] if place.is_file() else sorted(Path(f) for f in glob.glob(str(place), recursive=True))
    found = [f for f in found if f.is_file()]
    if not found:
        siblings = [f.name for f in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(f"dataset.source: {path} does not exist{nearest(place.name, siblings)}")
    for file in found:
        if file.suffix not in READERS:
            raise UserError(f"{file}: data files end in {', '.join(READERS)}; rename or convert it")
        if _canonical(split) not in ("train", _split_of(Path(file.name))):
            raise UserError(f"{file}: a file has no split {split!r}; take a part of it with split: train[95%:]")
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _split_of(path: Path) -> str | None:
    """The split that a path's words name, the file's own name first: "data/test-00000.parquet" -> "test"."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if _canonical(word) in SPLIT_WORDS:
                return _canonical(word)
    return None


def _canonical(split: str) -> str:
    return next((name for name, words in SPLIT_WORDS.items() if split in words), split)


def parse_split(split: str) -> tuple[str, tuple[str, str] | None]:
    """'train[10%:500]' -> ('train', ('10%', '500'))."""
    bound = r"((?:-?\d+%?)?)"
    match = re.fullmatch(rf"(\w+)(?:\[{bound}:{bound}\])?", split)
    if match is None:
        raise UserError(f"dataset.split: {split!r} is not a name and a slice, like train, train[:95%] or train[-500:]")
    name, start, stop = match.groups()
    return name, None if start is None else (start, stop)


def _sliced(files: list[Path], bounds: tuple[str, str] | None) -> Iterator[Row]:
    if bounds is None:
        yield from _read(files)
        return
    start, stop = absolute(bounds, sum(map(count, files)))
    yield from islice(_read(files), start, stop)


def absolute(bounds: tuple[str, str], num_rows: int) -> tuple[int, int]:
    """('10%', '') -> (10, 100) of 100 rows."""

    def place(bound: str, default: int) -> int:
        if not bound:
            return default
        at = round(int(bound[:-1]) * num_rows / 100) if bound.endswith("%") else int(bound)
        return min(max(at + num_rows if at < 0 else at, 0), num_rows)

    return place(bounds[0], 0), place(bounds[1], num_rows)


def _read(files: list[Path]) -> Iterator[Row]:
    seen, reported = 0, time.monotonic()
    for file in files:
        origin = str(file)
        for number, values in read(file):
            yield Row(origin, number, values)
            seen += 1
            if seen % 1000 == 0 and time.monotonic() - reported > 10:
                reported = time.monotonic()
                log.info("reading %s: %d rows", origin, seen)
