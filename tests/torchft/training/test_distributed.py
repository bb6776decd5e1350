"""The parallel section, norms of sharded gradients, and errors that all ranks share."""

import logging
import math
import time

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather

from torchft import ranks
from torchft.cuda_graphs import Graphs
from torchft.errors import UserError
from torchft.training import distributed
from torchft.training.distributed import SUM_IN_FP32, ParallelConfig, degrees, frozen_weights, sum_gradients
from torchft.training.in_backward import InBackward
from torchft.training.optim import check_finite, clip_grad_norm


@pytest.mark.parametrize(
    ("given", "size", "want"),
    [
        ({}, 1, (1, 1, 1, 1)),
        ({}, 6, (1, 6, 1, 1)),
        ({"replicate": 2}, 8, (2, 4, 1, 1)),
        ({"replicate": 2, "shard": 3}, 6, (2, 3, 1, 1)),
        ({"replicate": 4}, 4, (4, 1, 1, 1)),
        ({"tp": 2}, 8, (1, 4, 1, 2)),
        ({"tp": 2, "cp": 4, "replicate": 2}, 16, (2, 1, 4, 2)),
    ],
)
def test_degrees(given, size, want):
    assert degrees(ParallelConfig(**given), size) == want


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"shard": 2}, 1),
        ({"shard": 3}, 4),
        ({"replicate": 3}, 4),
        ({"replicate": 2}, 1),
        ({"tp": 2}, 1),
        ({"cp": 3}, 4),
        ({"tp": 2, "shard": 2, "cp": 2}, 4),
    ],
)
def test_c10_a_product_that_is_not_the_number_of_processes(given, size):
    with pytest.raises(UserError, match=f"parallel: replicate .* but there are {size} processes"):
        degrees(ParallelConfig(**given), size)


def test_one_process_needs_no_group():
    with distributed.init(ParallelConfig(), device="cpu") as world:
        assert (world.rank, world.size, world.shards, world.mesh) == (0, 1, 1, None)
        assert not dist.is_initialized() and "CPU" in str(world)
        value = torch.ones(3)
        assert world.sum(value) is value


def test_x9_variables_of_torchrun_are_missing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(UserError, match=r"rank 0 cannot reach the others .*MASTER_ADDR=None"),
        distributed.init(ParallelConfig(), device="cpu"),
    ):
        pass


TOKEN = "hf_" + "a1B2" * 9


def warn(folder, log):
    with distributed.init(ParallelConfig(), device="cpu", debug_dir=folder / "debug") as world:
        log.info("nobody needs this")
        log.warning("the token is %s", TOKEN)
        raise ValueError(f"a bug of rank {world.rank}")


def warn_and_fail(folder):
    log = logging.getLogger("torchft.training.somewhere")
    with pytest.raises(ValueError, match="a bug"):
        warn(folder, log)
    log.warning("not part of it")


def test_each_rank_writes_down_its_warnings_and_its_stack(tmp_path):
    run_ranks(warn_and_fail, 2, tmp_path)
    for r in range(2):
        text = (tmp_path / "debug" / f"log_rank_{r:05d}.txt").read_text()
        assert "WARNING torchft.training.somewhere: the token is" in text and TOKEN not in text
        assert f"ValueError: a bug of rank {r}" in text and "in warn\n" in text
        assert "nobody needs this" not in text and "not part of it" not in text


def connected_late():
    """(When this rank was connected, when its block began); the second rank is slow to connect."""
    make, seen = distributed.init_device_mesh, []

    def connect(*args, **kwargs):
        mesh = make(*args, **kwargs)
        time.sleep(2 * ranks.rank())
        seen.append(time.time())
        return mesh

    distributed.init_device_mesh = connect
    with distributed.init(ParallelConfig(), device="cpu"):
        return seen[-1], time.time()


def test_no_rank_begins_before_all_are_connected():
    """So that one that is refused at once does not leave while others connect to it."""
    (own, began), (other, _) = run_ranks(connected_late, 2)
    assert own + 1 < other < began


def graphs_at_the_end():
    """How many graphs there were when the process group was destroyed, of those that were in use until the end."""
    torch.cuda.graph_pool_handle = lambda: (0, 0)  # which CPU builds of torch do not have
    graphs, left = Graphs(list), []
    graphs._graphs["a step"] = object()
    destroy = distributed.dist.destroy_process_group
    distributed.dist.destroy_process_group = lambda: (left.append(len(graphs._graphs)), destroy())
    with distributed.init(ParallelConfig(), device="cpu"):
        before = len(graphs._graphs)
    return before, left


def test_no_graph_outlives_its_process_group():
    """NCCL would wait for it."""
    assert run_ranks(graphs_at_the_end, 2) == [(1, [0])] * 2


def sum_of_columns():
    with distributed.init(ParallelConfig(), device="cpu") as world:
        strided = (torch.arange(12.0).view(3, 4) * (1 + world.rank)).T[1:]
        return world.sum(strided).tolist()


def test_x11_strided_tensors_are_summed_right():
    want = (3 * torch.arange(12.0).view(3, 4).T[1:]).tolist()
    assert run_ranks(sum_of_columns, 2) == [want, want]


def sum_of_other_shapes():
    dist.set_debug_level_from_env()  # as importing torch does, which here came before the variable
    with distributed.init(ParallelConfig(), device="cpu") as world, pytest.raises(RuntimeError) as told:
        world.sum(torch.ones(999 + world.rank))
    return str(told.value)


def test_x5_other_shapes_are_told_by_torchs_debug_mode():
    for text in run_ranks(sum_of_other_shapes, 2, env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}):
        assert "mismatch" in text and "999" in text and "1000" in text


def model_and_grads():
    """A small model of odd sizes with known gradients, the same in all ranks' eyes; sharded if there are several."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    wanted = [torch.randn_like(p) for p in model.parameters()]
    return model, wanted


def norms(given):
    with distributed.init(ParallelConfig(**given), device="cpu") as world:
        model, wanted = model_and_grads()
        for layer in model:
            fully_shard(layer, mesh=world.mesh, mp_policy=SUM_IN_FP32)
        fully_shard(model, mesh=world.mesh, mp_policy=SUM_IN_FP32)
        for p, grad in zip(model.parameters(), wanted):
            p.grad = torch.zeros_like(p)
            ranks.copy_part(p.grad, grad)
        found = {"norm": clip_grad_norm(list(model.parameters()), 0.5).item()}
        found["clipped"] = [ranks.whole(p.grad) for p in model.parameters()]
        seen = [p.grad.to_local().clone() for p in model.parameters()]
        model.zero_grad()
        in_backward = InBackward(torch.optim.SGD(model.parameters(), lr=0.0), model)
        model(torch.ones(2, 5)).sum().backward()
        found["in_backward"] = in_backward.finish(1, loss=0.0).item()
        found["sum"] = world.sum(torch.tensor(float(world.rank))).item()
        for p, part in zip(model.parameters(), seen):
            p.grad = torch.zeros_like(p)
            p.grad.to_local().copy_(part)
        if world.rank == 1:
            next(iter(model.parameters())).grad.to_local().fill_(math.nan)
        norm = clip_grad_norm(list(model.parameters()), None)
        own = torch.tensor(math.nan if world.rank == 1 else 1.0)
        with pytest.raises(UserError) as stop:
            check_finite(4, loss=world.sum(own), grad_norm=norm, model=model, rows=[f"row {world.rank}"], own_loss=own)
        found["error"] = str(stop.value)
        return found


@pytest.mark.parametrize(
    ("given", "size"), [({}, 2), ({}, 4), ({"replicate": 2}, 4), ({"replicate": 2, "shard": 1}, 2)]
)
def test_norms_are_those_of_whole_gradients(given, size):
    model, wanted = model_and_grads()
    norm = torch.cat([grad.flatten().double() for grad in wanted]).norm().item()
    model(torch.ones(2, 5)).sum().backward()
    plain = torch.cat([p.grad.flatten().double() for p in model.parameters()]).norm().item()
    for found in run_ranks(norms, size, given):
        assert found["norm"] == pytest.approx(norm, rel=1e-6)
        assert found["in_backward"] == pytest.approx(plain, rel=1e-6)
        assert found["sum"] == sum(range(size))
        for got, grad in zip(found["clipped"], wanted, strict=True):
            torch.testing.assert_close(got, grad * (0.5 / norm), rtol=1e-5, atol=1e-7)


def test_x6_what_is_not_finite_on_one_rank_stops_all_and_names_it():
    first, second = run_ranks(norms, 2, {})
    assert first["error"] == second["error"]
    assert "step 4" in first["error"] and "not finite on rank 1" in first["error"]
    assert "row 1" in first["error"] and "row 0" not in first["error"] and "0.weight" in first["error"]


def summed(in_fp32):
    """The gradient of a bf16 weight, whole, of which each rank has a summand of many magnitudes; and this rank's."""
    with distributed.init(ParallelConfig(), device="cpu") as world:
        torch.manual_seed(world.rank)
        own = (torch.randn(4096) * 2.0 ** torch.randint(-12, 12, (4096,))).bfloat16()
        model = nn.Linear(1, 4096, bias=False, dtype=torch.bfloat16)
        fully_shard(model, mesh=world.mesh, mp_policy=SUM_IN_FP32 if in_fp32 else world.sums)
        sum_gradients(model)
        (model(torch.ones(1, 1, dtype=torch.bfloat16)) * own).sum(dtype=torch.float32).backward()
        return ranks.whole(model.weight.grad).squeeze(1), own


@pytest.mark.parametrize("size", [2, 3])
def test_sums_of_gradients_are_those_in_fp32_to_the_bit(size):
    """Two of them are summed in bf16, which would not do for three."""
    ours, own = zip(*run_ranks(summed, size, False))
    wide, _ = zip(*run_ranks(summed, size, True))
    assert torch.equal(ours[0], wide[0]) and torch.equal(ours[0], torch.stack(own).float().sum(0).bfloat16())
    assert torch.equal(ours[0], sum(own)) == (size == 2)


class Adapted(nn.Module):
    """A frozen layer, and a smaller one that is trained beside it."""

    def __init__(self):
        super().__init__()
        self.frozen, self.trained = nn.Linear(9, 7).requires_grad_(False), nn.Linear(9, 5)

    def forward(self, x):
        return self.frozen(x).sum() + self.trained(x).sum()


class Gathers(AllGather):
    """FSDP2's own, with a note of how many values each gave."""

    def __init__(self):
        self.sizes = []

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        self.sizes.append(output_tensor.numel())
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


def left_whole():
    """Names of what this rank has parts of, and how many values a step gathers at a time."""
    with distributed.init(ParallelConfig(), device="cpu") as world:
        torch.manual_seed(0)
        model = Adapted()
        fully_shard(model, mesh=world.mesh, mp_policy=world.sums, ignored_params=frozen_weights(model))
        sum_gradients(model)
        gathers = Gathers()
        model.set_custom_all_gather(gathers)
        model(torch.ones(2, 9)).backward()
        return [name for name, p in model.named_parameters() if ranks.is_sharded(p)], gathers.sizes


def test_frozen_weights_are_not_gathered():
    (names, gathered), _ = run_ranks(left_whole, 2)
    assert names == ["trained.weight", "trained.bias"]
    assert gathered == [6 * 9 + 6]  # five rows, and five biases, in two parts


def test_what_is_mostly_trained_is_sharded_whole():
    model = Adapted()
    assert frozen_weights(model) == {*model.frozen.parameters()}
    model.frozen.weight.requires_grad_()
    assert not frozen_weights(model)
