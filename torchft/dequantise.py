"""Weight files whose matrices come in few bits, read as if they did not: blocks of FP8 (DeepSeek V3, Kimi K2) and MXFP4
(gpt-oss, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.errors import UserError
from torchft.weights import WeightFiles

FP8_BLOCK = 128  # rows and columns of a matrix that share a scale
MXFP4_BLOCK = 32  # consecutive weights of a row that share an exponent
SCALE, BLOCKS, EXPONENTS = "_scale_inv", "_blocks", "_scales"  # ends of the names of what is stored
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def check_readable(quantised: Any, folder: Path) -> None:
    """UserError unless a config.json's ``quantization_config`` is one that is dequantised here."""
    fields = quantised if isinstance(quantised, dict) else {"quant_method": quantised}
    kind = fields.get("quant_method", "unknown")
    if kind == "mxfp4" or (kind == "fp8" and fields.get("weight_block_size") == [FP8_BLOCK, FP8_BLOCK]):
        return
    raise UserError(
        f"{folder} holds quantised weights (quant_method {kind!r}), which cannot be trained: take the original "
        "checkpoint, and `nf4` or `fp8` in the config to train on a quantised base"
    )


def open_weights(folder: Path) -> WeightFiles:
    """The tensors of a checkpoint folder, of quantised ones their values."""
    files = WeightFiles(folder)
    return DequantisedFiles(folder) if any(name.endswith((SCALE, BLOCKS)) for name in files.names()) else files


class DequantisedFiles(WeightFiles):
    """A quantised tensor has the name, shape and values that it would have if it were not."""

    def names(self) -> set[str]:
        stored = super().names()
        fp8 = {name for name in stored if name.endswith(SCALE) and name.removesuffix(SCALE) in stored}
        mxfp4 = {name for name in stored if name.endswith(BLOCKS) and _exponents(name) in stored}
        packed = mxfp4 | {_exponents(name) for name in mxfp4}
        return stored - fp8 - packed | {name.removesuffix(BLOCKS) for name in mxfp4}

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def shape(self, name: str) -> tuple[int, ...]:
        if not super().__contains__(name + BLOCKS):
            return super().shape(name)
        num_experts, rows, blocks, _ = super().shape(name + BLOCKS)
        return num_experts, blocks * MXFP4_BLOCK, rows  # as the bf16 checkpoint has it

    def dtype(self, name: str) -> str:
        is_quantised = super().__contains__(name + BLOCKS) or super().__contains__(name + SCALE)
        return "BF16" if is_quantised else super().dtype(name)

    def read(self, name: str, *region: slice) -> Tensor:
        if super().__contains__(name + BLOCKS):
            return self._mxfp4(name, *(region or (slice(0, n) for n in self.shape(name))))
        if super().__contains__(name + SCALE):
            return self._fp8(name, *(region or (slice(0, n) for n in self.shape(name))))
        return super().read(name, *region)

    def _fp8(self, name: str, rows: slice, columns: slice) -> Tensor:
        """fp32 [rows, columns]: each value times the scale of its block."""
        blocks = [slice(s.start // FP8_BLOCK, -(-s.stop // FP8_BLOCK)) for s in (rows, columns)]
        scales = super().read(name + SCALE, *blocks).float()
        for dim, wanted in enumerate((rows, columns)):
            first = wanted.start % FP8_BLOCK
            scales = scales.repeat_interleave(FP8_BLOCK, dim).narrow(dim, first, wanted.stop - wanted.start)
        return super().read(name, rows, columns).float() * scales

    def _mxfp4(self, name: str, experts: slice, columns: slice, rows: slice) -> Tensor:
        """bf16 [experts, columns, rows], which holds each value exactly: a code of 4 bits times a power of 2.

        Of a byte's two codes the low one comes first.
        """
        blocks = slice(columns.start // MXFP4_BLOCK, -(-columns.stop // MXFP4_BLOCK))
        first, length = columns.start % MXFP4_BLOCK, columns.stop - columns.start
        codebook = torch.tensor(FP4, dtype=torch.bfloat16)
        out = torch.empty(experts.stop - experts.start, rows.stop - rows.start, length, dtype=torch.bfloat16)
        for place, expert in zip(out, range(experts.start, experts.stop)):  # one at a time: temporaries are large
            one = slice(expert, expert + 1)
            codes = super().read(name + BLOCKS, one, rows, blocks)[0]  # [rows, blocks, 16]
            exponents = super().read(_exponents(name + BLOCKS), one, rows, blocks)[0].int() - 127
            pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).int()  # [rows, blocks, 32]
            values = torch.ldexp(codebook[pairs], exponents[..., None]).flatten(-2)
            place.copy_(values[:, first : first + length])
        return out.mT


def _exponents(blocks: str) -> str:
    return blocks.removesuffix(BLOCKS) + EXPONENTS
