"""Tokenised data kept in the user's cache folder, so that a second start does not tokenise again.

A data set's file is named by a hash of everything that decides its tokens: the bytes of the files it is read from, the
settings, the tokenizer's files, the chat format, the day where a template writes it, and the text of this package. So
a file is right or never found. Deleting the folder is safe at any time.
"""

import hashlib
import json
import logging
import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torchft.data.samples import Counts, Samples
from torchft.data.sources import Source, files_of
from torchft.files import cache_folder, sha256
from torchft.tokenizers.tokenizer import Tokenizer

log = logging.getLogger(__name__)

LIMIT = 10 << 30  # bytes of all files together; the longest unused are removed. A token takes 8
ENGINES = ("tiktoken", "sentencepiece", "jinja2", "pyarrow")  # whose versions might change a token


def read_or_make(
    settings: Any, *, source: Source, tokenizer: Tokenizer, make: Callable[[], Samples], is_ours: bool
) -> Samples:
    """The samples that ``make`` returned for these settings before, or returns now.

    Args:
        settings: all that decides them beside the files of ``source`` and the tokenizer: JSON values.
        is_ours: whether ``make`` is this package's; nothing is kept of code that nobody hashes.
    """
    file = _file(settings, files_of(source), tokenizer) if is_ours else None
    samples = _read(file) if file else None
    if samples is None:
        samples = make()
        if file:
            _write(file, samples)
    return samples


def _file(settings: Any, files: list[Path], tokenizer: Tokenizer) -> Path | None:
    """Where the samples of these settings are kept; None if what they are made from has no files to compare."""
    if not files or not tokenizer.fingerprint:
        return None
    read = [(str(file), sha256(file)) for file in files]
    key = json.dumps([settings, read, tokenizer.fingerprint, _versions(), sys.byteorder], sort_keys=True, default=str)
    return cache_folder() / "tokens" / hashlib.sha256(key.encode()).hexdigest()


@cache
def _versions() -> list[str]:
    """Of what makes tokens from rows: this package by its text, the engines, and Python with its Unicode tables."""
    texts = [file.read_bytes() for file in sorted(Path(__file__).parent.parent.rglob("*.py"))]
    return [hashlib.sha256(b"\0".join(texts)).hexdigest(), sys.version, *map(version, ENGINES)]


def _write(file: Path, samples: Samples) -> None:
    """Keep ``samples``: a line of JSON, then the arrays. A disk that has no room costs a warning, not the run."""
    parts = _arrays(samples)
    about = {
        "seq_len": samples.seq_len,
        "pad_id": samples.pad_id,
        "lengths": [len(part) for part in parts],
        "origins": samples.origins,
        "counts": vars(samples.counts),
        "fingerprint": samples.fingerprint(),
    }
    header = json.dumps(about).encode() + b"\n"
    size = len(header) + sum(len(part) * part.itemsize for part in parts)
    if size > LIMIT:
        return
    new = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # the data may be nobody else's to read
        _make_room(file.parent, LIMIT - size)
        with open(new, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as f:
            f.write(header)
            for part in parts:
                part.tofile(f)
        os.replace(new, file)  # whole or not at all
    except OSError as e:
        log.warning("the tokens could not be kept for the next start: %s", e)
    finally:
        new.unlink(missing_ok=True)


def _read(file: Path) -> Samples | None:
    """What `_write` kept; None if there is nothing, or if it is damaged."""
    try:
        with open(file, "rb") as f:
            about = json.loads(f.readline())
            samples = Samples(seq_len=about["seq_len"], pad_id=about["pad_id"])
            samples.starts = array("q")
            for part, length in zip(_arrays(samples), about["lengths"], strict=True):
                part.fromfile(f, length)
        os.utime(file)  # used now
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError) as e:
        log.warning("%s is damaged (%s): tokenising again", file, e)
        return None
    samples.origins = [(first, origin) for first, origin in about["origins"]]
    counts: dict[str, Any] = {name: Counter(n) if isinstance(n, dict) else n for name, n in about["counts"].items()}
    samples.counts = Counts(**counts)
    if samples.fingerprint() != about["fingerprint"]:
        log.warning("%s is damaged (its tokens have changed): tokenising again", file)
        return None
    samples.cache = file
    return samples


def _arrays(samples: Samples) -> tuple[array, ...]:
    return samples.starts, samples.numbers, samples.tokens, samples.labels, samples.borders, samples.targets


def _make_room(folder: Path, limit: int) -> None:
    """Remove the longest unused files until the rest take at most ``limit`` bytes."""
    newest_first = sorted(((f.stat().st_mtime, f.stat().st_size, f) for f in folder.iterdir()), reverse=True)
    total = 0
    for _, size, file in newest_first:
        total += size
        if total > limit:
            file.unlink(missing_ok=True)
