"""Any number of processes gives the same samples, counts and messages in the same order, and none is left."""

import multiprocessing
import os
import sys

import pytest

from torchft.data import parallel
from torchft.data.messages import EmptyError, RowError
from torchft.data.parallel import encode_all, num_workers
from torchft.data.samples import Encoded, Limits, collect
from torchft.data.sources import Row
from torchft.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
LIMITS = Limits(seq_len=50, too_long="truncate", empty_rows="drop", bad_rows="drop")


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(parallel, "SERIAL_ROWS", 20)
    monkeypatch.setattr(parallel, "CHUNK", 7)
    yield
    assert not multiprocessing.active_children()


def rows(n):
    return [Row("f", i, {"n": i}) for i in range(1, n + 1)]


def encode(values):
    n = values["n"]
    if n % 13 == 0:
        raise EmptyError("nothing here")
    if n % 31 == 0:
        raise RowError(f"bad row {n}")
    return Encoded([n, n + 1, *range(n % 60)], [False] + [True] * (1 + n % 60), n % 5 == 0)


@pytest.mark.parametrize("n", [0, 1, 19, 20, 21, 27, 28, 300])
@pytest.mark.parametrize("workers", [2, 3])
def test_samples_and_counts_are_the_same(workers, n):
    serial = collect(rows(n), encode, LIMITS, pad_id=0, workers=0)
    forked = collect(iter(rows(n)), encode, LIMITS, pad_id=0, workers=workers)
    assert forked.fingerprint() == serial.fingerprint() and forked.counts == serial.counts
    assert [forked.where(i) for i in range(len(forked))] == [serial.where(i) for i in range(len(serial))]


def test_the_work_is_done_elsewhere_and_the_first_rows_here():
    here = os.getpid()
    found = [pid for _, pid in encode_all(rows(100), lambda _: os.getpid(), workers=2)]
    assert found[:20] == [here] * 20 and here not in found[20:]


def test_what_an_encoder_learns_from_the_first_row_holds_for_all():
    seen = []

    def learns(values):
        seen.append(values["n"])
        return seen[0]

    assert {first for _, first in encode_all(rows(200), learns, workers=3)} == {1}


def test_problems_are_reported_as_without_processes():
    limits = Limits(seq_len=50, too_long="error", empty_rows="error", bad_rows="error")
    messages = []
    for workers in (0, 3):
        with pytest.raises(UserError) as e:
            collect(rows(300), encode, limits, pad_id=0, workers=workers)
        messages.append(str(e.value))
    assert messages[0] == messages[1] and "f:13 and" in messages[0]


def test_another_exception_reaches_the_caller_and_ends_the_processes():
    def breaks(values):
        if values["n"] == 150:
            raise ZeroDivisionError("row 150")
        return values["n"]

    with pytest.raises(ZeroDivisionError, match="row 150"):
        list(encode_all(rows(300), breaks, workers=2))


def test_a_dead_process_is_an_error_not_a_hang():
    def dies(values):
        if values["n"] == 150:
            os._exit(9)
        return values["n"]

    with pytest.raises(Exception, match="terminated abruptly"):
        list(encode_all(rows(300), dies, workers=2))


def test_stopping_early_ends_the_processes():
    found = encode_all(iter(rows(10_000)), lambda values: values["n"], workers=2)
    assert [n for (_, n), _ in zip(found, range(50))] == list(range(1, 51))
    found.close()


def test_workers_by_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert num_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert num_workers() == 3
    monkeypatch.setattr(sys, "platform", "darwin")
    assert num_workers() == 0
