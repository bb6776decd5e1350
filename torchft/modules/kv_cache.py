"""Caches for decoding: of each layer what its mixer must remember. They start empty and grow with the first prefill."""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, [rows, slots, k, c]; the slot of a token is its position.

    ``num_slots`` None: holds one prefill, whose queries see their own rows alone and not what lies in a cache.
    """

    def __init__(self, num_slots: int | None, lengths: Tensor | None = None) -> None:
        self.num_slots = num_slots
        self.lengths = lengths  # [rows] tokens of a prefill's rows, what is padded behind them not counted
        self.seen = num_slots  # slots that queries look at: all, or fewer if none lies further
        self.k: Tensor | None = None  # made for the first keys: layers differ in heads
        self.v: Tensor | None = None
        # Of recurrent mixers, fp32: [rows, ...] behind a prefill; [rows, 2, ...] where there are slots, as two buffers:
        # a token at position p reads that of p - 1 and writes that of p, so that a step may be repeated.
        self.state: Tensor | None = None

    def update(self, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [b, s, k, c] at ``positions`` [b, s] of the first b rows; these, [b, slots, k, c]."""
        if self.num_slots is None:
            self.k, self.v = k, v
            return k, v
        b = len(positions)
        if self.k is None or self.v is None:
            self.k, self.v = (x.new_zeros(b, self.num_slots, *x.shape[2:]) for x in (k, v))
        rows = torch.arange(b, device=positions.device)[:, None]
        self.k[rows, positions], self.v[rows, positions] = k, v
        return self.k[:b], self.v[:b]

    def held(self, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first b rows, which the layer that they are of has stored."""
        assert self.k is not None and self.v is not None
        return self.k[:b], self.v[:b]

    def copy_rows(self, other: "LayerCache", source: Tensor, target: Tensor, *, num_rows: int) -> None:
        """Rows ``source`` [n] of ``other`` become rows ``target`` [n] of ``num_rows``. A source may have many targets.

        What ``other`` holds past the slots of this cache is padding, and left out.
        """
        assert self.num_slots is not None and other.k is not None and other.v is not None
        if self.k is None or self.v is None:
            self.k, self.v = (x.new_zeros(num_rows, self.num_slots, *x.shape[2:]) for x in (other.k, other.v))
        n = min(other.k.shape[1], self.num_slots)
        for own, theirs in ((self.k, other.k), (self.v, other.v)):
            own[target, :n] = theirs[source, :n]
            own[target, n:] = 0.0  # a row before may have left NaN, and 0 times NaN is NaN
        if other.state is not None and other.lengths is not None:
            if self.state is None:
                self.state = other.state.new_zeros(num_rows, 2, *other.state.shape[1:])
            self.state[target, (other.lengths[source] - 1) % 2] = other.state[source]


class KVCache:
    """One ``LayerCache`` per layer. Rows may have different lengths: what lies past a row's position is never seen.

    ``reach``: tokens that a row may come to hold, here or in the cache that it is copied to; None: ``num_slots``.
    """

    def __init__(
        self, num_layers: int, *, num_slots: int | None, reach: int | None = None, lengths: Tensor | None = None
    ) -> None:
        """``lengths`` [rows] of a prefill, for mixers whose state must not see the padding behind."""
        self.layers = [LayerCache(num_slots, lengths) for _ in range(num_layers)]
        self.num_slots, self.reach = num_slots, reach or num_slots

    def see(self, num_slots: int) -> None:
        """From here on queries look at the first ``num_slots`` alone: less to read while all rows are short."""
        self.num_slots = num_slots
        for layer in self.layers:
            layer.seen = num_slots

    def copy_rows(self, other: "KVCache", source: Tensor, target: Tensor, *, num_rows: int) -> None:
        """As `LayerCache.copy_rows`, of every layer."""
        for own, theirs in zip(self.layers, other.layers, strict=True):
            if theirs.k is not None:  # else its layer reads another's
                own.copy_rows(theirs, source, target, num_rows=num_rows)
