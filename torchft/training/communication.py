"""How much of a GPU's time goes into talking to other GPUs, from the kernels of a profile."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch.autograd import DeviceType
from torch.profiler import profile

Span = tuple[float, float]  # start and end, microseconds


class Communication(NamedTuple):
    """Shares, 0 to 1, of the time from the first kernel to the end of the last."""

    running: float  # a kernel of NCCL runs
    exposed: float  # it runs, and no other kernel does: the time that faster links, or more overlap, would save


def communication(profiler: profile) -> Communication | None:
    """Of a finished profile; None if no kernel of NCCL ran, as on CPUs, whose collectives leave no such times."""
    events = (e for e in profiler.events() if e.device_type == DeviceType.CUDA)
    kernels = [e for e in events if not e.is_user_annotation]  # ranges that FSDP2 and others name
    spans = [(e.name, (e.time_range.start, e.time_range.end)) for e in kernels]
    theirs = [span for name, span in spans if name.startswith("nccl")]
    return shares(theirs, [span for name, span in spans if not name.startswith("nccl")]) if theirs else None


def shares(theirs: Sequence[Span], others: Sequence[Span]) -> Communication:
    """``theirs``: of kernels that communicate, at least one. Spans may overlap, those of one list too."""
    everything = [*theirs, *others]
    whole = max(end for _, end in everything) - min(start for start, _ in everything)
    exposed = _length(everything) - _length(others)
    return Communication(running=_length(theirs) / whole, exposed=exposed / whole)


def _length(spans: Iterable[Span]) -> float:
    """Of the union of the spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
