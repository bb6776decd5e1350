"""Rotary position embeddings as functions of positions: no buffers, so nothing to re-initialise after a meta build."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Plain RoPE (https://arxiv.org/abs/2104.09864)."""

    base: float = 10_000.0
    partial: float = 1.0  # share of a head's channels that rotate, the first ones

    def rotary_dim(self, head_dim: int) -> int:
        """How many of a head's channels rotate."""
        return round(self.partial * head_dim)

    def frequencies(self, head_dim: int, device: torch.device) -> Tensor:
        """Angular frequencies [r / 2] fp32, radians per position, for the r channels that rotate."""
        dim = self.rotary_dim(head_dim)
        return 1.0 / self.base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)

    def angles(self, positions: Tensor, head_dim: int, reach: int | None = None) -> Tensor:
        """[b, s, r / 2] fp32 radians for ``positions`` [b, s]. ``reach``: as in ``rope_cos_sin``."""
        return positions[..., None].float() * self.frequencies(head_dim, positions.device)

    @property
    def amplitude(self) -> float:
        """Factor of cos and sin, so that scores of a longer context keep their spread."""
        return 1.0


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


@dataclass(frozen=True, kw_only=True)
class YarnRope(Rope):
    """YaRN (https://arxiv.org/abs/2309.00071): as Llama 3's, with the ramp linear in the channel.

    Channels that turn less than ``slow`` times over the old context are stretched by ``factor``, those that turn more
    than ``fast`` times are kept.
    """

    factor: float
    original_max_seq_len: int  # tokens
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float  # the paper's is 0.1 ln(factor) + 1
    truncate: bool = True  # the ramp begins and ends at whole channels

    def frequencies(self, head_dim: int, device: torch.device) -> Tensor:
        freqs = super().frequencies(head_dim, device)
        dim = self.rotary_dim(head_dim)

        def channel(turns: float) -> float:  # that turns so often
            return dim * math.log(self.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        low, high = channel(self.fast), channel(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        index = torch.arange(dim // 2, dtype=torch.float32, device=device)
        stretch = ((index - low) / (high - low or 0.001)).clamp(0, 1)
        return (1 - stretch) * freqs + stretch * freqs / self.factor

    @property
    def amplitude(self) -> float:
        return self.attention_factor


@dataclass(frozen=True, kw_only=True)
class ProportionalRope(Rope):
    """Gemma 4's: of a whole head's frequencies the ``partial`` share that is highest rotates, the rest does not."""

    factor: float = 1.0

    def rotary_dim(self, head_dim: int) -> int:
        return head_dim

    def frequencies(self, head_dim: int, device: torch.device) -> Tensor:
        freqs = super().frequencies(head_dim, device) / self.factor
        freqs[int(self.partial * head_dim // 2) :] = 0.0
        return freqs


@dataclass(frozen=True, kw_only=True)
class LongRope(Rope):
    """LongRoPE (https://arxiv.org/abs/2402.13753): a factor per frequency, one list for documents up to the old
    context and one for longer ones. In decoding, for all that the cache may come to hold, so that it never changes."""

    short_factors: tuple[float, ...]  # of each pair of channels
    long_factors: tuple[float, ...]
    original_max_seq_len: int  # tokens
    attention_factor: float

    def angles(self, positions: Tensor, head_dim: int, reach: int | None = None) -> Tensor:
        freqs = self.frequencies(head_dim, positions.device)
        short, long = (freqs / _constant(factors, freqs) for factors in (self.short_factors, self.long_factors))
        if reach is not None:
            return positions[..., None].float() * (long if reach > self.original_max_seq_len else short)
        is_long = _document_lengths(positions) > self.original_max_seq_len  # [b, s]
        return positions[..., None].float() * torch.where(is_long[..., None], long, short)

    @property
    def amplitude(self) -> float:
        return self.attention_factor


def rope_cos_sin(rope: Rope, positions: Tensor, head_dim: int, reach: int | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin, each [b, s, 1, r / 2] fp32, for ``positions`` [b, s] and the r channels that rotate.

    ``reach``: tokens that every document may come to have; None: read from the positions, where documents restart at 0.
    """
    angles = rope.angles(positions, head_dim, reach)[:, :, None]
    if rope.amplitude == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * rope.amplitude, angles.sin() * rope.amplitude


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first r channels of x [b, s, h, c] by cos and sin [b, s, 1, r / 2], in fp32.

    Channel i goes with i + r / 2 (the Hub's convention), or with its neighbour if ``interleaved``.
    """
    dim, pair = 2 * cos.shape[-1], -1 if interleaved else -2
    y = x[..., :dim].float().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    # One expression for both channels of a pair: of two, concatenated, the compiler makes kernels that each read x.
    rotated = y * cos.unsqueeze(pair) + y.flip(pair) * torch.stack((-sin, sin), dim=pair)
    rotated = rotated.flatten(-2).type_as(x)
    return rotated if dim == x.shape[-1] else torch.cat((rotated, x[..., dim:]), dim=-1)


def _constant(values: tuple[float, ...], like: Tensor) -> Tensor:
    """[n], made on the device: a copy from the host could not be recorded in a CUDA graph."""
    return torch.cat([like.new_full((1,), value) for value in values])


def _document_lengths(positions: Tensor) -> Tensor:
    """Tokens of each token's document, [b, s], for ``positions`` [b, s] that restart at 0 with each; no sync."""
    ids = (positions == 0).cumsum(1)
    longest = torch.zeros_like(positions[:, :1]).expand(-1, positions.shape[1] + 1)
    return longest.scatter_reduce(1, ids, positions + 1, "amax").gather(1, ids)
