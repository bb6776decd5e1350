"""Shares of time against a count of the moments, one by one."""

import random
from collections import namedtuple

import pytest
import torch
from torch.autograd import DeviceType

from torchft.training.communication import communication, shares


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_those_of_single_moments(seed):
    draw = random.Random(seed)

    def spans(count):
        starts = [draw.randrange(100) for _ in range(count)]
        return [(start, start + draw.randrange(20)) for start in starts]

    theirs, others = spans(draw.randrange(1, 6)), spans(draw.randrange(6))
    theirs.append((50, 60))
    moments = range(140)
    talks = {t for t in moments for start, end in theirs if start <= t < end}
    works = {t for t in moments for start, end in others if start <= t < end}
    edges = [edge for span in theirs + others for edge in span]
    whole = max(edges) - min(edges)
    found = shares(theirs, others)
    assert found.running == pytest.approx(len(talks) / whole)
    assert found.exposed == pytest.approx(len(talks - works) / whole)


Event = namedtuple("Event", "name device_type time_range is_user_annotation")
Times = namedtuple("Times", "start end")


class Profile:
    def __init__(self, *events):
        self._events = [Event(name, kind, Times(*times), name.startswith("FSDP::")) for name, kind, times in events]

    def events(self):
        return self._events


def test_kernels_alone_count():
    matrix, nccl = ("gemm", DeviceType.CUDA, (0, 60)), ("ncclDevKernel_AllGather", DeviceType.CUDA, (40, 100))
    host = ("nccl:all_gather", DeviceType.CPU, (0, 1000))
    named = ("FSDP::all_gather", DeviceType.CUDA, (0, 200))
    assert communication(Profile(matrix, nccl, host, named)) == (0.6, 0.4)
    assert communication(Profile(matrix, host)) is None


def test_a_cpu_has_none():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(4, 4) @ torch.ones(4, 4)
    assert communication(profiler) is None
