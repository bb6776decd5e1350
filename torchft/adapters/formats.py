"""Formats of few bits that torchao has for the weights of linear layers, and for what goes in: names and needs."""

import importlib.util
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Format = Literal["int4", "int8_int4", "int8", "nf4", "fp8", "fp8_weight", "fp8_int4", "mxfp4", "nvfp4"]
# int4        weights in groups with one scale each
# int8_int4   the same, and each token's inputs in int8 (torchtune's 8da4w)
# int8        weights, each row with a scale
# nf4         weights in blocks of 64: quantiles of a normal, bitsandbytes' rather than torchao's (nf4_files.py)
# fp8         weights in e4m3, each row with a scale, and each token's inputs likewise
# fp8_weight  weights alone
# fp8_int4    weights in int4, each token's inputs in e4m3
# mxfp4       weights and inputs in e2m1, 32 of them with a power of two
# nvfp4       weights and inputs in e2m1, 16 of them with an fp8 scale

CAPABILITY = {"fp8": (8, 9), "fp8_int4": (9, 0), "mxfp4": (10, 0), "nvfp4": (10, 0)}  # of the GPU, at least
GPUS = {(8, 9): "L40, H100 or RTX 4090", (9, 0): "H100 or H200", (10, 0): "B200 or RTX 5090"}
BF16 = ("fp8", "fp8_int4", "mxfp4", "nvfp4")  # formats whose kernels give bf16 only
# A layer's inputs and its outputs must be multiples of these.
COLUMNS, ROWS = {"nf4": 64, "fp8": 16, "fp8_int4": 128, "mxfp4": 32, "nvfp4": 16}, {"fp8": 16, "mxfp4": 16, "nvfp4": 16}


def torchao_config(format: str, *, group_size: int, search_scales: bool = False) -> Any:
    """torchao's description of ``format``; ``group_size`` weights of a row share a scale in int4.

    ``search_scales``: those of int4 make the error small (HQQ), else the largest weight of the group sets them.
    """
    from torchao.quantization import (  # slow to import
        Float8DynamicActivationFloat8WeightConfig,
        Float8DynamicActivationInt4WeightConfig,
        Float8WeightOnlyConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        PerRow,
    )
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    algorithms, int4 = IntxChooseQParamsAlgorithm, torch.int4  # type: ignore[attr-defined]  # torch's stubs lack it
    how = {"intx_choose_qparams_algorithm": algorithms.HQQ_SCALE_ONLY if search_scales else algorithms.AFFINE}
    match format:
        case "int4":
            return IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(group_size), **how)
        case "int8_int4":
            group = PerGroup(group_size)
            return Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_granularity=group, **how)
        case "int8":
            return Int8WeightOnlyConfig(version=2)  # torchao 0.17 still makes version 1 of it
        case "fp8":
            return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        case "fp8_weight":
            return Float8WeightOnlyConfig()
        case "fp8_int4":
            return Float8DynamicActivationInt4WeightConfig(int4_packing_format="plain")
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4DynamicActivationNVFP4WeightConfig

    if format == "nvfp4":
        return NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)
    fp4 = torch.float4_e2m1fn_x2
    return MXDynamicActivationMXWeightConfig(activation_dtype=fp4, weight_dtype=fp4)


def packed_int4(weight: Any, inputs: Tensor | None = None) -> Tensor:
    """torchao's int4 weight, a code in each byte -> its Int4Tensor of the same values, with two.

    ``inputs``: [in], what they are multiplied by when the layer computes; the weight's columns were divided by it.
    """
    from torchao.quantization import Int4Tensor  # slow to import

    codes, scale = weight.qdata, weight.scale.t().contiguous()  # [out, in] int8; [groups, out]
    pairs = codes[:, 1::2] << 4 | codes[:, ::2] & 15
    zero = torch.zeros_like(scale)
    how = {
        "block_size": list(weight.block_size),
        "shape": weight.shape,
        "act_pre_scale": None if inputs is None else inputs.to(scale.device),
    }
    packed: Tensor = Int4Tensor(pairs, scale, zero, **how)
    return packed


def packed_int4_config(group_size: int) -> Any:
    """torchao's description of `packed_int4`."""
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=group_size)


def unfit(
    layers: Mapping[str, nn.Linear],
    format: str,
    *,
    group_size: int,
    device: torch.device,
    dtype: torch.dtype,
    section: str = "",
) -> list[str]:
    """What keeps ``layers`` (by name) of ``dtype`` on ``device`` from ``format``, as sentences for a UserError.

    ``section``: in front of the YAML's keys, such as "qat.".
    """
    problems = []
    if (least := CAPABILITY.get(format)) is not None:
        found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        if found is None or found < least:
            has = f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}" if found else f"this is a {device}"
            problems.append(
                f"{section}format: {format} needs a GPU of compute capability {least[0]}.{least[1]} or later, such as "
                f"{GPUS[least]}, but {has}: int4 and int8_int4 work everywhere"
            )
    if format == "fp8_int4" and importlib.util.find_spec("mslk") is None:
        problems.append(f"{section}format: fp8_int4 needs the kernels of MSLK: pip install mslk")
    if format in BF16 and dtype != torch.bfloat16:
        problems.append(f"dtype: the products of {format} give bf16, so set dtype: bf16")
    columns, rows = COLUMNS.get(format, group_size if "int4" in format else 1), ROWS.get(format, 1)
    odd: dict[str, None] = {}  # sentences; layers of all blocks share one
    for name, layer in layers.items():
        if layer.in_features % columns or layer.out_features % rows:
            kind = re.sub(r"\.\d+\.", ".*.", name)
            group = f", or set {section}group_size to a divisor" if format in ("int4", "int8_int4") else ""
            odd[
                f"{section}targets: {kind} has {layer.in_features} inputs and {layer.out_features} outputs; {format} "
                f"needs multiples of {columns} and {rows}: leave it out of {section}targets{group}"
            ] = None
    return problems + list(odd)
