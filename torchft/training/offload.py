"""What autograd keeps for backward waits in host memory: copied out while forward goes on, and back ahead of its use.

    model.activations = Offload(model, window=2 * plan.block_bytes)
    model.activations = Offload(model, window=plan.block_bytes, share=0.5)

Works on any block, compiled or not, at any memory budget, because it acts on the tensors that autograd is given.
"""

from collections.abc import Iterator
from itertools import islice
from types import TracebackType
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchft.training.pinned import pinned_zeros

SMALL = 2 << 20  # bytes: below it a copy costs more than it frees
SLAB = 512 << 20  # bytes of pinned memory asked for at a time


class Offload:
    """A context for the blocks' forward; backward runs outside of it. For one model, one forward at a time.

    Device memory is bounded by ``window`` bytes on the way out and ``window`` on the way in. Give it what one or two
    blocks send: with less, copies are waited for. What was kept last stays on the device, since backward begins with
    it. With a ``share`` below 1 some tensors of every block stay, without a copy, so that the bus need not be faster
    than it must on average. Host memory is allocated as the first step needs it, and used again by every other.

    Nothing is offloaded that is under 2 MB or ``smallest`` bytes, or shares memory with a parameter or a buffer.
    Memory that is kept twice is copied once.
    """

    def __init__(self, model: nn.Module, *, window: int, share: float = 1.0, smallest: int = 0) -> None:
        self.model, self.window, self.share, self.smallest = model, window, share, max(SMALL, smallest)
        self.pool = _Pool()
        self.kept = self.offloaded = 0  # bytes of the last forward
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._weights: set[int] = set()  # addresses
        self._by_address: WeakValueDictionary[int, _Kept] = WeakValueDictionary()
        self._order: list[ref[_Kept]] = []  # as they were kept
        self._leaving: list[_Kept] = []  # still on the device, the oldest first
        self._out: torch.cuda.Stream | None = None
        self._in: torch.cuda.Stream | None = None

    def __enter__(self) -> "Offload":
        first = [s for t in islice(self.model.parameters(), 1) for s in _storages(t)]
        if not all(s.data_ptr() in self._weights for s in first):  # they have moved, or it is the first time
            tensors = (*self.model.parameters(), *self.model.buffers())  # a millisecond in which the device waits
            self._weights = {s.data_ptr() for t in tensors for s in _storages(t)}
        self._forget()
        self.kept = self.offloaded = 0
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, where)

    def _pack(self, t: Tensor) -> "Tensor | _View":
        if is_traceable_wrapper_subclass(t) or t.device.type == "meta":
            return t
        storage = t.untyped_storage()
        if t.nbytes < self.smallest or storage.data_ptr() in self._weights:
            return t
        kept = self._by_address.get(storage.data_ptr())
        if kept is None or kept.origin.expired() or kept.version != t._version:
            kept = self._by_address[storage.data_ptr()] = self._keep(storage, t)
        return _View(kept, t)

    def _keep(self, storage: torch.UntypedStorage, t: Tensor) -> "_Kept":
        """It is sent if what is sent comes nearer to its share by that."""
        self.kept += storage.nbytes()
        is_sent = self.offloaded + storage.nbytes() / 2 <= self.share * self.kept
        return self._send(storage, t) if is_sent else self._stay(storage, t)

    def _send(self, storage: torch.UntypedStorage, t: Tensor) -> "_Kept":
        if t.is_cuda and self._out is None:
            self._out, self._in = torch.cuda.Stream(t.device), torch.cuda.Stream(t.device)
        if self.pool.is_idle and self._out is not None and self._in is not None:
            self._out.wait_stream(self._in)  # the last reads of the memory that is now written
        host = self.pool.take(storage.nbytes(), pinned=t.is_cuda)  # [bytes] uint8
        kept = _Kept(storage, t._version, self.pool, host)
        self.offloaded += storage.nbytes()
        source = _bytes(storage)
        if self._out is None:
            host.copy_(source)
        else:
            self._out.wait_stream(torch.cuda.current_stream(t.device))
            with torch.cuda.stream(self._out):
                host.copy_(source, non_blocking=True)
                kept.copied = self._out.record_event()
        self._order.append(ref(kept))
        self._leaving.append(kept)
        while len(self._leaving) > 1 and sum(k.nbytes for k in self._leaving) > self.window:
            self._leave(self._leaving.pop(0))
        return kept

    def _stay(self, storage: torch.UntypedStorage, t: Tensor) -> "_Kept":
        """Only counted: backward, when it comes to it, looks ahead to what is not on the device."""
        kept = _Kept(storage, t._version, self.pool, None)
        self._order.append(ref(kept))
        return kept

    def _leave(self, kept: "_Kept") -> None:
        """Give its device memory back: to the compute stream, after the copy, so nothing need be recorded."""
        if kept.copied is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.copied)
        kept.storage = None

    def _unpack(self, packed: "Tensor | _View") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        kept = packed.kept
        # Backward has begun: what is still on the device stays there, held by autograd alone. The host's copy of it is
        # not read, so nobody waits for it; it may be wrong, since backward overwrites what it has used.
        self._leaving.clear()
        self._fetch(kept)
        kept.is_used = True
        for other in self._next():
            self._fetch(other)
        if kept.arrived is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.arrived)
        assert kept.storage is not None
        return packed.of(kept.storage)

    def _next(self) -> "Iterator[_Kept]":
        """What backward will want next of what was sent, as far as the window goes: of what is left, the last."""
        while self._order and self._order[-1]() is None:
            self._order.pop()
        ahead = 0
        for entry in reversed(self._order):
            if (kept := entry()) is None or kept.is_used or kept.host is None:
                continue
            ahead += kept.nbytes
            if ahead > self.window:
                return
            yield kept

    def _fetch(self, kept: "_Kept") -> None:
        if kept.storage is not None:
            return
        assert kept.host is not None
        kept.storage = torch.empty(kept.nbytes, dtype=torch.uint8, device=kept.device).untyped_storage()
        target = _bytes(kept.storage)
        if self._in is None:
            target.copy_(kept.host)
            return
        assert kept.copied is not None
        self._in.wait_event(kept.copied)
        self._in.wait_stream(torch.cuda.current_stream(kept.device))  # which may still use the memory just allocated
        with torch.cuda.stream(self._in):
            target.copy_(kept.host, non_blocking=True)
            kept.arrived = self._in.record_event()

    def _forget(self) -> None:
        """Drop what an earlier forward without a backward left."""
        self._leaving.clear()
        self._order = [entry for entry in self._order if entry() is not None]


class _Kept:
    """One storage of saved tensors: on the device, in host memory, or both. Freed when autograd drops its last view."""

    def __init__(self, storage: torch.UntypedStorage, version: int, pool: "_Pool", host: Tensor | None) -> None:
        self.version, self.pool = version, pool
        self.device, self.nbytes = storage.device, storage.nbytes()
        self.storage: torch.UntypedStorage | None = storage
        self.origin = StorageWeakRef(storage)
        self.host = host  # the copy, a piece of the pool; None: it stays on the device
        self.copied: torch.cuda.Event | None = None
        self.arrived: torch.cuda.Event | None = None
        self.is_used = False

    def __del__(self) -> None:
        if self.arrived is not None and not self.is_used:  # nobody waited for the copy into memory that is now freed
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
        if self.host is not None:
            self.pool.give_back()


class _View:
    """A saved tensor, as a view of its storage."""

    def __init__(self, kept: _Kept, t: Tensor) -> None:
        self.kept, self.dtype = kept, t.dtype
        self.layout = t.storage_offset(), tuple(t.shape), t.stride()

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(storage, *self.layout)


class _Pool:
    """Host memory by the slab, handed out from one end; free again when all of it has been given back."""

    def __init__(self) -> None:
        self.slabs: list[Tensor] = []
        self._slab = self._used = self._live = 0  # index; bytes of that slab; pieces

    @property
    def is_idle(self) -> bool:
        return self._live == 0

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self.slabs)

    def take(self, nbytes: int, *, pinned: bool) -> Tensor:
        """[nbytes] uint8."""
        if self.is_idle:
            self._slab = self._used = 0
        while self._slab < len(self.slabs) and self._used + nbytes > self.slabs[self._slab].nbytes:
            self._slab, self._used = self._slab + 1, 0
        if self._slab == len(self.slabs):
            make = pinned_zeros if pinned else torch.zeros
            self.slabs.append(make(max(SLAB, nbytes), dtype=torch.uint8))
        piece = self.slabs[self._slab][self._used : self._used + nbytes]
        self._used += -(-nbytes // 512) * 512
        self._live += 1
        return piece

    def give_back(self) -> None:
        self._live -= 1


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _storages(t: Tensor) -> list[torch.UntypedStorage]:
    if is_traceable_wrapper_subclass(t):
        return [s for name in t.__tensor_flatten__()[0] for s in _storages(getattr(t, name))]
    return [t.untyped_storage()]
