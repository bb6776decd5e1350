"""Integer weights in safetensors as compressed-tensors packs them: Kimi K2 Thinking's experts in int4, and what
llm-compressor writes as W4A16 and W8A16 (https://github.com/vllm-project/compressed-tensors, format "pack-quantized").

``NAME.weight_packed`` is int32, each with eight codes of 4 bits or four of 8, the first in the lowest bits, and all of
them plus half their range. Beside it lie ``.weight_scale`` [out, groups] and ``.weight_shape`` [2]: rows are padded.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.errors import UserError
from torchft.weights import WeightFiles

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"  # ends of the names of what is stored
WORD = 32  # bits
METHOD = "compressed-tensors"  # as config.json's quantization_config names it


def unreadable(quantization_config: dict[str, Any]) -> list[str]:
    """Of a ``quantization_config`` of this method: the fields, with their values, of what is not read here."""
    groups = quantization_config.get("config_groups") or {}
    found = [] if groups else ["config_groups (none)"]
    for name, group in groups.items():
        weights = group.get("weights") or {}
        wanted = {
            "format": (group.get("format") or quantization_config.get("format"), ("pack-quantized",)),
            "input_activations": (group.get("input_activations"), (None,)),
            "weights.type": (weights.get("type", "int"), ("int",)),
            "weights.num_bits": (weights.get("num_bits"), (4, 8)),
            "weights.symmetric": (weights.get("symmetric", True), (True,)),
            "weights.strategy": (weights.get("strategy"), ("group", "channel")),
            "weights.actorder": (weights.get("actorder"), (None, "weight", "static")),  # of training, not of storage
        }
        found += [f"{name}.{field} {value!r}" for field, (value, read) in wanted.items() if value not in read]
    return found


class PackedFiles(WeightFiles):
    """A packed tensor has the name, shape and values that it would have if it were not, in its scales' dtype."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        stored = super().names()
        self._shapes = {
            name: self._shape(name) for name in (n.removesuffix(PACKED) for n in stored if n.endswith(PACKED))
        }
        if also := sorted(n for n in stored if n.endswith(("_zero_point", "_g_idx"))):
            raise UserError(f"{folder}: {also[0]} moves or reorders the codes of a weight, which torchft does not read")

    def names(self) -> set[str]:
        parts = {name + end for name in self._shapes for end in (PACKED, SCALE, SHAPE)}
        return super().names() - parts | set(self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes.get(name) or super().shape(name)

    def dtype(self, name: str) -> str:
        return super().dtype(name + SCALE if name in self._shapes else name)

    def read(self, name: str, *region: slice) -> Tensor:
        if name not in self._shapes:
            return super().read(name, *region)
        rows, columns = region or (slice(0, n) for n in self._shapes[name])
        whole, (_, words), (_, groups) = self._shapes[name][1], *map(super().shape, (name + PACKED, name + SCALE))
        bits = _bits(whole, words)
        each, group = WORD // bits, whole // groups
        first = columns.start // each
        packed = super().read(name + PACKED, rows, slice(first, -(-columns.stop // each)))  # [rows, words]
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
        codes = (packed[..., None] >> shifts & (1 << bits) - 1).flatten(1) - (1 << bits - 1)
        codes = codes[:, columns.start - first * each :][:, : columns.stop - columns.start]
        scales = super().read(name + SCALE, rows, slice(columns.start // group, -(-columns.stop // group)))
        wide = scales.repeat_interleave(group, dim=1)[:, columns.start % group :]
        return codes.to(scales.dtype) * wide[:, : codes.shape[1]]

    def _shape(self, name: str) -> tuple[int, ...]:
        try:
            rows, columns = map(int, super().read(name + SHAPE))
            stored, groups = super().shape(name + PACKED), super().shape(name + SCALE)
            if _bits(columns, stored[1]) and stored[0] == groups[0] == rows and columns % groups[1] == 0:
                return rows, columns
        except (KeyError, ValueError, IndexError, ZeroDivisionError):
            pass
        raise UserError(f"{self.folder}: {name}{PACKED} does not fit its scales and shape: download the folder again")


def _bits(columns: int, words: int) -> int:
    """Of one of ``columns`` codes in as many words; 0 if none fits."""
    return next((bits for bits in (4, 8) if words == -(-columns * bits // WORD)), 0)
