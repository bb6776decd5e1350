"""What a query may see: documents in packed rows, sliding windows, slots of a KV cache."""

import torch
from torch import Tensor


def document_mask(positions: Tensor, window: int | None) -> Tensor:
    """[b, 1, s, s] bool, True where q sees k: the same document, not later, within ``window`` tokens.

    ``positions`` [b, s] restart at 0 with each packed document.
    """
    document = (positions == 0).cumsum(-1)
    visible = document[:, :, None] == document[:, None, :]
    return (visible & _causal(positions.shape[1], window, positions.device))[:, None]


def window_mask(seq_len: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, s, s] bool for rows that hold one document each."""
    return _causal(seq_len, window, device)[None, None]


def cache_mask(positions: Tensor, num_slots: int, window: int | None) -> Tensor:
    """[b, 1, s, slots] bool for a KV cache whose slot number is the position: slots up to the query's own."""
    slots = torch.arange(num_slots, device=positions.device)
    delta = positions[:, :, None] - slots
    visible = delta >= 0 if window is None else (delta >= 0) & (delta < window)
    return visible[:, None]


def _causal(seq_len: int, window: int | None, device: torch.device) -> Tensor:
    index = torch.arange(seq_len, device=device)
    delta = index[:, None] - index[None, :]
    return delta >= 0 if window is None else (delta >= 0) & (delta < window)
