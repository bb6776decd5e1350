"""A folder that holds one tree of state: ``rank_00000_000.safetensors`` ... and ``index.json``. Never a pickle.

The index says of each tensor its dtype, its whole shape, and which slice (offset, shape) lies in which file, so that a
tensor may be spread over the files of several ranks and is put together again whatever their number.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.errors import UserError
from torchft.files import read_json, safe_join
from torchft.training.tree import unflatten
from torchft.weights import open_safetensors, save_tensors

INDEX = "index.json"
FILE_BYTES = 2 << 30  # a file's tensors are copied to host memory together


def write(
    folder: Path, structure: Any, tensors: Mapping[str, Tensor], *, rank: int = 0, file_bytes: int = FILE_BYTES
) -> None:
    """Writes the outcome of ``tree.flatten`` into a new folder."""
    folder.mkdir()
    entries: dict[str, Any] = {}
    for number, names in enumerate(_split(tensors, file_bytes)):
        file = f"rank_{rank:05d}_{number:03d}.safetensors"
        on_host = {
            name: tensors[name].to("cpu", copy=True, memory_format=torch.contiguous_format) for name in names
        }  # copies, because safetensors refuses tensors that share memory
        save_tensors(on_host, folder / file)
        for name, tensor in on_host.items():
            shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            where = {"file": file, "offset": [0] * tensor.ndim, "shape": shape}
            entries[name] = {"dtype": dtype, "shape": shape, "slices": [where]}
    (folder / INDEX).write_text(json.dumps({"tree": structure, "tensors": entries}))


class TensorFolder:
    """A folder made by ``write``, read tensor by tensor, on the CPU."""

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

    def read(self, name: str) -> Tensor:
        """One whole tensor, put together from its slices. UserError if they don't cover it."""
        slices = self.entries[name]["slices"]
        if sum(math.prod(s["shape"]) for s in slices) != math.prod(self.shape(name)):
            raise UserError(f"{self.folder / INDEX}: the slices of {name} don't make up its shape {self.shape(name)}")
        if len(slices) == 1:
            return self._file(slices[0]["file"]).get_tensor(name)
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        for s in slices:
            region = tuple(slice(start, start + size) for start, size in zip(s["offset"], s["shape"], strict=True))
            whole[region] = self._file(s["file"]).get_tensor(name)
        return whole

    def tree(self) -> Any:
        """The whole tree with its tensors."""
        return unflatten(self.structure, self.read)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = open_safetensors(safe_join(self.folder, name))
        return self._files[name]


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors' elements; a checkpoint adds less than 1% to them."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _split(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names in order, cut so that no file but that of a single larger tensor exceeds ``limit`` bytes."""
    files: list[list[str]] = []
    size = limit
    for name, tensor in tensors.items():
        if not files or size + tensor.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor.nbytes
    return files
