"""A frozen base in 4-bit NormalFloat (QLoRA, https://arxiv.org/abs/2305.14314): about 0.52 bytes a weight.

Contract with the loader: none. An ``NF4Weight`` has the shape and dtype of the weight that it stands for, and
``param.copy_(full)`` quantises, ``.to(dtype)`` dequantises. Compiled or not, only the 4 bits are kept for backward.
"""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchft.adapters.quantised import QuantisedWeight
from torchft.adapters.targets import ALL_LINEAR, find_layers
from torchft.errors import UserError
from torchft.kernels import nf4
from torchft.modules.grouped import StackedLinear, grouped_linear
from torchft.ranks import local


@dataclass(frozen=True, kw_only=True)
class NF4Config:
    """The ``nf4:`` section of a config."""

    targets: str | list[str] = ALL_LINEAR  # pattern(s) of linear layers; all-linear = every one but lm_head


def apply_nf4(model: nn.Module, config: NF4Config, *, device: torch.device | str | None = None) -> list[str]:
    """Freeze the weight of each linear layer that ``config.targets`` matches and hold it in NF4. Returns their names.

    A weight on the meta device is quantised when it is loaded, any other at once. Cast the model to its dtype and call
    this before ``apply_lora``; ``device`` has no effect any more. Raises UserError for a pattern that matches nothing
    and for layers that do not fit.
    """
    layers = find_layers(model, config.targets, key="nf4.targets")
    problems = [
        f"nf4.targets: {name} has {' x '.join(map(str, layer.weight.shape))} = {layer.weight.numel()} weights, not a "
        f"multiple of {nf4.GROUP} as NF4 needs: leave it out of the targets"
        for name, layer in layers.items()
        if layer.weight.numel() % nf4.GROUP
    ]
    if problems:
        raise UserError(*problems)
    for layer in layers.values():
        layer.weight = nn.Parameter(quantise(layer.weight.detach()), requires_grad=False)
        if isinstance(layer, StackedLinear):
            layer.multiply = grouped_nf4
    return list(layers)


def check_shards(model: nn.Module, num_shards: int, *, left: Set[Tensor] = frozenset()) -> None:
    """Raises UserError if an NF4 layer of ``model``, or tensor parallel's part of it, cannot be cut into ``num_shards``
    parts. Call it before FSDP, with what is ``left`` whole.

    FSDP gives each rank ceil(out / ranks) rows, the last ones what is left; a part must hold whole groups.
    """
    parts = {n.removesuffix(".weight"): local(w) for n, w in model.named_parameters() if w not in left}
    weights = {name: part for name, part in parts.items() if isinstance(part, NF4Weight)}
    rows = {name: math.ceil(weight.shape[0] / num_shards) for name, weight in weights.items()}
    problems = [
        f"nf4: {name} has {' x '.join(map(str, weight.shape))} weights; each of {num_shards} ranks would hold "
        f"{rows[name]} rows = {rows[name] * math.prod(weight.shape[1:])}, not a multiple of {nf4.GROUP} as NF4 "
        "needs: leave it out of nf4.targets, or set parallel.shard to another number"
        for name, weight in weights.items()
        if rows[name] * math.prod(weight.shape[1:]) % nf4.GROUP and num_shards > 1
    ]
    if problems:
        raise UserError(*problems)


def quantise(weight: Tensor) -> "NF4Weight":
    """[out, in] or [e, out, in] -> the same in NF4, on its device; their product must be a multiple of 16384."""
    packed = weight.new_empty(weight.numel() // nf4.GROUP, nf4.GROUP_BYTES, dtype=torch.uint8)
    packed = packed if weight.is_meta else nf4.quantise_(packed, weight)
    return NF4Weight(packed, shape=weight.shape, dtype=weight.dtype)


def dequantise(*weights: Tensor, tag: int) -> Tensor:
    """NF4 matrices [out_i, in] -> their values one below the other, [sum(out_i), in], in the first one's dtype.

    A forward and its backward must give another ``tag``, or the compiler keeps the result from one to the other.
    """
    packed = [weight.packed for weight in weights if isinstance(weight, NF4Weight)]
    assert len(packed) == len(weights), "each weight must be NF4"
    return nf4.dequantise(packed, weights[0].shape[1], weights[0].dtype, tag)


class NF4Weight(QuantisedWeight):
    """A frozen matrix [out, in], or a stack of them, in NF4: ``packed`` as kernels/nf4.py lays it out."""

    PARTS = ("packed",)
    packed: Tensor  # [groups, GROUP_BYTES] uint8

    def fill(self, dense: Tensor) -> None:
        nf4.quantise_(self.packed, dense)

    def values(self) -> Tensor:
        return nf4.dequantise([self.packed], self.shape[-1], self.dtype, 0).view(self.shape)

    def empty(self, shape: Sequence[int]) -> "NF4Weight":
        if math.prod(shape) % nf4.GROUP:
            raise UserError(
                f"nf4: tensor parallel would cut a weight of {self.shape[0]} x {self.shape[1]} into parts of "
                f"{shape[0]} x {shape[1]}, not a multiple of {nf4.GROUP} values as NF4 needs: leave such layers out of "
                "nf4.targets, or set parallel.tp to another number"
            )
        packed = self.packed.new_empty(math.prod(shape) // nf4.GROUP, nf4.GROUP_BYTES)
        return NF4Weight(packed, shape=shape, dtype=self.dtype)

    @property
    def group(self) -> int:
        return nf4.GROUP

    @staticmethod
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return nf4_linear(input, weight, bias)


def nf4_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with an NF4 ``weight``: [..., in] -> [..., out], in the dtype of ``input``."""
    assert isinstance(weight, NF4Weight)
    return nf4.NF4Linear.apply(input, weight.packed, bias)


def grouped_nf4(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``grouped_linear`` with an NF4 ``weight`` [e, out, in], all of it dequantised for the time of the product."""
    assert isinstance(weight, NF4Weight)
    return _Grouped.apply(x, weight.packed, offsets, weight.shape[1])


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, offsets: Tensor, out_features: int) -> Tensor:
        ctx.save_for_backward(packed, offsets)
        ctx.shape = (len(offsets), out_features, x.shape[1])
        return grouped_linear(x, nf4.dequantise([packed], x.shape[1], x.dtype, 0).view(ctx.shape), offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        packed, offsets = ctx.saved_tensors
        weight = nf4.dequantise([packed], ctx.shape[2], grad.dtype, 1).view(ctx.shape)
        return grouped_linear(grad.contiguous(), weight.mT, offsets), None, None, None
