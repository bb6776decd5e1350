"""A frozen base in 4-bit NormalFloat (QLoRA, https://arxiv.org/abs/2305.14314): about 0.52 bytes a weight.

Contract with the loader: none. An ``NF4Weight`` has the shape and dtype of the weight that it stands for, and
``param.copy_(full)`` quantises, ``.to(dtype)`` dequantises. Compiled or not, only the 4 bits are kept for backward.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.adapters.targets import ALL_LINEAR, find_linears
from torchft.errors import UserError
from torchft.kernels import nf4


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
    layers = find_linears(model, config.targets, key="nf4.targets")
    problems = [
        f"nf4.targets: {name} has {layer.out_features} x {layer.in_features} = {layer.weight.numel()} weights, not a "
        f"multiple of {nf4.GROUP} as NF4 needs: leave it out of the targets"
        for name, layer in layers.items()
        if layer.weight.numel() % nf4.GROUP
    ]
    if problems:
        raise UserError(*problems)
    for layer in layers.values():
        layer.weight = nn.Parameter(quantise(layer.weight.detach()), requires_grad=False)
    return list(layers)


def quantise(weight: Tensor) -> "NF4Weight":
    """[out, in] -> the same in NF4, on its device; out * in must be a multiple of 16384."""
    packed = weight.new_empty(weight.numel() // nf4.GROUP, nf4.GROUP_BYTES, dtype=torch.uint8)
    return NF4Weight(packed if weight.is_meta else nf4.quantise_(packed, weight), weight.shape, weight.dtype)


def dequantise(*weights: Tensor, tag: int) -> Tensor:
    """NF4 matrices [out_i, in] -> their values one below the other, [sum(out_i), in], in the first one's dtype.

    A forward and its backward must give another ``tag``, or the compiler keeps the result from one to the other.
    """
    packed = [weight.packed for weight in weights if isinstance(weight, NF4Weight)]
    assert len(packed) == len(weights), "each weight must be NF4"
    return nf4.dequantise(packed, weights[0].shape[1], weights[0].dtype, tag)


class NF4Weight(Tensor):
    """A frozen matrix [out, in] in NF4: ``packed`` as kernels/nf4.py lays it out. F.linear works on it.

    It can be copied, copied into and moved; for anything else take its values, with ``.to(dtype)`` or ``dequantise``.
    """

    packed: Tensor  # [groups, GROUP_BYTES] uint8

    @staticmethod
    def __new__(cls, packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> "NF4Weight":
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)

    def __init__(self, packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.packed = packed

    def __repr__(self) -> str:  # type: ignore[override]  # an argument that only torch passes on to itself
        return f"NF4Weight({list(self.shape)}, {self.dtype}, device={str(self.device)!r})"

    def _stable_hash_for_caching(self) -> str:  # what compiled code depends on, for torch.compile's cache on disk
        return f"NF4Weight {list(self.shape)} {self.dtype} {self.device}"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["packed"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        parts: Mapping[str, Tensor], dtype: torch.dtype, size: Sequence[int], stride: Sequence[int]
    ) -> "NF4Weight":
        return NF4Weight(parts["packed"], size, dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return nf4_linear(*args, **(kwargs or {}))
        if func is Tensor.to and any(isinstance(arg, torch.dtype) for arg in (*args, *(kwargs or {}).values())):
            return dequantise(args[0], tag=0).to(*args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub lacks ``func``
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first, *others = args
        aten, kwargs = torch.ops.aten, kwargs or {}
        if func is aten.copy_.default and isinstance(first, NF4Weight):
            (source,) = others[:1]
            if isinstance(source, NF4Weight):
                first.packed.copy_(source.packed)
            else:
                nf4.quantise_(first.packed, source.to(first.device).expand(first.shape))
            return first
        if func is aten.copy_.default:
            return first.copy_(dequantise(others[0], tag=0))
        if func in (aten.detach.default, aten.clone.default, aten.empty_like.default, aten._to_copy.default):
            kwargs = {key: kwargs[key] for key in kwargs.keys() & {"device", "non_blocking"}}
            return NF4Weight(func(first.packed, *others, **kwargs), first.shape, first.dtype)
        raise TypeError(f"{func} does not work on an NF4 weight: take its values, with .to(dtype)")


def nf4_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with an NF4 ``weight``: [..., in] -> [..., out], in the dtype of ``input``."""
    assert isinstance(weight, NF4Weight)
    return nf4.NF4Linear.apply(input, weight.packed, bias)
