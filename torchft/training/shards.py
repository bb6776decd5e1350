"""A folder that holds one tree of state: ``rank_00000_000.safetensors`` ... and ``index.json``. Never a pickle.

Each rank writes its parts of the tensors into files of its own. The index says of each tensor its dtype, its whole
shape, and which slice (offset, shape) lies in which file, so that it can be read, whole or in part, by any number of
ranks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.errors import UserError
from torchft.files import read_json, safe_join
from torchft.ranks import Region, local, rank, region
from torchft.training.tree import unflatten
from torchft.weights import open_safetensors, save_tensors

INDEX = "index.json"
FILE_BYTES = 2 << 30  # a file's tensors are copied to host memory together, if they are not there yet

Slices = dict[str, dict[str, Any]]  # tensor name -> {"file", "offset", "shape"} of the part that one rank has written


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one rank holds of a tensor of this whole ``shape``: ``values`` that begin at ``offset``.

    ``is_copy``: they lie in host memory, where nothing changes them, and share it with no other.
    """

    values: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    is_copy: bool = False


def pieces(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """What this rank holds of the tensors, of the same memory."""
    return {
        name: Piece(values=local(t), offset=tuple(s.start for s in region(t)), shape=tuple(t.shape))
        for name, t in tensors.items()
    }


def write(folder: Path, tensors: Mapping[str, Piece], *, file_bytes: int = FILE_BYTES) -> Slices:
    """Writes this rank's pieces of the tensors, but empty ones, into the folder, which exists; says where they lie."""
    slices: Slices = {}
    held = {name: piece for name, piece in tensors.items() if piece.values.numel()}
    for number, names in enumerate(_split(held, file_bytes)):
        file = f"rank_{rank():05d}_{number:03d}.safetensors"
        on_host = {
            name: held[name].values.to("cpu", copy=not held[name].is_copy, memory_format=torch.contiguous_format)
            for name in names
        }  # copies, because safetensors refuses tensors that share memory
        save_tensors(on_host, folder / file)
        for name, values in on_host.items():
            slices[name] = {"file": file, "offset": list(held[name].offset), "shape": list(values.shape)}
    return slices


def write_index(folder: Path, structure: Any, tensors: Mapping[str, Piece], written: Sequence[Slices]) -> None:
    """Completes a folder that holds the outcome of ``tree.flatten``. ``written``: what ``write`` said on each rank."""
    entries = {
        name: {
            "dtype": str(t.values.dtype).removeprefix("torch."),
            "shape": list(t.shape),
            "slices": [slices[name] for slices in written if name in slices],
        }
        for name, t in tensors.items()
    }
    (folder / INDEX).write_text(json.dumps({"tree": structure, "tensors": entries}))


class TensorFolder:
    """A folder made by ``write`` and ``write_index``, read tensor by tensor, on the CPU."""

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / INDEX)
        self.folder = folder
        self.structure: Any = index["tree"]
        self.entries: dict[str, Any] = index["tensors"]
        self._files: dict[str, Any] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self.entries[name]["dtype"])

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A region of one tensor (default: all of it), put together from the slices that it touches.

        Only they are read, and of them only what lies in the region. UserError if they don't cover it.
        """
        if region is None:
            region = tuple(slice(0, n) for n in self.shape(name))
        found = torch.empty([s.stop - s.start for s in region], dtype=self.dtype(name))
        missing = found.numel()
        for s in self.entries[name]["slices"]:
            held = tuple(slice(start, start + n) for start, n in zip(s["offset"], s["shape"], strict=True))
            common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(region, held, strict=True)]
            if any(c.start >= c.stop for c in common):
                continue
            if held == region:
                return self._file(s["file"]).get_tensor(name)
            piece = self._file(s["file"]).get_slice(name)[_within(common, held)]
            found[_within(common, region)] = piece
            missing -= piece.numel()
        if missing:
            raise UserError(f"{self.folder / INDEX}: the slices of {name} don't make up its shape {self.shape(name)}")
        return found

    def tree(self) -> Any:
        """The whole tree with its tensors."""
        return unflatten(self.structure, self.read)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = open_safetensors(safe_join(self.folder, name))
        return self._files[name]


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors' elements, of all ranks; a checkpoint adds less than 1% to them."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _split(tensors: Mapping[str, Piece], limit: int) -> list[list[str]]:
    """Names in order, cut so that no file but that of a single larger tensor exceeds ``limit`` bytes."""
    files: list[list[str]] = []
    size = limit
    for name, piece in tensors.items():
        if not files or size + piece.values.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += piece.values.nbytes
    return files


def _within(inner: Sequence[slice], outer: Region) -> Region:
    """``inner`` counted from where ``outer`` starts."""
    return tuple(slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True))
