"""Step folders that several ranks write and read: every number of ranks finds the same bits, or all ranks fail."""

import datetime
import errno
import logging
import logging.handlers
import os
import queue
import random
from functools import partial

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from torchft import ranks
from torchft.errors import UserError
from torchft.training import checkpoint, fault
from torchft.training.checkpoint import clean, damage, latest, prune, steps
from torchft.training.optim import param_groups
from torchft.training.saver import save
from torchft.training.seed import load_rng_state, rng_state
from torchft.training.shards import TensorFolder
from torchft.training.state import load_optimizer, load_parameters, optimizer_tree, trainable
from torchft.training.stochastic import AdamWStochastic

_random = partial(torch.randn, generator=torch.Generator().manual_seed(0))  # the same in all processes
TENSORS = {  # what is saved -> how it lies on a mesh of one and of two dimensions; None: not sharded
    "rows": (_random(7, 3), [Shard(0)], [Replicate(), Shard(0)]),
    "columns": (_random(2, 7).bfloat16(), [Shard(1)], [Shard(1), Replicate()]),
    "both": (_random(5, 4), [Shard(1)], [Shard(0), Shard(1)]),
    "nested": (_random(11), [Shard(0)], [Shard(0), Shard(0)]),
    "one_row": (torch.arange(6).view(1, 6), [Shard(0)], [Shard(0), Replicate()]),
    "copies": (_random(3), [Replicate()], [Replicate(), Replicate()]),
    "scalar": (torch.tensor(2.5), None, None),
    "plain": (_random(4, 2), None, None),
}


def placed(values, *mesh_shape):
    """TENSORS' ``values``, by name, on a mesh of these sizes of all ranks."""
    mesh = init_device_mesh("cpu", mesh_shape)
    how = {name: placements[len(mesh_shape) - 1] for name, (_, *placements) in TENSORS.items()}
    return {name: distribute_tensor(t, mesh, how[name]) if how[name] else t for name, t in values.items()}


def wanted():
    return {name: t for name, (t, *_) in TENSORS.items()}


def assert_loads(step, *mesh_shape):
    """That ranks of any mesh, or one process alone, find TENSORS in the step."""
    empty = {name: torch.zeros_like(t) for name, t in wanted().items()}
    found = placed(empty, *mesh_shape) if mesh_shape else empty
    load_parameters(step.open("model"), found)
    for name, t in wanted().items():
        assert torch.equal(ranks.whole(found[name]), t), name


def begin(**options):
    if "RANK" in os.environ:
        dist.init_process_group("gloo", **options)
    return ranks.rank()


def put(folder, step, *mesh_shape):
    """Saves TENSORS and the number of the rank."""
    model = placed(wanted(), *mesh_shape) if mesh_shape else wanted()
    parts = {"model": model, "loader": {"row": step}, "own": {"rank": ranks.rank(), "t": torch.ones(2) * ranks.rank()}}
    return save(folder, step, parts, run_id="r", own=["own"])


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# What ranks do


def save_as_three(folder):
    begin()
    put(folder, 3, 3)


def save_and_load_as_four(folder):
    begin()
    assert_loads(latest(folder, "r"), 4)
    assert_loads(latest(folder, "r"), 2, 2)
    put(folder, 4, 2, 2)


def load_as_two(folder):
    r = begin()
    log, said = logging.getLogger("torchft.training.checkpoint"), queue.Queue()
    log.addHandler(logging.handlers.QueueHandler(said))
    found = {}
    for step in steps(folder, "r"):
        assert_loads(step, 2)
        found[step.number] = step.read_own("own")
    warnings = [record.getMessage() for record in said.queue]
    latest_of_damaged(folder)
    if ranks.is_main():
        prune(folder, "r", newest=4, keep_last=2)
    dist.barrier()
    return r, found, warnings, names(folder)


def latest_of_damaged(folder):
    """Whatever file of the newest step is damaged, whoever looks at it, all ranks pass it over."""
    newest, other = steps(folder, "r")[-1], steps(folder, "r")[-2]
    for name in newest.manifest["files"]:
        data = (newest.path / name).read_bytes()
        dist.barrier()
        if ranks.is_main():
            (newest.path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        dist.barrier()
        assert latest(folder, "r").number == other.number, name
        dist.barrier()
        if ranks.is_main():
            (newest.path / name).write_bytes(data)
        dist.barrier()
    assert latest(folder, "r") == newest
    if not ranks.is_main():  # sees a new folder later than the main rank does
        checkpoint._scan = lambda *_: ([], [])
    assert latest(folder, "r") == newest


def fail_as_two(folder, faults):
    """What each fault raises, and what then lies in the folder."""
    begin()
    put(folder, 1, 2)
    found = {}
    for number, what in enumerate(faults, start=2):
        os.environ[fault.VARIABLE] = what
        with pytest.raises((UserError, RuntimeError)) as stop:
            put(folder, number, 2)
        dist.barrier()
        found[what] = type(stop.value).__name__, str(stop.value), names(folder), latest(folder, "r").number
    del os.environ[fault.VARIABLE]
    own = folder / f"node_{ranks.rank()}"  # as if each node had a disk of its own
    own.mkdir()
    with pytest.raises(UserError) as stop:
        put(own, 1, 2)
    found["disks"] = str(stop.value), names(own)
    with pytest.MonkeyPatch.context() as patch:
        if ranks.is_main():
            patch.setattr(os, "replace", _file_exists)
        with pytest.raises(UserError, match=r"could not be saved .*File exists"):
            put(folder, 8, 2)
    assert latest(folder, "r").number == 1
    with pytest.raises(UserError, match=r"x holds a builtins\.object"):
        save(folder, 9, {"a": {"x": object() if ranks.rank() else 1}}, run_id="r")
    put(folder, 9, 2)
    assert latest(folder, "r").number == 9
    return found


def _file_exists(*_):
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))


def killed_as_two(folder, point):
    begin(timeout=datetime.timedelta(seconds=5))
    put(folder, 1, 2)
    os.environ[fault.VARIABLE] = f"{point}:kill:1:2"
    put(folder, 2, 2)


def draw_as_two(folder):
    r = begin()
    torch.manual_seed(r)
    random.seed(r)
    save(folder, 1, {"rng": rng_state()}, run_id="r", own=["rng"])
    drawn = torch.rand(3), random.random()
    load_rng_state(latest(folder, "r").read_own("rng"))
    load_rng_state(None)  # of a rank that has none: changes nothing
    again = torch.rand(3), random.random()
    assert torch.equal(drawn[0], again[0]) and drawn[1] == again[1]
    return drawn[1]


OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "amsgrad": partial(torch.optim.AdamW, lr=0.01, amsgrad=True, foreach=True),
    "sgd": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "stochastic": partial(AdamWStochastic, lr=0.01, seed=5),
}


def model_and_optimizer(name, seed):
    """Odd sizes; sharded if there are several ranks."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 1))  # one row: a rank with nothing
    model = model.bfloat16() if name == "stochastic" else model
    model[1].weight.requires_grad_(False)
    if ranks.num_ranks() > 1:
        copies = 2 if ranks.num_ranks() == 4 else 1
        mesh = init_device_mesh("cpu", (copies, ranks.num_ranks() // copies), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh if copies > 1 else mesh["shard"])
    return model, OPTIMIZERS[name](param_groups(model))


def train(model, optimizer, numbers):
    for number in numbers:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        model(x.to(model[0].weight.dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def parts(model, optimizer):
    return {"model": trainable(model), "optimizer": optimizer_tree(model, optimizer)}


def bits(model, optimizer):
    """All that is trained and all states, whole."""
    values = {**trainable(model)}
    for name, p in trainable(model).items():
        values |= {f"{name}/{k}": torch.as_tensor(v) for k, v in optimizer.state[p].items()}
    return {name: ranks.whole(t).clone() for name, t in values.items()}


class Counted(TensorFolder):
    """Knows how many values were read."""

    count = 0

    def read(self, name, region=None):
        t = super().read(name, region)
        self.count += t.numel()
        return t


def resume(name, folder):
    model, optimizer = model_and_optimizer(name, seed=1)
    step = latest(folder, "r")
    folders = [Counted(step.path / part) for part in ("model", "optimizer")]
    load_parameters(folders[0], trainable(model))
    load_optimizer(folders[1], model, optimizer)
    states = [(p, t) for p, state in optimizer.state.items() for t in state.values() if isinstance(t, torch.Tensor)]
    for p, t in states:
        assert ranks.region(t) == ranks.region(p) if t.ndim else not ranks.is_sharded(t)
        assert ranks.is_sharded(t) == (t.ndim > 0 and ranks.num_ranks() > 1)
    held = [trainable(model).values(), [t for _, t in states]]
    assert [f.count for f in folders] == [sum(ranks.local(t).numel() for t in tensors) for tensors in held]
    return model, optimizer


def train_all(folder):
    """Trains 3 steps, saves, trains 2 more."""
    begin()
    found = {}
    for name in OPTIMIZERS:
        model, optimizer = model_and_optimizer(name, seed=0)
        train(model, optimizer, range(3))
        (folder / name).mkdir(parents=True, exist_ok=True)
        save(folder / name, 3, parts(model, optimizer), run_id="r")
        at_save = bits(model, optimizer)
        train(model, optimizer, range(3, 5))
        found[name] = at_save, bits(model, optimizer)
    return found


def pass_on(folder, onto):
    """Loads what others have saved and saves it."""
    begin()
    found = {}
    for name in OPTIMIZERS:
        model, optimizer = resume(name, folder / name)
        found[name] = bits(model, optimizer)
        (onto / name).mkdir(parents=True, exist_ok=True)
        save(onto / name, 3, parts(model, optimizer), run_id="r")
    return found


def train_on(folder):
    begin()
    found = {}
    for name in OPTIMIZERS:
        model, optimizer = resume(name, folder / name)
        train(model, optimizer, range(3, 5))
        found[name] = bits(model, optimizer)
    return found


# The tests


def test_any_ranks_read_what_any_ranks_wrote(tmp_path):
    put(tmp_path, 1)
    run_ranks(save_as_three, 3, tmp_path)
    run_ranks(save_and_load_as_four, 4, tmp_path)
    for step, num_ranks in zip(steps(tmp_path, "r"), (1, 3, 4), strict=True):
        assert not damage(step) and step.manifest["ranks"] == num_ranks
        assert_loads(step)
        assert_each_value_is_written_once(step.open("model"))
        own = step.read_own("own")
        assert (
            own["rank"] == 0 and torch.equal(own["t"], torch.zeros(2)) and step.read("loader") == {"row": step.number}
        )
        assert names(step.path / "own") == [f"rank_{r:05d}" for r in range(num_ranks)]
        files = {str(p.relative_to(step.path)) for p in step.path.rglob("*") if p.is_file()}
        assert files == {"manifest.json", *step.manifest["files"]}
    assert len(steps(tmp_path, "r")[1].open("model").entries["one_row"]["slices"]) == 1  # two of the ranks have nothing

    for r, found, warnings, left in run_ranks(load_as_two, 2, tmp_path):
        assert [found[step] and found[step]["rank"] for step in (1, 3, 4)] == [None if r else 0, r, r]
        assert ["was saved by 1 ranks: rank 1 and later find no own there" in w for w in warnings] == [
            True,
            False,
            False,
        ]
        assert ["ranks: the own of rank 2 and later is dropped" in w for w in warnings] == [False, True, True]
        assert left == ["step_000003", "step_000004"]


def assert_each_value_is_written_once(saved):
    for name, entry in saved.entries.items():
        times = torch.zeros(entry["shape"])
        for s in entry["slices"]:
            times[tuple(slice(start, start + n) for start, n in zip(s["offset"], s["shape"]))] += 1
        assert (times == 1).all(), name


FAULTS = {  # -> what the rank at fault raises, with which words
    "after_shard_write:enospc:1:*": ("UserError", "No space left"),
    "after_shard_write:eio:0:*": ("UserError", "Input/output error"),
    "after_shard_write:raise:1:*": ("RuntimeError", "injected fault"),
    "before_commit:raise:1:*": ("RuntimeError", "injected fault"),
    "before_commit:enospc:0:*": ("UserError", "No space left"),
}


def test_k5_if_one_rank_fails_all_do_and_earlier_steps_are_intact(tmp_path):
    for r, found in enumerate(run_ranks(fail_as_two, 2, tmp_path, list(FAULTS))):
        text, left = found.pop("disks")
        assert left == [] and "choose an output_dir on a file system that all nodes share" in text
        assert text.startswith("step 1 could not be saved: rank 1 on " if r else "rank 1: step 1 could not be saved")
        for what, (kind, text, left, newest) in found.items():
            at_fault = int(what.split(":")[2])
            own_kind, words = FAULTS[what]
            assert kind == (own_kind if r == at_fault else "UserError")
            assert words in text and text.startswith(f"rank {at_fault}: ") == (r != at_fault)
            assert own_kind == "RuntimeError" or "earlier checkpoints are intact: need " in text
            assert left == ["step_000001"] and newest == 1


@pytest.mark.parametrize("point", ["after_shard_write", "before_commit"])
def test_k2_a_killed_rank_leaves_no_step(tmp_path, point):
    with pytest.raises(AssertionError, match=r"rank 1 ended with exit code -9|by peer"):
        run_ranks(killed_as_two, 2, tmp_path, point)
    assert latest(tmp_path, "r").number == 1
    clean(tmp_path)
    assert names(tmp_path) == ["step_000001"]


def test_each_rank_has_its_own_random_numbers(tmp_path):
    one, two = run_ranks(draw_as_two, 2, tmp_path)
    assert one != two
    load_rng_state(latest(tmp_path, "r").read_own("rng"))
    torch.rand(3)
    assert random.random() == one


def test_training_goes_on_bit_equal_after_other_numbers_of_ranks(tmp_path):
    """Two ranks train and save; four, one and two load it and save it again; two train on."""
    trained, _ = run_ranks(train_all, 2, tmp_path / "two")
    by_four, *_ = run_ranks(pass_on, 4, tmp_path / "two", tmp_path / "four")
    by_one = pass_on(tmp_path / "four", tmp_path / "one")
    trained_on, _ = run_ranks(train_on, 2, tmp_path / "one")
    for name in OPTIMIZERS:
        at_save, at_end = trained[name]
        assert len(at_save) > 5 and any(t.any() for n, t in at_save.items() if "/" in n)
        for found, want in ((by_four, at_save), (by_one, at_save), (trained_on, at_end)):
            assert found[name].keys() == want.keys()
            for key, t in want.items():
                assert found[name][key].dtype == t.dtype and torch.equal(found[name][key], t), (name, key)
