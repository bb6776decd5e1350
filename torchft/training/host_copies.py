"""Copies of tensors in host memory: in the same place each time, pinned where a GPU writes it."""

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from torchft.training.pinned import pinned_zeros
from torchft.training.shards import Piece
from torchft.training.step_files import Parts

log = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes, of each copy
SPARE = 0.1  # share of the free host memory that is left to others


class HostCopies:
    """The copies of one checkpoint at a time."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def of(self, parts: Parts) -> Parts | None:
        """``parts`` with copies of their tensors, which are valid until the next call; None if there is no room."""
        need = sum(_padded(piece) for _, pieces in parts.values() for piece in pieces.values())
        if self._memory is None or self._memory.nbytes < need:
            self._memory = None
            on_cuda = any(piece.values.is_cuda for _, pieces in parts.values() for piece in pieces.values())
            self._memory = _allocated(need, pinned=on_cuda)
        if self._memory is None:
            return None
        copies, start = {}, 0
        for part, (structure, pieces) in parts.items():
            copied = {}
            for name, piece in pieces.items():
                values = self._memory[start : start + piece.values.nbytes].view(piece.values.dtype)
                values = values.view(piece.values.shape).copy_(piece.values, non_blocking=True)
                copied[name] = replace(piece, values=values, is_copy=True)
                start += _padded(piece)
            copies[part] = structure, copied
        if self._memory.is_pinned():
            torch.cuda.synchronize()
        return copies


def free_bytes() -> int:
    """Host memory that this machine, or the container, still has; without Linux's files no limit is known."""
    free = sys.maxsize
    meminfo, limit, used = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat")
    if meminfo.exists():
        free = 1024 * _numbers(meminfo.read_text())["MemAvailable:"]
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        stat = _numbers(used.read_text())  # without the cache of files, which gives way
        free = min(free, max(0, int(most) - stat["anon"] - stat["shmem"]))
    return free


def _allocated(size: int, *, pinned: bool) -> Tensor | None:
    """Bytes for the copies of this rank; None, with a warning, if those of all ranks of this host do not fit."""
    need = size * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = int((1 - SPARE) * free_bytes())
    try:
        if need <= free:
            return pinned_zeros(size, dtype=torch.uint8) if pinned else torch.empty(size, dtype=torch.uint8)
    except torch.OutOfMemoryError:
        pass
    log.warning(
        "host memory has no room for the copy of a checkpoint (%.3g GiB, %.3g GiB free): training waits while it is "
        "written",
        need / 2**30,
        free / 2**30,
    )
    return None


def _padded(piece: Piece) -> int:
    return -(-piece.values.nbytes // ALIGNMENT) * ALIGNMENT


def _numbers(text: str) -> dict[str, int]:
    return {words[0]: int(words[1]) for line in text.splitlines() if (words := line.split())[1:]}
