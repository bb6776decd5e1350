"""Static key/value cache for decoding."""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, [b, slots, k, c]; the slot of a token is its position."""

    def __init__(self, shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device) -> None:
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [b, s, k, c] at ``positions`` [b, s]; all keys and values so far, [b, slots, k, c]."""
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.k[rows, positions], self.v[rows, positions] = k, v
        return self.k, self.v


class KVCache:
    """One ``LayerCache`` per layer. Rows may have different lengths: what lies past a row's position is never seen."""

    def __init__(
        self,
        num_layers: int,
        *,
        batch_size: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, num_slots, num_kv_heads, head_dim)
        self.layers = [LayerCache(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.num_slots = num_slots
