"""A frozen base in 8-bit floating point (https://arxiv.org/abs/2209.05433): its matrix products run twice as fast.

Weights are quantised once, when they are loaded, each output row with its own scale; activations and gradients when
they are used, each token with its own. Forward and input gradient are fp8 products with fp32 accumulation; adapters,
norms, embeddings and the head stay as they are. A weight takes one byte: the hardware multiplies row by row only, so
backward transposes its codes as it goes. GPUs from compute capability 8.9 on; other devices compute the same values by
dequantising. Compile it: uncompiled, quantising activations takes longer than fp8 saves.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchft.adapters.quantised import QuantisedWeight
from torchft.adapters.targets import ALL_LINEAR, find_layers
from torchft.errors import UserError
from torchft.modules.grouped import StackedLinear, grouped_linear

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
MULTIPLE = 16  # both sizes of a matrix, as the hardware needs them


@dataclass(frozen=True, kw_only=True)
class FP8Config:
    """The ``fp8:`` section of a config."""

    targets: str | list[str] = ALL_LINEAR  # pattern(s) of linear layers; all-linear = every one but lm_head


def apply_fp8(model: nn.Module, config: FP8Config, *, device: torch.device) -> list[str]:
    """Freeze the weight of each linear layer that ``config.targets`` matches and hold it in fp8. Returns their names.

    A weight on the meta device is quantised when it is loaded, any other at once. Cast the model to its dtype and call
    this before ``apply_lora``. Raises UserError for a pattern that matches nothing, for layers that do not fit, and for
    a GPU ``device`` without fp8.
    """
    layers = find_layers(model, config.targets, key="fp8.targets")
    if problems := unfit(layers, key="fp8.targets", way_out="leave it out of the targets", device=device):
        raise UserError(*problems)
    for layer in layers.values():
        weight = layer.weight.detach()
        codes = torch.empty_like(weight, dtype=FP8)
        scale = weight.new_empty(weight.shape[:-1], dtype=torch.float32)
        quantised = FP8Weight(codes, scale, shape=weight.shape, dtype=weight.dtype)
        if not weight.is_meta:
            quantised.copy_(weight)
        layer.weight = nn.Parameter(quantised, requires_grad=False)
        if isinstance(layer, StackedLinear):
            layer.multiply = grouped_fp8
    return list(layers)


def unfit(
    layers: Mapping[str, nn.Linear | StackedLinear], *, key: str, way_out: str, device: torch.device
) -> list[str]:
    """What keeps ``layers`` (by name) on ``device`` from multiplying in fp8, as sentences for a UserError.

    ``way_out`` is for layers of odd sizes, under the YAML ``key``.
    """
    problems = [
        f"{key}: {name} is {layer.out_features} x {layer.in_features}, not multiples of {MULTIPLE} as fp8 needs: "
        f"{way_out}"
        for name, layer in layers.items()
        if layer.out_features % MULTIPLE or layer.in_features % MULTIPLE
    ]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        problems.append(
            f"fp8: {torch.cuda.get_device_name(device)} has no fp8 matrix units (compute capability 8.9 or later, such "
            "as L40, H100 or RTX 4090): leave the fp8 section out"
        )
    return problems


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] -> codes [..., n] e4m3 and scales [..., 1] fp32, codes * scales being x with 3 bits of mantissa."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (x.float() / scale).to(FP8), scale


def fp8_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with an fp8 ``weight``: [..., in] -> [..., out], in the dtype of ``input``."""
    assert isinstance(weight, FP8Weight)
    flat = input.reshape(-1, input.shape[-1])
    out = _Product.apply(flat, weight.codes, weight.scale)
    out = out.view(*input.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


class _Product(torch.autograd.Function):
    """x [t, in] times the transpose of codes * scale [out, in]; the weight takes no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return multiply(*quantise_rows(x), codes, scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        codes, scale = ctx.saved_tensors
        # The weight's scales lie along the summed axis here, where the hardware takes none: they go into the gradient.
        grad_codes, grad_scale = quantise_rows(grad * scale.to(grad.dtype))
        ones = torch.ones(codes.shape[1], device=grad.device)
        transposed = transpose(codes, grad_scale)
        return multiply(grad_codes, grad_scale, transposed, ones, grad.dtype, fast=True), None, None


def transpose(codes: Tensor, grad_scale: Tensor) -> Tensor:
    """codes [out, in] -> [in, out], contiguous, and not before ``grad_scale``, which is positive, is known.

    Without the term of zeros the compiler would transpose in forward and keep the result for backward, 7 GiB for 8B
    weights. With it, it writes one kernel that moves tiles, where a plain copy goes byte by byte (benchmarks/fp8.py).
    """
    zero = (grad_scale[:1] < 0).to(torch.uint8)  # [1, 1]
    return (codes.view(torch.uint8) + zero).t().contiguous().view(FP8)


def multiply(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """(x * x_scale [t, 1]) (w * w_scale [out, 1])^T, [t, out] in ``dtype``; ``fast`` sums in fewer bits."""
    if x.is_cuda:  # row scales come with bf16 results only
        out = torch._scaled_mm(
            x, w.t(), scale_a=x_scale, scale_b=w_scale[None], out_dtype=torch.bfloat16, use_fast_accum=fast
        )
        return out.to(dtype)
    return ((x.float() * x_scale) @ (w.float() * w_scale[:, None]).t()).to(dtype)


class FP8Weight(QuantisedWeight):
    """A frozen matrix [out, in], or a stack of them, in fp8: codes and a scale for each row of a matrix."""

    PARTS = ("codes", "scale")
    codes: Tensor  # [..., out, in] e4m3
    scale: Tensor  # [..., out] fp32

    def fill(self, dense: Tensor) -> None:
        codes, scale = quantise_rows(dense)
        self.codes.copy_(codes)
        self.scale.copy_(scale[..., 0])

    def values(self) -> Tensor:
        return _dequantise(self.codes, self.scale, self.dtype)

    def empty(self, shape: Sequence[int]) -> "FP8Weight":
        if any(n % MULTIPLE for n in shape):
            raise UserError(
                f"fp8: tensor parallel would cut a weight of {self.shape[0]} x {self.shape[1]} into parts of "
                f"{shape[0]} x {shape[1]}, not multiples of {MULTIPLE} as fp8 needs: leave such layers out of "
                "fp8.targets, or set parallel.tp to another number"
            )
        return FP8Weight(self.codes.new_empty(shape), self.scale.new_empty(shape[0]), shape=shape, dtype=self.dtype)

    @property
    def group(self) -> int:
        return math.prod(self.shape[1:])

    @staticmethod
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return fp8_linear(input, weight, bias)


def grouped_fp8(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``grouped_linear`` with an fp8 ``weight`` [e, out, in]: half of bf16's memory at bf16's speed.

    Dequantised for the time of the product.
    """
    assert isinstance(weight, FP8Weight)
    return _Grouped.apply(x, weight.codes, weight.scale, offsets)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale, offsets)
        return grouped_linear(x, _dequantise(codes, scale, x.dtype), offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scale, offsets = ctx.saved_tensors
        # Not before the gradient is known: else the compiler would keep forward's dequantised weights for it.
        scale = scale + (grad[:1, :1].float().abs() < 0)
        return grouped_linear(grad.contiguous(), _dequantise(codes, scale, grad.dtype).mT, offsets), None, None, None


def _dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scale[..., None]).to(dtype)
