"""NF4 weights (https://arxiv.org/abs/2305.14314) in safetensors as bitsandbytes writes them, which is what transformers
and vLLM load where it is installed.

The codes have the weight's own name; beside them lie ``.absmax``, the largest absolute value of each block of 64,
``.quant_map``, what a code stands for, and ``.quant_state.bitsandbytes__nf4``, the sizes, as bytes of JSON. In folders
that others published ``absmax`` is often in 8 bits itself ("double quantisation"): it is read, not written.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.errors import UserError
from torchft.kernels.nf4 import BLOCK, CODEBOOK, nearest, units
from torchft.weights import WeightFiles

STATE = ".quant_state.bitsandbytes__nf4"
DTYPES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}


def quantised(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The plain tensors, by their names in a file, of a matrix [out, in]; ``in`` must be a multiple of 64."""
    codes, absmax = nearest(weight.reshape(-1, BLOCK))
    dtype = str(weight.dtype).removeprefix("torch.")
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": list(weight.shape)}
    return {
        name: codes.view(-1, 1),
        f"{name}.absmax": absmax,
        f"{name}.quant_map": torch.tensor(CODEBOOK),
        f"{name}{STATE}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def config(left: list[str], *, dtype: torch.dtype) -> dict[str, Any]:
    """The ``quantization_config`` of config.json; ``left``: the modules that are stored as they are."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "llm_int8_skip_modules": left,
    }


class NF4Files(WeightFiles):
    """A quantised tensor has the name, shape, dtype and values that it would have if it were not."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._states = {n.removesuffix(STATE): self._state(n) for n in super().names() if n.endswith(STATE)}

    def names(self) -> set[str]:
        return {name for name in super().names() if name in self._states or not self._is_part(name)}

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._states[name]["shape"]) if name in self._states else super().shape(name)

    def dtype(self, name: str) -> str:
        return DTYPES[self._states[name]["dtype"]] if name in self._states else super().dtype(name)

    def read(self, name: str, *region: slice) -> Tensor:
        if name not in self._states:
            return super().read(name, *region)
        state = self._states[name]
        scales = self._absmax(name, state).repeat_interleave(state["blocksize"])[: math.prod(state["shape"])]
        values = units(super().read(name).view(-1)).view(-1).mul_(scales)
        values = values.view(state["shape"]).to(getattr(torch, state["dtype"]))
        return values[region] if region else values

    def _absmax(self, name: str, state: dict[str, Any]) -> Tensor:
        """[blocks] fp32"""
        absmax = super().read(f"{name}.absmax")
        if "nested_blocksize" not in state:
            return absmax
        codebook, scales = super().read(f"{name}.nested_quant_map"), super().read(f"{name}.nested_absmax")
        scales = scales.repeat_interleave(state["nested_blocksize"])[: len(absmax)]
        return codebook[absmax.int()] * scales + state["nested_offset"]

    def _state(self, name: str) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(bytes(super().read(name).tolist()))
            if state["dtype"] in DTYPES and state["blocksize"] > 0 and math.prod(state["shape"]) > 0:
                return state
        except (KeyError, TypeError, ValueError):
            pass
        raise UserError(f"{self.folder}: {name} does not say the sizes of an NF4 weight: download the folder again")

    def _is_part(self, name: str) -> bool:
        weight, dot, _ = name.partition(".weight.")
        return bool(dot) and f"{weight}.weight" in self._states
