"""Rotary position embeddings as functions of positions: no buffers, so nothing to re-initialise after a meta build."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Plain RoPE (https://arxiv.org/abs/2104.09864)."""

    base: float = 10_000.0

    def frequencies(self, head_dim: int, device: torch.device) -> Tensor:
        """Angular frequencies [c / 2] fp32, radians per position."""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        return 1.0 / self.base**exponent


@dataclass(frozen=True, kw_only=True)
class LinearRope(Rope):
    """Position interpolation (https://arxiv.org/abs/2306.15595): every frequency divided by ``factor``."""

    factor: float

    def frequencies(self, head_dim: int, device: torch.device) -> Tensor:
        return super().frequencies(head_dim, device) / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(Rope):
    """Llama 3.1 scaling (https://arxiv.org/abs/2407.21783): long waves stretched, short ones kept, a ramp between.

    Wavelengths over ``original_max_seq_len / low_freq_factor`` tokens are stretched by ``factor``; those under
    ``original_max_seq_len / high_freq_factor`` are kept.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192  # tokens

    def frequencies(self, head_dim: int, device: torch.device) -> Tensor:
        freqs = super().frequencies(head_dim, device)
        turns = self.original_max_seq_len * freqs / (2 * math.pi)  # over the old context
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return keep * freqs + (1 - keep) * freqs / self.factor


def rope_cos_sin(rope: Rope, positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each [b, s, 1, c / 2] fp32, for ``positions`` [b, s]."""
    angles = positions[..., None].float() * rope.frequencies(head_dim, positions.device)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last dimension of x [b, s, h, c], in fp32 (the Hub's convention)."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)
