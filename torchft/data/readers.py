"""Readers of local data files: each yields (line or row number from 1, row). A broken file is named with its place."""

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torchft.errors import UserError
from torchft.files import what_is

Numbered = Iterator[tuple[int, dict[str, Any]]]

LINE_LIMIT = 64 << 20  # bytes of one line; more is a broken file, and would fill the memory
FILE_LIMIT = 1 << 30  # bytes of a file that is read whole: a .json array, a .txt document


def read(path: Path, *, skip: int = 0) -> Numbered:
    """The rows of a file after the first ``skip``, which .jsonl and .parquet files pass over without parsing them."""
    if path.suffix == ".jsonl":
        return jsonl(path, skip=skip)
    return parquet(path, skip=skip) if path.suffix == ".parquet" else islice(READERS[path.suffix](path), skip, None)


def count(path: Path) -> int:
    """The rows of a file."""
    if path.suffix == ".jsonl":
        return sum(not line.isspace() for _, line in _lines(path))
    return sum(1 for _ in READERS[path.suffix](path))


def jsonl(path: Path, *, skip: int = 0) -> Numbered:
    """One JSON object per line; blank lines are skipped."""
    for number, (offset, line) in enumerate(_lines(path), 1):
        if line.isspace():
            continue
        if skip:
            skip -= 1
        else:
            yield number, _parse(line, path, number, offset)


def json_array(path: Path) -> Numbered:
    """The objects of a JSON array, numbered by line; a .json file that starts with an object is read as JSON lines."""
    with open(path, "rb") as f:
        head = f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head[:1] != b"[":
        yield from jsonl(path)
        return
    text = _whole(path)
    decoder = json.JSONDecoder()
    line, counted, at = 1, 0, _skip(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}:{line}: {_why(e)}: {_excerpt(text[at : at + 200])}") from None
        _check(row, text[at:end], path, line)
        yield line, row
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            found = _excerpt(text[at : at + 80]) if at < len(text) else "the end of the file"
            raise UserError(f"{path}:{line}: not valid JSON: expected ',' or ']', found {found}; is the file whole?")
    if _skip(text, at + 1) < len(text):
        line += text.count("\n", counted, at)
        raise UserError(f"{path}:{line}: more text after the array's end; one array per file, or .jsonl")


def csv_table(path: Path) -> Numbered:
    """Comma-separated text with a header line; every value is a string."""
    csv.field_size_limit(LINE_LIMIT)  # the module's own limit, 128 KiB, is shorter than real documents
    reader = csv.reader((_decode(line, path, offset) for offset, line in _lines(path)), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{path}:1: the header names a column twice: {header}")
        for values in reader:
            if values and len(values) != len(header):
                why = f"{len(values)} fields, but the header has {len(header)} ({', '.join(header)})"
                raise UserError(f"{path}:{reader.line_num}: {why}; put quotes around fields with commas or line breaks")
            if values:
                yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as e:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV: {e}; check the quotes") from None


def parquet(path: Path, *, skip: int = 0) -> Numbered:
    """Rows of a parquet file, a few at a time."""
    import pyarrow.parquet  # half a second, and only these files need it

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = range(file.num_row_groups)
            while groups and (size := file.metadata.row_group(groups[0]).num_rows) <= skip - number:
                groups, number = groups[1:], number + size
            for batch in file.iter_batches(batch_size=256, row_groups=list(groups)):
                for row in batch.to_pylist():
                    number += 1
                    if number > skip:
                        yield number, row
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path}: cannot be read as parquet after row {number}: {e}{_hint(path)}") from None


def txt(path: Path) -> Numbered:
    """A text file is one document: one row with the column "text"."""
    text = _whole(path)
    if "\0" in text:
        offset = len(text[: text.index("\0")].encode())
        raise UserError(f"{path}: byte {offset} is NUL: a binary file, or UTF-16 text. {_UTF8}")
    if text:
        yield 1, {"text": text}


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": jsonl,
    ".json": json_array,
    ".csv": csv_table,
    ".parquet": parquet,
    ".txt": txt,
}

_UTF8 = "Data files must be UTF-8: convert it with `iconv -f ENCODING -t utf-8`"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) with a bound on what one line may hold."""
    offset, number = 0, 0
    with open(path, "rb") as f:
        while line := f.readline(LINE_LIMIT + 1):
            number += 1
            if len(line) > LINE_LIMIT:
                limit = LINE_LIMIT >> 20
                raise UserError(f"{path}:{number}: the line is longer than {limit} MiB; is there one row per line?")
            yield offset, line
            offset += len(line)


def _whole(path: Path) -> str:
    size = path.stat().st_size
    if size > FILE_LIMIT:
        limit = f"a {path.suffix} file is read whole (limit {FILE_LIMIT >> 20} MiB)"
        raise UserError(f"{path}: {size >> 20} MiB, but {limit}; convert it to .jsonl with one row per line")
    return _decode(path.read_bytes(), path, 0)


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as e:
        around = data[max(e.start - 20, 0) : e.start + 20]
        raise UserError(f"{path}: byte {offset + e.start} is not UTF-8, near {around!r}. {_UTF8}") from None


def _parse(line: bytes, path: Path, number: int, offset: int) -> dict[str, Any]:
    text = _decode(line, path, offset)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as e:
        at = e.pos if isinstance(e, json.JSONDecodeError) else 0
        if text[at : at + 1] == "\0":
            raise UserError(f"{path}:{number}: byte {offset + len(text[:at].encode())} is NUL. {_UTF8}") from None
        near = _excerpt(text[max(at - 40, 0) : at + 40])
        hint = _hint(path) if number == 1 else ""
        raise UserError(f"{path}:{number}:{at + 1}: {_why(e)}, near {near}; repair or remove the line{hint}") from None
    _check(row, text, path, number)
    return row


def _check(row: Any, text: str, path: Path, number: int) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: a row must be a JSON object with named columns, found {_excerpt(text)}")
    if "\\ud" in text or "\\uD" in text:  # half of a surrogate pair is valid JSON but no text
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            broken = e.object[e.start : e.start + 1]
            raise UserError(f"{path}:{number}: {broken!r} is half of a surrogate pair, not a character") from None


def _skip(text: str, at: int) -> int:
    """The next place at or after ``at`` that is not white space."""
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    return f"not valid JSON: {error.msg if isinstance(error, json.JSONDecodeError) else error}"


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _hint(path: Path) -> str:
    with open(path, "rb") as f:
        kind = what_is(f.read(200))
    return f". The file is {kind}" if kind else ""
