"""Batches made ahead on a thread of their own, pinned, and queued for the device before they are needed.

Evaluation's are made by torchdata.nodes (`one_epoch`), training's are not: there threads start anew in every epoch, so
that nothing is ready when one begins, and the state is a snapshot with a count of batches to replay, which a plain
Loader could not load.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torchdata import nodes

from torchft.data.batch import Batch
from torchft.data.loader import Loader
from torchft.data.samples import Samples
from torchft.data.stream_loader import StreamLoader

Made = tuple[Batch, dict[str, Any]]  # a batch and the loader's position after it


class Prefetch:
    """A Loader's batches, the same ones in the same order, already on ``device``: same methods, same saved state.

    The thread works only on batches that are pending, up to ``depth`` of them, also across the end of an epoch (whose
    next order, for packed rows, takes seconds). What it raises, the consumer's `take` raises. The state is the position
    of what was handed out. `close` ends the thread; so does the end of the program.

    Args:
        depth: batches ahead; give twice what an optimizer step takes. 8 rows of 2048 tokens are 0.4 MB.
    """

    def __init__(self, loader: Loader | StreamLoader, device: torch.device | str, *, depth: int = 2) -> None:
        assert depth >= 1
        self._loader, self._device, self._depth = loader, torch.device(device), depth
        self._pins = self._device.type == "cuda"
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._pending: deque[Future[Made]] = deque()
        self._state = loader.state_dict()

    @property
    def samples(self) -> Samples:
        return self._loader.samples

    @property
    def epoch(self) -> int:
        """Of the next batch."""
        return self._state["epoch"]

    def num_steps(self, micro_steps: int, *, epochs: int, max_steps: int | None) -> int:
        """Optimizer steps of ``micro_steps`` batches each, at most ``max_steps``. No step spans two epochs."""
        return self._loader.num_steps(micro_steps, epochs=epochs, max_steps=max_steps)

    def __iter__(self) -> Iterator[Batch]:
        """What is left of the current epoch."""
        epoch = self.epoch
        while self.epoch == epoch:
            yield self._next()

    def take(self, num_batches: int) -> list[Batch]:
        """The next ``num_batches`` batches; fewer, never none, where the epoch ends: no window spans two epochs."""
        return list(islice(self, num_batches))

    def state_dict(self) -> dict[str, Any]:
        """The position after what was handed out, as Loader's."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position that this or a Loader saved. What was made ahead is dropped."""
        self._drop()
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()

    def close(self) -> None:
        """Ends the thread; the loader is where this one was, and may be used alone."""
        self._drop()
        self._loader.close()
        self._loader.load_state_dict(self._state)
        self._thread.shutdown()

    def _next(self) -> Batch:
        while len(self._pending) < self._depth:
            self._pending.append(self._thread.submit(self._make))
        try:
            batch, state = self._pending[0].result()
        except BaseException:  # also Ctrl-C while waiting: the loader goes back to what was handed out
            self._drop()
            self._loader.load_state_dict(self._state)
            raise
        self._pending.popleft()
        self._pending.append(self._thread.submit(self._make))
        self._state = state
        return batch.to(self._device)

    def _make(self) -> Made:
        """Runs in the thread, which alone touches the loader while anything is pending."""
        (batch,) = self._loader.take(1)
        return (batch.pin() if self._pins else batch), self._loader.state_dict()

    def _drop(self) -> None:
        """Forgets what is pending, and waits for the one that is being made."""
        for future in self._pending:
            future.cancel()
        for future in self._pending:
            if not future.cancelled():
                future.exception()
        self._pending.clear()


def one_epoch(loader: Loader, device: torch.device | str) -> Iterator[Batch]:
    """What is left of the epoch, on ``device``, made ahead and pinned: for evaluation, which is not resumed."""
    node = nodes.IterableWrapper(loader)
    if torch.device(device).type == "cuda":
        node = nodes.Mapper(node, Batch.pin)
    for batch in nodes.Loader(nodes.Prefetcher(node, prefetch_factor=2)):
        yield batch.to(device)
