"""What frozen weights in a smaller format (nf4.py, fp8.py) have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


class QuantisedWeight(Tensor):
    """A frozen matrix [out, in] of ``dtype`` to the outside, stored as other tensors. F.linear works on it.

    It can be copied, copied into (which quantises) and moved; for anything else take its values, with ``.to(dtype)``.
    A format names its PARTS and says how to fill them, how to read them, and what F.linear does.
    """

    PARTS: ClassVar[tuple[str, ...]]  # the attributes that hold the tensors, in the constructor's order

    @staticmethod
    def __new__(cls, *parts: Tensor, shape: Sequence[int], dtype: torch.dtype) -> "QuantisedWeight":
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts[0].device)

    def __init__(self, *parts: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
        for name, part in zip(self.PARTS, parts, strict=True):
            setattr(self, name, part)

    def fill(self, dense: Tensor) -> None:
        """Quantise ``dense`` [out, in], on this weight's device, into the parts."""
        raise NotImplementedError

    def values(self) -> Tensor:
        """The matrix [out, in] that the parts stand for, in ``dtype``."""
        raise NotImplementedError

    @staticmethod
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear``."""
        raise NotImplementedError

    def __repr__(self) -> str:  # type: ignore[override]  # an argument that only torch passes on to itself
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, device={str(self.device)!r})"

    def _stable_hash_for_caching(self) -> str:  # what compiled code depends on, for torch.compile's cache on disk
        return f"{type(self).__name__} {list(self.shape)} {self.dtype} {self.device}"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return list(self.PARTS), self.dtype

    @classmethod
    def __tensor_unflatten__(
        cls, parts: Mapping[str, Tensor], dtype: torch.dtype, size: Sequence[int], stride: Sequence[int]
    ) -> "QuantisedWeight":
        return cls(*(parts[name] for name in cls.PARTS), shape=size, dtype=dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return cls.linear(*args, **(kwargs or {}))
        if func is Tensor.to and any(isinstance(arg, torch.dtype) for arg in (*args, *(kwargs or {}).values())):
            return args[0].values().to(*args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub lacks ``func``
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first, *others = args
        aten, kwargs = torch.ops.aten, kwargs or {}
        if func is aten.copy_.default and isinstance(first, QuantisedWeight):
            source = others[0]
            if type(source) is type(first):
                for name in first.PARTS:
                    getattr(first, name).copy_(getattr(source, name))
            else:
                first.fill(source.to(first.device).expand(first.shape))
            return first
        if func is aten.copy_.default:
            return first.copy_(others[0].values())
        if func in (aten.detach.default, aten.clone.default, aten.empty_like.default, aten._to_copy.default):
            kwargs = {key: kwargs[key] for key in kwargs.keys() & {"device", "non_blocking"}}
            parts = [func(getattr(first, name), *others, **kwargs) for name in first.PARTS]
            return type(first)(*parts, shape=first.shape, dtype=first.dtype)
        raise TypeError(f"{func} does not work on a {cls.__name__}: take its values, with .to(dtype)")
