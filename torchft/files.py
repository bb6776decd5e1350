"""Files that came from elsewhere or must never be half-written."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from torchft.errors import UserError

JSON_LIMIT = 256 << 20  # bytes; the largest tokenizer.json in the wild is about 35 MB


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
        with open(temporary, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` (replacing an older one) when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for path in new.rglob("*"):
            _fsync(path)
        _fsync(new)
        if folder.exists():
            os.replace(folder, old)  # two renames: a kill between them leaves the older one whole under this name
        os.replace(new, folder)
        _fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


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


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
