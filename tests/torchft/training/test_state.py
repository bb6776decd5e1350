"""Model and optimizer state by parameter name: training continued from a checkpoint is bit-equal to training on."""

import copy
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8

from torchft.errors import UserError
from torchft.ranks import sharded_like
from torchft.training.checkpoint import latest
from torchft.training.optim import MuonWithAdamW, param_groups
from torchft.training.saver import save
from torchft.training.schedules import attach, cosine
from torchft.training.seed import load_rng_state, rng_state
from torchft.training.shards import TensorFolder
from torchft.training.state import (
    base_fingerprint,
    check_savable,
    load_optimizer,
    load_parameters,
    optimizer_tree,
    trainable,
)
from torchft.training.stochastic import AdamWStochastic
from torchft.training.tree import flatten


@pytest.fixture(autouse=True)
def _no_compile(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # torchao's optimizers compile each shape: 20 s on a CPU


def model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64, bias=False)).to(dtype)
    m[1].bias.requires_grad_(False)
    return m


def adamw(groups, lr=0.01):
    return torch.optim.AdamW(groups, lr=lr, fused=True)


OPTIMIZERS = {
    "adamw": adamw,
    "unfused": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True, foreach=True),
    "muon": lambda groups: MuonWithAdamW(groups, lr=0.01),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "adamw8bit": lambda groups: AdamW8bit(groups, lr=0.01),
    "adamw4bit": lambda groups: AdamW4bit(groups, lr=0.01),
    "adamwfp8": lambda groups: AdamWFp8(groups, lr=0.01),
    "rounding8bit": lambda groups: AdamW8bit(groups, lr=0.01, bf16_stochastic_round=True),
    "stochastic": lambda groups: AdamWStochastic(groups, lr=0.01, seed=5),
    "stochastic_fp32": lambda groups: AdamWStochastic(groups, lr=0.01, state_dtype="fp32"),
}


def saved(folder, tree):
    """The tree as a folder that was saved."""
    return TensorFolder(save(folder, 1, {"optimizer": tree}, run_id="r") / "optimizer")


def train(m, optimizer, schedule, steps):
    for step in steps:
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).to(m[0].weight)
        m(x).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def assert_resume_is_exact(folder, name, dtype, device):
    factor = cosine(total_steps=8, warmup_steps=2)
    whole = model(dtype).to(device)
    optimizer = OPTIMIZERS[name](param_groups(whole))
    schedule = attach(optimizer, factor)
    train(whole, optimizer, schedule, range(4))
    parts = {"model": trainable(whole), "optimizer": optimizer_tree(whole, optimizer), "rng": rng_state()}
    save(folder, 4, parts, run_id="r", own=["rng"])
    train(whole, optimizer, schedule, range(4, 8))

    resumed = model(dtype, seed=1).to(device)
    with torch.no_grad():
        resumed[1].bias.copy_(whole[1].bias)
    again = OPTIMIZERS[name](param_groups(resumed))
    saved = latest(folder, "r")
    load_parameters(saved.open("model"), trainable(resumed))
    load_optimizer(saved.open("optimizer"), resumed, again)
    schedule = attach(again, factor, step=saved.number)
    load_rng_state(saved.read_own("rng"))  # torchao's stochastic rounding draws from it
    train(resumed, again, schedule, range(4, 8))
    for (n, p), q in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(p, q), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_training_is_bit_equal(tmp_path, name, dtype):
    assert_resume_is_exact(tmp_path, name, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["adamw", "unfused", "muon", "adamw8bit", "adamw4bit", "adamwfp8", "stochastic"])
def test_resumed_training_is_bit_equal_on_cuda(tmp_path, name):
    assert_resume_is_exact(tmp_path, name, torch.bfloat16, "cuda")


def test_hyperparameters_can_stay_as_configured(tmp_path):
    a = model()
    tree = saved(tmp_path, optimizer_tree(a, adamw(param_groups(a), lr=0.01)))
    kept, restored = adamw(param_groups(a), lr=0.5), adamw(param_groups(a), lr=0.5)
    load_optimizer(tree, a, kept, hyperparameters=False)
    load_optimizer(tree, a, restored)
    assert kept.param_groups[0]["lr"] == 0.5 and restored.param_groups[0]["lr"] == 0.01


def test_fp32_state_of_bf16_parameters_is_not_rounded(tmp_path):
    m = model(torch.bfloat16)
    optimizer = adamw(param_groups(m))
    state = {n: {"exp_avg": torch.full_like(p, 0.1, dtype=torch.float32)} for n, p in trainable(m).items()}
    load_optimizer(saved(tmp_path, {**optimizer_tree(m, optimizer), "state": state}), m, optimizer)
    assert optimizer.state[m[0].weight]["exp_avg"].dtype == torch.float32


def test_bf16_weights_have_bf16_adamw_states_of_the_fused_kernel():
    """4 bytes per weight; updates are computed in fp32 and rounded once, to the nearest."""
    m = model(torch.bfloat16)
    optimizer = adamw(param_groups(m))
    train(m, optimizer, attach(optimizer, cosine(total_steps=8)), range(3))
    for p in trainable(m).values():
        assert optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == torch.bfloat16


def test_a_state_that_the_optimizer_holds_is_filled_where_it_is(tmp_path):
    m = model()
    optimizer = adamw(param_groups(m))
    train(m, optimizer, attach(optimizer, cosine(total_steps=8)), range(2))
    tree = copy.deepcopy(optimizer_tree(m, optimizer))
    held = optimizer.state[m[0].weight]["exp_avg"]
    held.zero_()
    load_optimizer(saved(tmp_path, tree), m, optimizer)
    assert optimizer.state[m[0].weight]["exp_avg"] is held
    assert torch.equal(held, tree["state"]["0.weight"]["exp_avg"]) and held.any()


def test_low_bit_states_are_where_they_pay_and_plain_elsewhere():
    """torchao keeps tensors of less than 4096 values, or not made of whole blocks, in the parameter's dtype."""
    m = model(torch.bfloat16)
    for name, inside in (
        ("adamw8bit", "OptimState8bit"),
        ("adamw4bit", "OptimState4bit"),
        ("adamwfp8", "OptimStateFp8"),
    ):
        optimizer = OPTIMIZERS[name](param_groups(m))
        train(m, optimizer, attach(optimizer, cosine(total_steps=8)), range(1))
        assert type(optimizer.state[m[0].weight]["exp_avg"]).__name__ == inside
        assert type(optimizer.state[m[0].bias]["exp_avg"]) is torch.Tensor


@pytest.fixture
def sharded():
    """A parameter that is sharded over the only rank there is."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield nn.ParameterDict({"w": nn.Parameter(distribute_tensor(torch.ones(64, 64), mesh, [Shard(0)]))})
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["adamw8bit", "adamw4bit", "adamwfp8", "rounding8bit"])
def test_low_bit_states_of_sharded_parameters_are_refused_before_training(sharded, name):
    with pytest.raises(UserError, match=r"AdamW\w+'s low-bit states cannot be saved by several processes.*use torch"):
        check_savable(OPTIMIZERS[name](sharded.parameters()))
    check_savable(OPTIMIZERS["stochastic"](sharded.parameters()))
    check_savable(OPTIMIZERS[name](model().parameters()))


def test_what_lies_in_a_sharded_tensor_is_looked_at(sharded):
    state = sharded_like(sharded["w"], AdamW8bit._subclass_zeros(torch.zeros(64, 64), True, 256))
    with pytest.raises(UserError, match=r"a/w holds a .*DTensor"):
        flatten({"a": {"w": state}})
    assert list(flatten({"a": {"w": sharded["w"]}})[1]) == ["a/w"]


def test_other_optimizer_groups_are_refused(tmp_path):
    a = model()
    tree = saved(tmp_path, optimizer_tree(a, adamw(param_groups(a))))
    with pytest.raises(UserError, match="other groups"):
        load_optimizer(tree, a, adamw([{"params": list(trainable(a).values())}]))


def test_k19_state_of_another_optimizer_is_refused(tmp_path):
    """Even where a changed config is accepted: AdamW would fail at its first step on SGD's state, or worse not."""
    a = model()
    tree = saved(tmp_path, optimizer_tree(a, OPTIMIZERS["momentum"](param_groups(a))))
    with pytest.raises(UserError, match="holds the state of SGD, which AdamW can't take over"):
        load_optimizer(tree, a, adamw(param_groups(a)), hyperparameters=False)


def test_k13_k14_k15_all_differences_and_nothing_copied(tmp_path):
    a = {"same": torch.ones(2), "shape": torch.ones(3), "dtype": torch.ones(1), "gone": torch.ones(1)}
    b = {"same": torch.zeros(2), "shape": torch.zeros(4), "dtype": torch.zeros(1).bfloat16(), "new": torch.zeros(1)}
    save(tmp_path, 1, {"model": a}, run_id="r")
    with pytest.raises(UserError) as e:
        load_parameters(latest(tmp_path, "r").open("model"), b)
    text = str(e.value)
    for part in (
        "lacks 1 parameters: new",
        "1 parameters: gone",
        "shape is [3]",
        "is [4]",
        "the model's is [1] torch.bfloat16",
    ):
        assert part in text
    assert not b["same"].any()  # K22: no half-loaded model


def test_k18_fingerprint_follows_the_contents(tmp_path):
    """A change of one tensor among many is seen, wherever it lies in the file."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    weights = {f"w{i:02}": torch.arange(50.0 * 257).view(50, 257) + i for i in range(40)} | {"norm": torch.ones(7)}
    save_file(weights, base / "model.safetensors")
    original = base_fingerprint(base)
    os.symlink(base, tmp_path / "link")
    shutil.copytree(base, tmp_path / "copy")
    assert base_fingerprint(tmp_path / "link") == base_fingerprint(tmp_path / "copy") == original

    others = [weights | {name: weights[name] * 1.01} for name in weights]
    others += [weights | {"w07": w} for w in (weights["w07"].bfloat16(), weights["w07"].view(257, 50))]
    others += [weights | {"more": torch.ones(1)}]
    last = weights["w39"].clone()
    last[-1] += 1
    for other in [*others, weights | {"w39": last}]:
        save_file(other, tmp_path / "copy" / "model.safetensors")
        assert base_fingerprint(tmp_path / "copy") != original
    (tmp_path / "link").unlink()
    (base / "config.json").write_text('{"rope_theta": 1}')
    assert base_fingerprint(base) != original
