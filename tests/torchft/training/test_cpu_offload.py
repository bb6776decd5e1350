"""AdamWOffloaded is AdamWStochastic, bit for bit, with its states in pinned host memory; CUDA only."""

import pytest
import torch
from torch import nn

from torchft.errors import UserError
from torchft.training import cpu_offload
from torchft.training.checkpoint import latest
from torchft.training.cpu_offload import AdamWOffloaded
from torchft.training.in_backward import InBackward
from torchft.training.optim import param_groups
from torchft.training.saver import save
from torchft.training.schedules import attach, cosine
from torchft.training.state import load_optimizer, load_parameters, optimizer_tree, trainable
from torchft.training.stochastic import AdamWStochastic


def test_refused_without_cuda():
    with pytest.raises(UserError, match=r"is for weights on CUDA, not on cpu; use torchft.training.stochastic"):
        AdamWOffloaded([nn.Parameter(torch.zeros(4))])


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(700, 300), nn.LayerNorm(300), nn.Linear(300, 64)).to("cuda", torch.bfloat16)


def train(m, optimizer, steps, start=0, in_backward=None):
    schedule = attach(optimizer, cosine(total_steps=8, warmup_steps=2), step=start)
    for step in range(start, start + steps):
        x = torch.randn(4, 700, generator=torch.Generator().manual_seed(step)).to("cuda", torch.bfloat16)
        loss = m(x).float().square().mean()
        loss.backward()
        if in_backward:
            in_backward.finish(step, loss=loss)
        else:
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()


def assert_equal(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert torch.equal(p, q), name


@pytest.mark.gpu
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("state_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("piece", [1024, 32 << 20])
def test_bit_equal_to_states_on_the_device(monkeypatch, piece, state_dtype, in_backward):
    """With pieces of 1024 elements every slot is used again many times within a step."""
    monkeypatch.setattr(cpu_offload, "PIECE", piece)
    options = {"lr": 1e-3, "state_dtype": state_dtype, "seed": 3}
    plain, offloaded = model(), model()
    a, b = AdamWStochastic(param_groups(plain), **options), AdamWOffloaded(param_groups(offloaded), **options)
    train(plain, a, 6)
    train(offloaded, b, 6, in_backward=InBackward(b, offloaded) if in_backward else None)
    assert_equal(plain, offloaded)
    torch.cuda.synchronize()
    for p, q in zip(plain.parameters(), offloaded.parameters()):
        for key in ("exp_avg", "exp_avg_sq"):
            assert b.state[q][key].is_pinned() and torch.equal(a.state[p][key].cpu(), b.state[q][key])


@pytest.mark.gpu
def test_resume_is_bit_exact_and_states_stay_on_the_host(tmp_path):
    whole = model()
    optimizer = AdamWOffloaded(param_groups(whole), lr=1e-3)
    train(whole, optimizer, 4)
    save(tmp_path, 4, {"model": trainable(whole), "optimizer": optimizer_tree(whole, optimizer)}, run_id="r")
    train(whole, optimizer, 4, start=4)
    resumed = model(seed=1)
    again = AdamWOffloaded(param_groups(resumed), lr=1e-3)
    saved = latest(tmp_path, "r")
    load_parameters(saved.open("model"), trainable(resumed))
    load_optimizer(saved.open("optimizer"), resumed, again)
    train(resumed, again, 4, start=4)
    assert_equal(whole, resumed)
    assert all(state["exp_avg"].is_pinned() for state in again.state.values())


@pytest.mark.gpu
def test_device_memory_is_the_slots_alone():
    p = nn.Parameter(torch.zeros(256 << 20, device="cuda", dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    before = torch.cuda.memory_allocated()
    optimizer = AdamWOffloaded([p])
    optimizer.step()  # the first also tunes the kernel, on copies
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    slots = cpu_offload.SLOTS * 2 * cpu_offload.PIECE * 2
    assert torch.cuda.max_memory_allocated() - before <= slots + (1 << 20)
