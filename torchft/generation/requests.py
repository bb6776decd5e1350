"""What the engine is asked for, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torchft.generation.sampling import Sampling

Finish = Literal["stop", "length", "too_long", "not_finite", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """``seed`` decides its tokens, with ``prompt`` and ``sampling``, whatever else is generated beside it."""

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    is_streamed: bool = False  # report its tokens as they come, not only at the end


@dataclass(frozen=True, kw_only=True)
class Completion:
    """``tokens`` hold the stop token that ended them. ``logps``: theirs, as `sample` gives them."""

    tokens: list[int]
    logps: list[float]
    finish: Finish


class Update(NamedTuple):
    """Of request ``number``: tokens that are new, and how it ended if it did."""

    number: int
    tokens: list[int]
    logps: list[float]
    finish: Finish | None


@dataclass
class Running:
    """A request in its slot, as far as the host knows."""

    number: int
    request: Request
    tokens: list[int] = field(default_factory=list)
    count: int = 1  # tokens drawn by what is queued, if it has not ended; the prefill draws the first

    def most(self, max_len: int) -> int:
        """Tokens that it may come to have, of a slot for ``max_len`` with its prompt."""
        return min(self.request.sampling.max_new_tokens, max_len - len(self.request.prompt))

    @property
    def is_watched(self) -> bool:
        return self.request.is_streamed or bool(self.request.sampling.stop)
