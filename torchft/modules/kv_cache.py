"""Static key/value cache for decoding."""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, [b, slots, k, c]; the slot of a token is its position."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.k: Tensor | None = None  # made for the first keys: layers differ in heads
        self.v: Tensor | None = None

    def update(self, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [b, s, k, c] at ``positions`` [b, s]; all keys and values so far, [b, slots, k, c]."""
        if self.k is None or self.v is None:
            self.k, self.v = (x.new_zeros(x.shape[0], self.num_slots, *x.shape[2:]) for x in (k, v))
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.k[rows, positions], self.v[rows, positions] = k, v
        return self.k, self.v


class KVCache:
    """One ``LayerCache`` per layer. Rows may have different lengths: what lies past a row's position is never seen."""

    def __init__(self, num_layers: int, *, num_slots: int) -> None:
        self.layers = [LayerCache(num_slots) for _ in range(num_layers)]
        self.num_slots = num_slots
