"""Saves that are written while training goes on: the values of their step, one at a time, and no error lost."""

import datetime
import logging
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks

from torchft import ranks
from torchft.errors import UserError
from torchft.training import fault, host_copies
from torchft.training.checkpoint import clean, latest, steps
from torchft.training.host_copies import HostCopies, free_bytes
from torchft.training.interrupt import Stopped
from torchft.training.saver import Saver
from torchft.training.step_files import collect
from torchft.training.watch import is_lost_contact

SLOW = "after_shard_write:slow:*:1"  # twice, before the weights are written and after


def saver(folder, keep_last=3):
    return Saver(folder, "r", keep_last=keep_last)


def tree(value):
    return {"loader": {"row": 1}, "model": {"w": torch.full((100,), float(value))}}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def whole(folder):
    """The numbers of this run's steps, each of which holds its own number."""
    found = steps(folder, "r")
    assert all((s.read("model")["w"] == s.number).all() for s in found)
    return [s.number for s in found]


def save_and_end(folder, step, error):
    with saver(folder) as writes:
        writes.save(step, tree(step))
        if error is not None:
            raise error


@pytest.fixture
def fails(monkeypatch):
    return lambda what: monkeypatch.setenv(fault.VARIABLE, what)


def test_training_goes_on_and_does_not_change_what_is_saved(tmp_path, fails):
    fails(SLOW)
    parts = tree(1)
    with saver(tmp_path) as writes:
        writes.save(1, parts)
        parts["model"]["w"].fill_(2)
        assert whole(tmp_path) == []
        writes.save(2, parts)  # at most one in flight
        assert whole(tmp_path)[:1] == [1]
        parts["model"]["w"].fill_(3)
    assert whole(tmp_path) == [1, 2]


@pytest.mark.parametrize("error", [Stopped(), UserError("the loss is NaN"), RuntimeError("a bug")])
def test_whatever_ends_the_run_waits_for_the_save(tmp_path, fails, error):
    fails(SLOW)
    with pytest.raises(type(error)) as raised:
        save_and_end(tmp_path, 1, error)
    assert raised.value is error and whole(tmp_path) == [1]


def test_another_rank_is_lost_and_the_save_is_given_up(tmp_path, fails, monkeypatch):
    monkeypatch.setattr("torchft.training.saver.GIVE_UP_S", 0.5)
    fails(SLOW)
    with pytest.raises(RuntimeError, match="by peer"):
        save_and_end(tmp_path, 1, RuntimeError("Connection closed by peer"))
    assert whole(tmp_path) == []
    while not whole(tmp_path):  # here the process lives on
        time.sleep(0.1)


@pytest.mark.parametrize("action", ["enospc", "eio"])
def test_k5_k7_disk_errors_are_raised_by_the_next_save_or_the_end(tmp_path, fails, action):
    words = r"step 2 could not be saved .* need .* GiB, have .* GiB at .*Free some space"
    fails(f"after_shard_write:{action}:0:2")
    with saver(tmp_path) as writes:
        writes.save(1, tree(1))
        writes.save(2, tree(2))
        with pytest.raises(UserError, match=words):
            writes.save(3, tree(3))
        assert names(tmp_path) == ["step_000001"]
        writes.save(3, tree(3))
    assert whole(tmp_path) == [1, 3]
    for end in (None, Stopped()):
        with pytest.raises(UserError, match=words):
            save_and_end(tmp_path, 2, end)
    assert whole(tmp_path) == [1, 3]


def test_of_two_errors_that_of_training_is_raised_and_the_other_said(tmp_path, fails, caplog):
    fails("after_shard_write:enospc:0:1")
    with pytest.raises(ValueError, match="a bug"):
        save_and_end(tmp_path, 1, ValueError("a bug"))
    assert "step 1 could not be saved" in caplog.text


@pytest.mark.parametrize(
    ("point", "left"), [("after_shard_write", [1]), ("before_commit", [1]), ("after_commit", [1, 2])]
)
def test_k2_k3_killed_while_writing(tmp_path, point, left):
    if (child := os.fork()) == 0:
        os.environ[fault.VARIABLE] = f"{point}:kill:*:2"
        with saver(tmp_path, keep_last=1) as writes:
            writes.save(1, tree(1))
            writes.save(2, tree(2))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert whole(tmp_path) == left
    clean(tmp_path)
    assert names(tmp_path) == [f"step_00000{n}" for n in left]


def test_k25_never_without_a_whole_step(tmp_path):
    stop, seen = threading.Event(), []

    def watch():
        while not stop.is_set():
            seen.append(len([p for p in tmp_path.iterdir() if p.name.startswith("step_")]))

    with saver(tmp_path, keep_last=1) as writes:
        writes.save(1, tree(1))
        writes.wait()
        watcher = threading.Thread(target=watch)
        watcher.start()
        for step in range(2, 30):
            writes.save(step, tree(step))
    stop.set()
    watcher.join()
    assert len(seen) > 30 and min(seen) == 1 and max(seen) == 2 and whole(tmp_path) == [29]


def test_without_room_for_copies_training_waits(tmp_path, fails, monkeypatch, caplog):
    monkeypatch.setattr(host_copies, "free_bytes", lambda: 400)
    fails(SLOW)
    with caplog.at_level(logging.WARNING), saver(tmp_path) as writes:
        writes.save(1, tree(1))
        assert whole(tmp_path) == [1]
    assert "host memory has no room for the copy of a checkpoint (4.17e-07 GiB, 3.35e-07 GiB free)" in caplog.text


def test_free_bytes():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0.01 * total < free_bytes() <= total


def test_copies_lie_in_the_same_memory_each_time():
    copies, values = HostCopies(), {"m": {"a": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "c": torch.ones(())}}
    values["m"]["d"] = values["m"]["a"].T[1:]  # another view of the same
    first = copies.of(collect(values, own=())[0])["m"][1]
    for name, t in values["m"].items():
        assert torch.equal(first[name].values, t) and first[name].values.data_ptr() % 64 == 0
        assert first[name].values.is_contiguous()
    t = values["m"]["a"]
    t.add_(1)
    assert not torch.equal(first["a"].values, t)
    again = copies.of(collect(values, own=())[0])["m"][1]
    assert again["a"].values.data_ptr() == first["a"].values.data_ptr() and torch.equal(first["a"].values, t)
    more = copies.of(collect(values | {"n": {"e": torch.ones(999)}}, own=())[0])
    assert torch.equal(more["m"][1]["a"].values, t) and more["n"][1]["e"].values.sum() == 999


@pytest.mark.gpu
def test_copies_of_a_gpu_are_pinned(tmp_path):
    parts = {"model": {"w": torch.full((1 << 20,), 1.0, device="cuda")}, "loader": {"t": torch.ones(3)}}
    copies = HostCopies()
    copied = copies.of(collect(parts, own=())[0])["model"][1]["w"].values
    assert copied.is_pinned() and (copied == 1).all()
    with saver(tmp_path) as writes:
        writes.save(1, parts)
        parts["model"]["w"].fill_(2)
    assert whole(tmp_path) == [1]


# Several ranks


def begin(timeout_s=60):
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))
    return ranks.rank()


def train_while_rank_1_writes(folder):
    """Ranks add numbers up while one of them writes for longer than the others would wait for it."""
    r = begin(timeout_s=2 * fault.SLOW_S)  # rank 1 takes 3 * SLOW_S, one for each part
    os.environ[fault.VARIABLE] = "after_shard_write:slow:1:*"
    count = 0
    with Saver(folder, "r", keep_last=3, own=["own"]) as writes:
        for step in (1, 2):
            own = {"rank": r}
            writes.save(step, {**tree(step), "own": own})
            own["rank"] = None
            until = time.monotonic() + fault.SLOW_S / 3
            while dist.all_reduce(going := torch.tensor(float(time.monotonic() < until))) or going > 0:
                dist.all_reduce(ones := torch.ones(3))
                assert ones.tolist() == [2, 2, 2]
                count += 1
            assert whole(folder) == list(range(1, step))
    assert latest(folder, "r").read_own("own") == {"rank": r}
    return count, whole(folder)


def a_disk_is_full(folder):
    begin()
    os.environ[fault.VARIABLE] = "after_shard_write:enospc:1:2"
    with saver(folder) as writes:
        for step in (1, 2):
            writes.save(step, tree(step))
        with pytest.raises(UserError) as stop:
            writes.save(3, tree(3))
        assert whole(folder) == [1]
        writes.save(4, tree(4))
    return str(stop.value), whole(folder)


def rank_1_cannot_copy(folder):
    begin()
    with saver(folder) as writes:
        with pytest.raises(UserError, match=r"x holds a builtins\.object"):
            writes.save(1, {"a": {"x": object() if ranks.rank() else 1}})
        writes.save(2, tree(2))
    return whole(folder)


def rank_1_dies(folder, result):
    begin()
    os.environ[fault.VARIABLE] = "after_shard_write:kill:1:2"
    save_and_end(folder, 1, None)
    with pytest.raises(RuntimeError) as stop:
        save_and_end(folder, 2, None)
    result.write_text(f"{is_lost_contact(stop.value)} {whole(folder)}")


def test_x10_training_goes_on_while_a_slow_rank_writes(tmp_path):
    for count, found in run_ranks(train_while_rank_1_writes, 2, tmp_path):
        assert count > 10 and found == [1, 2]


def test_k5_a_full_disk_of_one_rank_stops_all(tmp_path):
    for r, (text, found) in enumerate(run_ranks(a_disk_is_full, 2, tmp_path)):
        assert "step 2 could not be saved ([Errno 28] No space left on device)" in text and "need" in text
        assert text.startswith("rank 1: ") == (r == 0) and found == [1, 4]


def test_one_rank_that_cannot_copy_stops_all(tmp_path):
    assert run_ranks(rank_1_cannot_copy, 2, tmp_path) == [[2], [2]]


def test_k4_a_rank_that_dies_while_writing(tmp_path):
    result, out = tmp_path / "result", tmp_path / "out"
    out.mkdir()
    with pytest.raises(AssertionError, match="rank 1 ended with exit code -9"):
        run_ranks(rank_1_dies, 2, out, result, grace_s=30)
    assert result.read_text() == "True [1]"
