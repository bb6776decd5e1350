"""The batches of Prefetch are the Loader's, its state is of what was handed out, and its thread ends."""

import gc
import json
import random
import threading
import time

import pytest
import torch

from torchft.data.loader import Loader
from torchft.data.prefetch import Prefetch, one_epoch
from torchft.data.samples import Samples, shift
from torchft.errors import UserError

KINDS = [{"packed": True}, {"packed": False}, {"shuffle": False}, {"drop_last": True}]


def make(*, seed=0, lengths=None):
    draw = random.Random(seed)
    samples = Samples(seq_len=64, pad_id=0)
    for i, n in enumerate(lengths or [draw.randrange(4, 60) for _ in range(23)]):
        samples.append(shift([draw.randrange(101) for _ in range(n)], [True] * n), origin="f", number=i + 1)
    return samples


def loader(seed=5, **options):
    return Loader(make(), batch_size=3, seed=seed, **options)


def same(a, b):
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels) and a.samples == b.samples
    assert (a.positions is None) == (b.positions is None) and a.num_supervised == b.num_supervised
    assert a.positions is None or torch.equal(a.positions, b.positions)


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    gc.collect()  # an executor that nobody holds ends its thread
    end = time.monotonic() + 5
    while threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert not threads()


@pytest.mark.parametrize("depth", [1, 2, 50])
@pytest.mark.parametrize("options", KINDS)
def test_three_epochs_equal_the_loaders(options, depth):
    plain, ahead = loader(**options), Prefetch(loader(**options), "cpu", depth=depth)
    assert ahead.samples is not None
    for epoch in range(3):
        assert ahead.epoch == epoch
        for ours, theirs in zip(ahead, plain, strict=True):
            same(ours, theirs)
            assert ahead.state_dict() == plain.state_dict()
    ahead.close()
    assert not threads()


@pytest.mark.parametrize("options", KINDS)
def test_windows_equal_the_loaders_and_never_span_epochs(options):
    plain, ahead = loader(**options), Prefetch(loader(**options), "cpu", depth=3)
    for _ in range(9):
        ours, theirs = ahead.take(2), plain.take(2)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
        assert ahead.state_dict() == plain.state_dict()


@pytest.mark.parametrize("options", KINDS)
def test_resume_is_exact_at_every_batch_and_either_way(options):
    """A state of a Prefetch continues in a Loader and the other way round."""
    straight, states = [], []
    ahead = Prefetch(loader(**options), "cpu")
    for _ in range(2 * len(loader(**options))):
        states.append(json.dumps(ahead.state_dict()))
        straight += ahead.take(1)
    for start, state in enumerate(states):
        for resumed in (loader(**options), Prefetch(loader(**options), "cpu")):
            resumed.load_state_dict(json.loads(state))
            for theirs in straight[start:]:
                same(*resumed.take(1), theirs)


def test_loading_a_state_drops_what_was_made_ahead():
    plain, ahead = loader(), Prefetch(loader(), "cpu", depth=4)
    first = ahead.state_dict()
    before = ahead.take(3)
    ahead.load_state_dict(first)
    for a, b, c in zip(ahead.take(3), before, plain.take(3), strict=True):
        same(a, b), same(a, c)
    with pytest.raises(UserError, match="seed was 6"):
        ahead.load_state_dict(loader(seed=6).state_dict())


def test_after_close_the_loader_stands_where_prefetch_stood():
    plain, inner = loader(), loader()
    ahead = Prefetch(inner, "cpu", depth=4)
    ahead.take(2), plain.take(2)
    ahead.close()
    same(*inner.take(1), *plain.take(1))


def test_an_exception_in_the_thread_reaches_the_consumer_at_its_batch(monkeypatch):
    plain, inner = loader(), loader()
    ahead = Prefetch(inner, "cpu", depth=4)
    expected = plain.take(4)
    collate, calls = Loader._collate, []

    def breaks(self, rows, **how):
        calls.append(rows)
        if len(calls) == 3:
            raise ZeroDivisionError("in the thread")
        return collate(self, rows, **how)

    monkeypatch.setattr(Loader, "_collate", breaks)
    same(*ahead.take(1), expected[0])
    same(*ahead.take(1), expected[1])
    state = ahead.state_dict()
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        ahead.take(1)
    assert ahead.state_dict() == state
    same(*ahead.take(1), expected[2])  # and nothing was lost
    same(*ahead.take(1), expected[3])


def test_batches_are_made_while_the_consumer_works(monkeypatch):
    collate = Loader._collate

    def slow(self, rows, **how):
        time.sleep(0.02)
        return collate(self, rows, **how)

    monkeypatch.setattr(Loader, "_collate", slow)
    ahead = Prefetch(loader(), "cpu", depth=2)
    ahead.take(1)
    time.sleep(0.2)
    began = time.perf_counter()
    ahead.take(1), ahead.take(1)
    assert time.perf_counter() - began < 0.02


def test_one_epoch_is_the_loaders_again_and_again():
    ahead, plain = loader(shuffle=False), loader(shuffle=False)
    for epoch in range(2):
        made, want = list(one_epoch(ahead, "cpu")), list(plain)
        assert ahead.epoch == plain.epoch == epoch + 1 and len(made) > 1
        for a, b in zip(made, want, strict=True):
            same(a, b)


def test_an_abandoned_loop_leaves_no_thread():
    for _ in Prefetch(loader(), "cpu"):
        break  # the fixture looks


@pytest.mark.gpu
def test_batches_on_cuda_come_through_pinned_memory_and_are_the_same():
    plain, ahead = loader(packed=True), Prefetch(loader(packed=True), "cuda", depth=3)
    batch, _ = ahead._make()
    assert batch.tokens.is_pinned() and batch.labels.is_pinned() and batch.positions.is_pinned()
    ahead.load_state_dict(plain.state_dict())
    for _ in range(3):
        for ours, theirs in zip(ahead, plain, strict=True):
            assert ours.tokens.is_cuda
            same(ours.to("cpu"), theirs)
