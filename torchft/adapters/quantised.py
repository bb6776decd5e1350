"""What frozen weights in a smaller format (nf4.py, fp8.py) have in common."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


class QuantisedWeight(Tensor):
    """A frozen matrix [out, in], or a stack of them [e, out, in], of ``dtype`` to the outside, stored as other tensors.

    F.linear works on a matrix, ``grouped`` on a stack.

    It can be copied, copied into (which quantises), moved, cut between rows and sharded with FSDP2; for anything else
    take its values, with ``.to(dtype)``. A format names its PARTS and says how to fill them, how to read them, where
    they can be cut, and what F.linear does.
    """

    PARTS: ClassVar[tuple[str, ...]]  # the attributes that hold the tensors, in the constructor's order

    @staticmethod
    def __new__(cls, *parts: Tensor, shape: Sequence[int], dtype: torch.dtype) -> "QuantisedWeight":
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts[0].device)

    def __init__(self, *parts: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
        for name, part in zip(self.PARTS, parts, strict=True):
            setattr(self, name, part)

    def fill(self, dense: Tensor) -> None:
        """Quantise ``dense``, of this weight's shape, on this weight's device, into the parts."""
        raise NotImplementedError

    def values(self) -> Tensor:
        """What the parts stand for, in ``dtype``."""
        raise NotImplementedError

    def empty(self, shape: Sequence[int]) -> "QuantisedWeight":
        """A weight of ``shape`` and the same dtype, on this one's device, to be filled. UserError if it cannot be."""
        raise NotImplementedError

    @property
    def group(self) -> int:
        """How many consecutive weights one entry of each part stands for; a cut goes between entries."""
        raise NotImplementedError

    @staticmethod
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear``."""
        raise NotImplementedError

    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        """FSDP2: what this rank, whose shard this is, gives to the others; and its own parts if there are no others.

        All ranks must give the same sizes. Where a shard has fewer rows, FSDP has put padding behind them, in the same
        storage, so each part is given as all of its storage. (FSDP's newer signature, with the whole's size, wants
        every part in the padded shape of the weight.)
        """
        parts = self._parts()
        if mesh.size() == 1:  # FSDP would copy the first part alone
            return (parts[0].new_empty(0),), parts
        stored = (part.new_empty(0).set_(part.untyped_storage()).view(-1, *part.shape[1:]) for part in parts)
        return tuple(stored), None

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: tuple[Tensor, ...] | None,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """FSDP2: the weight, [out and padding, in], of all ranks' parts, which it is a view of; FSDP cuts the padding.

        FSDP frees the gathered parts after forward by emptying their storage, and fills the same storage for backward,
        so ``out``, made from them by the first call, is whole again, as is what autograd has saved.
        """
        if out is not None:
            return None
        parts = metadata or all_gather_outputs
        rows = len(parts[0]) * self.group // self._row
        return type(self)(*parts, shape=(rows, *self.shape[1:]), dtype=param_dtype), ()

    @property
    def _row(self) -> int:
        """How many weights a row has: of a matrix ``in``, of a stack a whole matrix."""
        return math.prod(self.shape[1:])

    def _parts(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.PARTS)

    def _entries(self, rows: int) -> int:
        """How many entries of each part stand for ``rows`` rows."""
        entries, rest = divmod(rows * self._row, self.group)
        assert not rest, f"{self} cannot be cut after {rows} rows"
        return entries

    def _rows(self, start: int, stop: int) -> "QuantisedWeight":
        """Rows of this weight, of the same memory."""
        stop = min(stop, self.shape[0])
        parts = (part[self._entries(start) : self._entries(stop)] for part in self._parts())
        return type(self)(*parts, shape=(stop - start, *self.shape[1:]), dtype=self.dtype)

    def _cut(self, func: Any, *args: Any) -> "QuantisedWeight | list[QuantisedWeight] | None":
        """What FSDP2 and DTensor do to cut a tensor, and to build one from shards; None for any other ``func``."""
        aten = torch.ops.aten
        match func, args:
            case aten.split.Tensor, (num_rows,) | (num_rows, 0):
                return [self._rows(start, start + num_rows) for start in range(0, self.shape[0], num_rows)]
            case aten.slice.Tensor, (0, start, stop):
                return self._rows(start, stop)
            case aten.as_strided.default, ((num_rows, *others), strides, 0) if others == list(self.shape[1:]):
                assert tuple(strides) == self.stride(), f"{self} has no rows of strides {strides}"
                return self._rows(0, num_rows)
            case aten.view.default, (shape,) if shape in ([-1], list(self.shape)):
                shape = self.shape if len(shape) == self.dim() else (self.numel(),)
                return type(self)(*self._parts(), shape=shape, dtype=self.dtype)
            case aten.new_zeros.default | aten.new_empty.default, ((num_rows, *columns),):
                parts = (func(part, (self._entries(num_rows), *part.shape[1:])) for part in self._parts())
                return type(self)(*parts, shape=(num_rows, *columns), dtype=self.dtype)
        return None

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
                for part, other in zip(first._parts(), source._parts(), strict=True):
                    part.copy_(other)
            else:
                first.fill(source.to(first.device).expand(first.shape))
            return first
        if func is aten.copy_.default:
            return first.copy_(others[0].values())
        if func is aten._to_copy.default and kwargs.get("dtype", first.dtype) != first.dtype:  # of a shard: DTensor.to
            return func(first.values(), **kwargs)
        if func in (aten.detach.default, aten.clone.default, aten.empty_like.default, aten._to_copy.default):
            kwargs = {key: kwargs[key] for key in kwargs.keys() & {"device", "non_blocking"}}
            parts = (func(part, *others, **kwargs) for part in first._parts())
            return type(first)(*parts, shape=first.shape, dtype=first.dtype)
        if (cut := first._cut(func, *others)) is not None:
            return cut
        raise TypeError(f"{func} does not work on a {cls.__name__}: take its values, with .to(dtype)")
