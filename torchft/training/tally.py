"""Means over samples between two reports, of all ranks."""

import torch
from torch import Tensor

from torchft.training.distributed import World
from torchft.training.metrics import Row


class Tally:
    """Collects values by name. The names are given at the start, so that all ranks speak of the same."""

    def __init__(self, world: World, names: tuple[str, ...]) -> None:
        self._world, self._names = world, names
        self._sums = torch.zeros(2, len(names), dtype=torch.float64, device=world.device)

    @torch.no_grad()
    def add(self, **values: Tensor) -> None:
        """Values of samples of this rank, each of any shape, also empty; bool as 0 and 1."""
        for i, name in enumerate(self._names):
            self._sums[0, i] += values[name].double().sum()
            self._sums[1, i] += values[name].numel()

    def row(self, prefix: str = "") -> Row:
        """The means since the last row; waits for the device. All ranks call it."""
        sums, counts = self._world.sum(self._sums).tolist()
        self._sums.zero_()
        return {f"{prefix}{name}": s / n for name, s, n in zip(self._names, sums, counts) if n}
