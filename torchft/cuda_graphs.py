"""Steps of generation as CUDA graphs: one launch instead of hundreds, which is most of the time of a small model."""

from collections.abc import Callable, Hashable
from weakref import WeakSet

import torch
from torch import Tensor

_IN_USE: "WeakSet[Graphs]" = WeakSet()


class Graphs:
    """Captures each kind of step at its first run, and replays it from then on.

    ``moved()``: the tensors that a step changes and that must not change when it only warms up.
    """

    def __init__(self, moved: Callable[[], list[Tensor]]) -> None:
        self._moved = moved
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()  # memory; the graphs run one after the other, and share it
        _IN_USE.add(self)

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """What ``step()`` does; ``key``: all that decides which kernels it launches, and on which memory."""
        if key not in self._graphs:
            self._graphs[key] = self._captured(step)
        self._graphs[key].replay()

    def _captured(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """``step`` runs twice before, on a side stream as capture wants: kernels load, cuBLAS makes its workspace."""
        before = [t.clone() for t in self._moved()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
                for t, value in zip(self._moved(), before, strict=True):
                    t.copy_(value)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog, another thread, asks the device in the meantime, which is none of this recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # records, and runs nothing
            step()
        return graph


def forget_all() -> None:
    """Before a process group ends: NCCL waits for all graphs that hold its operations to be gone, and says nothing.

    https://github.com/pytorch/pytorch/issues/115388
    """
    for graphs in _IN_USE:
        graphs._graphs.clear()
