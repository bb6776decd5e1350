"""The processes of a run, and tensors that are spread over them. Everything here reads the same in one process.

A rank is one process, of one device. A sharded parameter is a DTensor (torch.distributed.tensor): each rank holds a
part of it. Functions that say "all ranks" must be called by all of them, in the same order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from torchft import files
from torchft.errors import UserError

MAIN_FIRST_S = 24 * 3600  # tokenising much text takes hours; a main rank that dies is noticed at once

T = TypeVar("T")
Region = tuple[slice, ...]  # of a whole tensor, a slice for each dimension


def rank() -> int:
    """This process's number, 0 if there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes what there is one of: files, the screen."""
    return rank() == 0


@contextmanager
def main_first() -> Iterator[None]:
    """All ranks: the main one goes through the block before the others, which then find what it has cached.

    They wait as long as it takes, up to MAIN_FIRST_S, whatever the time-out of the job's collectives. If it raises a
    UserError, so do the others, without the block.
    """
    waits = num_ranks() > 1
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=MAIN_FIRST_S)) if waits else None
    if is_main():
        try:
            yield
        except UserError as e:
            from_main(partial(_raise, e), group)
    from_main(lambda: None, group)
    if group is not None:
        dist.destroy_process_group(group)
    if not is_main():
        yield


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """All ranks: `files.new_folder` by the main one; the others get the name, and write nothing."""
    with files.new_folder(folder) if is_main() else nullcontext(folder) as new:
        yield new


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """All ranks: everybody's small picklable ``value``, by rank. ``group``: of all ranks, to talk beside the others."""
    values: list[Any] = [value] * num_ranks()
    if num_ranks() > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def from_main(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """All ranks: what ``function`` returns on the main rank, or the UserError that it raises there, on every rank."""
    result: list[Any] = [None, None]
    if is_main():
        try:
            result[0] = function()
        except UserError as e:
            result[1] = e.problems
    if num_ranks() > 1:
        dist.broadcast_object_list(result, src=0, group=group)
    if result[1] is not None:
        raise UserError(*result[1], is_shared=True)
    return result[0]


def agree(error: BaseException | None, group: dist.ProcessGroup | None = None) -> None:
    """All ranks: raises if any rank has an ``error``: its own where there is one, else a UserError that quotes them."""
    texts = gather(None if error is None else str(error), group)
    found = [(r, text) for r, text in enumerate(texts) if text is not None]
    if error is not None:
        raise error
    if found:
        raise UserError(*(f"rank {r}: {text}" for r, text in found), is_shared=True)


def region(t: Tensor) -> Region:
    """Which part of the whole this rank holds; all of a tensor that is not sharded."""
    starts, sizes = [0] * t.dim(), list(t.shape)
    for size, place, _, dim in _cuts(t) if isinstance(t, DTensor) else ():
        each = -(-sizes[dim] // size)
        before = min(place * each, sizes[dim])
        starts[dim], sizes[dim] = starts[dim] + before, min(each, sizes[dim] - before)
    return tuple(slice(start, start + n) for start, n in zip(starts, sizes, strict=True))


def is_sharded(t: Tensor) -> bool:
    return isinstance(t, DTensor)


def num_copies(t: Tensor) -> int:
    """How many ranks hold the same part as this one."""
    if not isinstance(t, DTensor):
        return num_ranks()
    sizes = [t.device_mesh.size(i) for i, placement in enumerate(t.placements) if placement.is_replicate()]
    return prod(sizes)


def is_first_copy(t: Tensor) -> bool:
    """Whether no rank before this one holds the same part: the one that writes it."""
    if not isinstance(t, DTensor):
        return is_main()
    place = t.device_mesh.get_coordinate()
    return place is not None and all(n == 0 for n, kind in zip(place, t.placements) if kind.is_replicate())


def sharded_like(t: Tensor, part: Tensor) -> Tensor:
    """This rank's ``part`` as a tensor that is sharded as ``t`` is."""
    assert isinstance(t, DTensor)
    return DTensor.from_local(part, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())


def local(t: Tensor) -> Tensor:
    """This rank's part, of the same memory."""
    return t.to_local() if isinstance(t, DTensor) else t


@torch.no_grad()
def whole(t: Tensor) -> Tensor:
    """All ranks: the whole tensor, on its device, a quantised one dequantised."""
    if not isinstance(t, DTensor):
        return t.detach()
    part, cuts, sizes = t.to_local().to(t.dtype), _cuts(t), list(t.shape)
    lengths = []  # of what is cut, before each cut
    for size, place, _, dim in cuts:
        each = -(-sizes[dim] // size)
        lengths.append(sizes[dim])
        sizes[dim] = min(each, sizes[dim] - min(place * each, sizes[dim]))
    for (_, _, axis, dim), length in zip(reversed(cuts), reversed(lengths)):
        part = _joined(part, dim, length, t.device_mesh.get_group(axis))
    return part


@torch.no_grad()
def copy_part(t: Tensor, values: Tensor) -> None:
    """Copies this rank's part of ``values``, which are whole, into ``t``."""
    local(t).copy_(values[region(t)])


def sum_over(x: Tensor, group: str) -> Tensor:
    """All ranks of the process group of that name: the sum of every ``x``. Without gradient."""
    ops = torch.ops._c10d_functional
    summed: Tensor = ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group))
    return summed


def _cuts(t: DTensor) -> list[tuple[int, int, int, int]]:
    """(ranks, which of them this one is, their axis of the mesh, dimension that is cut), in the order of cutting.

    Each cut is into ceil(n / ranks). From left to right, but for what FSDP2 cuts a second time along a dimension that
    tensor parallel had cut before: it calls that a strided shard.
    """
    mesh, place = t.device_mesh, t.device_mesh.get_coordinate()
    assert place is not None, "this rank has no part of the tensor"
    cuts: list[tuple[int, Any]] = [(axis, kind) for axis, kind in enumerate(t.placements) if not kind.is_replicate()]
    cuts.sort(key=lambda cut: type(cut[1]) is not Shard)
    return [(mesh.size(axis), place[axis], axis, kind.dim) for axis, kind in cuts]


def _joined(part: Tensor, dim: int, length: int, group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks of ``group`` along ``dim``, together ``length``; the last ranks have fewer or none."""
    each = -(-length // group.size())
    front = part.movedim(dim, 0)
    filled = front.new_zeros(each, *front.shape[1:])
    filled[: len(front)] = front
    ops = torch.ops._c10d_functional
    parts = ops.wait_tensor(ops.all_gather_into_tensor(filled, group.size(), group.group_name))
    return parts[:length].movedim(0, dim).contiguous()


def _raise(error: BaseException) -> None:
    raise error
