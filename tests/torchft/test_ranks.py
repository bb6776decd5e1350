"""What ranks tell each other, and parts of sharded tensors, on 1 to 3 processes."""

import time
from contextlib import nullcontext
from datetime import timedelta

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

VALUES = torch.arange(7 * 3.0).view(7, 3)  # 7 rows: no number of ranks divides them


def talk():
    dist.init_process_group("gloo")
    r = ranks.rank()
    found = {"gather": ranks.gather(r * 10), "from_main": ranks.from_main(lambda: f"by {r}")}
    with pytest.raises(UserError, match="no such file") as stop:
        ranks.from_main(lambda: _fail("no such file", "nor this"))
    found["problems"] = stop.value.problems
    with pytest.raises((UserError, OSError), match="disk") as stop:
        ranks.agree(OSError("disk full") if r == 1 else None)
    found["agree"] = type(stop.value).__name__
    ranks.agree(None)
    return found


def wait_for_main(fails):
    """The main rank takes longer than the job's collectives may."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=1))
    with pytest.raises(UserError, match="no such file") if fails else nullcontext(), ranks.main_first():
        if ranks.is_main():
            time.sleep(3)
            if fails:
                _fail("no such file")
        return time.time()


def parts():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (ranks.num_ranks(),))
    found = []
    for placement in (Shard(0), Shard(1), Replicate()):
        t = distribute_tensor(torch.zeros_like(VALUES), mesh, [placement])
        ranks.copy_part(t, VALUES)
        assert torch.equal(ranks.whole(t), VALUES) and torch.equal(ranks.local(t), VALUES[ranks.region(t)])
        found.append([(s.start, s.stop) for s in ranks.region(t)])
    return found


def strided_parts():
    """What FSDP2 leaves of a tensor of which tensor parallel had taken a part, along the same dimension or another."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tp"))
    found = []
    for dim in (0, 1):
        layer = nn.Linear(6, 10, bias=False)  # 5 rows for each tp rank; FSDP cuts them in 3 and 2
        layer.weight = nn.Parameter(distribute_tensor(torch.zeros(10, 6), mesh["tp"], [Shard(dim)]))
        fully_shard(layer, mesh=mesh["shard"])
        values = torch.arange(60.0).view(10, 6)
        ranks.copy_part(layer.weight, values)
        assert torch.equal(ranks.whole(layer.weight), values)
        assert torch.equal(layer.weight.full_tensor(), values)  # torch agrees where the parts are
        assert ranks.num_copies(layer.weight) == 1
        found.append([(s.start, s.stop) for s in ranks.region(layer.weight)])
    return found


def _fail(*problems):
    raise UserError(*problems)


def test_x10_the_others_wait_for_the_main_rank():
    main, other = run_ranks(wait_for_main, 2, False)
    assert main <= other
    assert run_ranks(wait_for_main, 2, True) == [None, None]


def test_ranks_tell_each_other():
    for r, found in enumerate(run_ranks(talk, 2)):
        assert found["gather"] == [0, 10] and found["from_main"] == "by 0"
        assert found["problems"] == ("no such file", "nor this")
        assert found["agree"] == ("OSError" if r == 1 else "UserError")


def test_parts_of_sharded_tensors():
    by_rank = run_ranks(parts, 3)
    assert [found[0] for found in by_rank] == [[(0, 3), (0, 3)], [(3, 6), (0, 3)], [(6, 7), (0, 3)]]
    assert [found[1] for found in by_rank] == [[(0, 7), (0, 1)], [(0, 7), (1, 2)], [(0, 7), (2, 3)]]
    assert all(found[2] == [(0, 7), (0, 3)] for found in by_rank)


def test_parts_of_tensors_that_are_split_twice():
    by_rank = run_ranks(strided_parts, 4)
    assert [found[0] for found in by_rank] == [[rows, (0, 6)] for rows in ((0, 3), (5, 8), (3, 5), (8, 10))]
    quarters = [[rows, columns] for rows in ((0, 5), (5, 10)) for columns in ((0, 3), (3, 6))]
    assert [found[1] for found in by_rank] == quarters


def test_one_process_needs_no_group():
    assert (ranks.rank(), ranks.num_ranks(), ranks.is_main()) == (0, 1, True)
    assert ranks.gather("x") == ["x"] and ranks.from_main(lambda: 3) == 3
    t = torch.zeros(2, 3)
    ranks.copy_part(t, torch.ones(2, 3))
    assert t.all() and ranks.whole(t).data_ptr() == ranks.local(t).data_ptr() == t.data_ptr()
    assert ranks.region(t) == (slice(0, 2), slice(0, 3))
    with pytest.raises(UserError, match="mine"):
        ranks.from_main(lambda: _fail("mine"))
    with pytest.raises(OSError, match="mine"):
        ranks.agree(OSError("mine"))
    ranks.agree(None)
