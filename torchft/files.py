"""Files that came from elsewhere or must never be half-written."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from torchft.errors import UserError

log = logging.getLogger(__name__)

JSON_LIMIT = 256 << 20  # bytes; the largest tokenizer.json in the wild is about 35 MB


def cache_folder() -> Path:
    """For what is computed once per machine: $XDG_CACHE_HOME/torchft, or ~/.cache/torchft."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchft"


def safe_join(root: Path, name: str) -> Path:
    """``root / name`` for a name read from a file. UserError if it could point outside ``root``, symlinks resolved.

    A checkpoint made of links into a cache (huggingface_hub's layout) is fine: only what ``name`` itself does counts,
    so the *folder* of the target must stay inside the folder of ``root``.
    """
    bad = (
        not name
        or "\0" in name
        or "\\" in name
        or PurePosixPath(name).is_absolute()
        or PureWindowsPath(name).drive
        or ".." in PurePosixPath(name).parts
    )
    path = root / name
    if bad or not path.parent.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{name!r} (named by a file in {root}) points outside that folder; refusing to open it")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. UserError with path, line and column when missing, too large or not an object."""
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= JSON_LIMIT else b""
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    if size > JSON_LIMIT:
        raise UserError(f"{path}: {size >> 20} MiB is too large for a JSON file (limit {JSON_LIMIT >> 20} MiB)")
    hint = f". The file is {kind}" if (kind := what_is(data)) else ""
    try:
        value = json.loads(data.decode())
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}:{e.colno}: not valid JSON: {e.msg}{hint}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}{hint}") from None
    except (RecursionError, ValueError) as e:  # nested too deep, a number of thousands of digits
        raise UserError(f"{path}: not usable JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write ``path`` whole or not at all: a temporary file beside it, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def keep_in_cache(path: Path, data: str | bytes) -> None:
    """``atomic_write`` of what a later run need not compute again. Only a warning if it cannot be kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
    except OSError as e:
        log.warning("not kept for later runs: %s: %s", path, e.strerror)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` (replacing an older one) when the block ends without an error.

    For one process at a time: what a killed one left of ``folder`` is cleared away first.
    """
    folder = folder.resolve()  # of a link, what it points to is replaced
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    _partial(folder).mkdir()
    try:
        yield _partial(folder)
        for path in (*_partial(folder).rglob("*"), _partial(folder)):
            sync(path)
        if folder.exists():
            os.replace(folder, _replaced(folder))
        os.replace(_partial(folder), folder)
        sync(folder.parent)
    finally:
        clear_leftovers(folder)


def remove_folder(folder: Path) -> None:
    """Delete a folder. A kill on the way leaves no half of it under its name."""
    os.replace(folder, _partial(folder))
    clear_leftovers(folder)


def clear_leftovers(folder: Path) -> None:
    """Undo what a killed ``new_folder`` or ``remove_folder`` left undone; ``folder`` is whole or absent then."""
    if _replaced(folder).exists() and not folder.exists():  # killed between the two renames
        os.replace(_replaced(folder), folder)
    shutil.rmtree(_partial(folder), ignore_errors=True)
    shutil.rmtree(_replaced(folder), ignore_errors=True)


def sync(path: Path) -> None:
    """Return when a file's bytes, or a folder's entries, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def what_is(head: bytes) -> str:
    """What a file that should hold data really is, judged by its first bytes; '' if unknown."""
    text = head[:200].lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run `git lfs pull` or `tune download`"
    if text.startswith((b"<!doctype", b"<html")):
        return "an HTML page, probably a failed download: download it again"
    if text[:1] == b"\x80" or text[:2] == b"pk":
        return "a pickle, which can run code when loaded: use the safetensors files"
    return ""


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")
