"""Weight files whose matrices come in few bits, read as if they did not: blocks of FP8 (DeepSeek V3, Kimi K2), MXFP4
(gpt-oss, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf), what torchao writes
(quantise.py), NF4 (nf4_files.py), and packed integers (packed_files.py).
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.errors import UserError
from torchft.nf4_files import DTYPES, STATE, NF4Files
from torchft.packed_files import METHOD, PACKED, PackedFiles, unreadable
from torchft.weights import WeightFiles

FP8_BLOCK = 128  # rows and columns of a matrix that share a scale
MXFP4_BLOCK = 32  # consecutive weights of a row that share an exponent
SCALE, BLOCKS, EXPONENTS = "_scale_inv", "_blocks", "_scales"  # ends of the names of what is stored
QDATA = "._weight_qdata"  # and of torchao's codes of a weight
INT4 = "Int4Tensor"  # two codes in each byte; torchao's other tensors have one in each element
TORCHAO = {  # tensors of torchao's that are read, and what says that inputs are rounded too
    "IntxUnpackedToInt8Tensor": "activation_quantization",
    "Int8Tensor": "act_quant_kwargs",
    "Float8Tensor": "act_quant_kwargs",
    INT4: "activation_dtype",
}
INPUTS = {"IntxUnpackedToInt8Tensor": "int8", "Float8Tensor": "fp8"}  # to what: adapters/qat.py
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def check_readable(quantised: Any, folder: Path) -> None:
    """UserError unless a config.json's ``quantization_config`` is one that is dequantised here."""
    fields = quantised if isinstance(quantised, dict) else {"quant_method": quantised}
    kind = fields.get("quant_method", "unknown")
    if kind in ("mxfp4", "torchao") or (kind == "fp8" and fields.get("weight_block_size") == [FP8_BLOCK, FP8_BLOCK]):
        return
    if kind == "bitsandbytes" and fields.get("bnb_4bit_quant_type") == "nf4":
        return
    others = unreadable(fields) if kind == METHOD else []
    if kind == METHOD and not others:
        return
    what = ", ".join([f"quant_method {kind!r}", *others])
    raise UserError(
        f"{folder} holds quantised weights ({what}), which cannot be trained: take the original checkpoint, and `nf4` "
        "or `fp8` in the config to train on a quantised base"
    )


def open_weights(folder: Path) -> WeightFiles:
    """The tensors of a checkpoint folder, of quantised ones their values."""
    files = WeightFiles(folder)
    if any(name.endswith(QDATA) for name in files.names()):
        return TorchaoFiles(folder)
    if any(name.endswith(STATE) for name in files.names()):
        return NF4Files(folder)
    if any(name.endswith(PACKED) for name in files.names()):
        return PackedFiles(folder)
    return DequantisedFiles(folder) if any(name.endswith((SCALE, BLOCKS)) for name in files.names()) else files


class DequantisedFiles(WeightFiles):
    """A quantised tensor has the name, shape and values that it would have if it were not.

    UserError where FP8's scales are of other blocks than those that are read here.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        scaled = sorted(n for n in super().names() if super(DequantisedFiles, self).__contains__(n + SCALE))
        shapes = {name: (super(DequantisedFiles, self).shape(name), self.shape(name + SCALE)) for name in scaled}
        if others := [n for n, (of, scales) in shapes.items() if scales != tuple(-(-d // FP8_BLOCK) for d in of)]:
            of, scales = shapes[others[0]]
            raise UserError(
                f"{folder}: {len(others)} FP8 tensors, such as {others[0]} {list(of)}, have scales of another shape "
                f"({list(scales)}) than one for each block of {FP8_BLOCK} x {FP8_BLOCK}, which is what torchft reads: "
                "take the original checkpoint"
            )

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


class TorchaoFiles(WeightFiles):
    """A quantised tensor has the name, shape, dtype and values that it would have if it were not.

    Raises UserError for kinds of tensors that are not read here.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        stored, about = super().names(), self.metadata()
        self._kinds: dict[str, dict[str, Any]] = {}  # name of a quantised weight -> what torchao says of it
        self._about = about
        for name in (f"{part.removesuffix(QDATA)}.weight" for part in stored if part.endswith(QDATA)):
            try:
                described = json.loads(about[name])
                kind, data = described["_type"], described["_data"]
                dtype = super().dtype(_part(name, "scale")) if kind == INT4 else DTYPES[data["dtype"]["_data"]]
            except (KeyError, TypeError, ValueError):
                kind, dtype, described = "unknown", "BF16", {}
            if kind not in TORCHAO or dtype not in DTYPES.values():
                raise UserError(
                    f"{folder}: {name} is torchao's {kind} in {dtype}, which torchft does not read (it reads "
                    f"{', '.join(TORCHAO)}): use transformers or vLLM, or the checkpoint that it was made of"
                )
            self._kinds[name] = described | {"dtype": dtype}

    def names(self) -> set[str]:
        parts = {name for name in super().names() if name.rpartition(".")[2].startswith("_weight_")}
        return super().names() - parts | set(self._kinds)

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._kinds:
            return super().shape(name)
        rows, columns = super().shape(_part(name, "qdata"))
        return rows, columns * (2 if self._kinds[name]["_type"] == INT4 else 1)

    def dtype(self, name: str) -> str:
        return str(self._kinds[name]["dtype"]) if name in self._kinds else super().dtype(name)

    def read(self, name: str, *region: slice) -> Tensor:
        if name not in self._kinds:
            return super().read(name, *region)
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict  # slow to import

        parts = (_part(name, part) for part in self._kinds[name]["_tensor_data_names"])
        tensors = {part: super(TorchaoFiles, self).read(part) for part in parts}
        about = {name: self._about[name], "tensor_names": json.dumps([name])}
        quantised = unflatten_tensor_state_dict(tensors, about)[0][name]
        values: Tensor = int4_values(quantised) if self._kinds[name]["_type"] == INT4 else quantised.dequantize()
        return values[region] if region else values

    def inputs(self) -> dict[str, str]:
        """The weights whose inputs are rounded too, and to what: "int8" or "fp8"."""
        found = {}
        for name, described in self._kinds.items():
            kind, data = described["_type"], described["_data"]
            if kind == INT4 and data["activation_dtype"]["_data"] != "bfloat16":
                found[name] = "fp8"
            elif kind != INT4 and data.get(TORCHAO[kind]):
                found[name] = INPUTS[kind]
        return found


def int4_values(quantised: Any) -> Tensor:
    """Of torchao's Int4Tensor [out, in], which has no ``dequantize``: of a byte's codes the low one comes first."""
    codes = torch.stack((quantised.qdata << 4 >> 4, quantised.qdata >> 4), dim=-1).flatten(1)  # signs are kept
    groups = codes.unflatten(1, (-1, quantised.block_size[1])).float()
    values = (groups * quantised.scale.t()[..., None] + quantised.zero_point.t()[..., None]).flatten(1)
    if quantised.act_pre_scale is not None:  # of the inputs (AWQ)
        values *= quantised.act_pre_scale
    return values.to(quantised.scale.dtype)


def _part(name: str, part: str) -> str:
    """What torchao calls a part of the weight ``name`` in a file."""
    return f"{name.removesuffix('weight')}_weight_{part}"
