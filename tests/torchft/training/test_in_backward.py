"""Stepping during backward is the same as stepping after it, holds no gradients, and says what became of a bad one."""

import pytest
import torch
from torch import nn

from torchft.errors import UserError
from torchft.training.checkpoint import latest
from torchft.training.in_backward import InBackward
from torchft.training.optim import MuonWithAdamW, clip_grad_norm, param_groups
from torchft.training.saver import save
from torchft.training.schedules import attach, cosine
from torchft.training.state import load_optimizer, load_parameters, optimizer_tree, trainable
from torchft.training.stochastic import AdamWStochastic

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "stochastic": lambda groups: AdamWStochastic(groups, lr=0.01, seed=2),
    "muon": lambda groups: MuonWithAdamW(groups, lr=0.01),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
}


class Tied(nn.Module):
    """A weight used twice, a frozen one, matrices and vectors."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 16)
        self.up = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.norm.bias.requires_grad_(False)

    def forward(self, tokens):
        return self.norm(self.up(self.embed_tokens(tokens))) @ self.embed_tokens.weight.T


def model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Tied().to(dtype)


def loss_of(m, step):
    tokens = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(m(tokens).float().flatten(0, 1), tokens.flatten())


def train(m, optimizer, schedule, steps, in_backward=None):
    norms = []
    for step in steps:
        loss = loss_of(m, step)
        loss.backward()
        if in_backward:
            norms.append(in_backward.finish(step, loss=loss.detach()))
            assert all(p.grad is None for p in m.parameters())
        else:
            norms.append(clip_grad_norm(m.parameters(), None))
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    return torch.stack(norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bit_equal_to_stepping_after_backward(name, dtype, recwarn):
    factor = cosine(total_steps=8, warmup_steps=2)
    after, during = model(dtype), model(dtype)
    a, b = OPTIMIZERS[name](param_groups(after)), OPTIMIZERS[name](param_groups(during))
    expected = train(after, a, attach(a, factor), range(8))
    norms = train(during, b, attach(b, factor), range(8), InBackward(b, during))
    for (n, p), q in zip(after.named_parameters(), during.named_parameters()):
        assert torch.equal(p, q[1]), n
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]
    assert [len(g["params"]) for g in b.param_groups] == [len(g["params"]) for g in a.param_groups]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_bit_exact_with_and_without_it(tmp_path, name):
    """The checkpoint is the optimizer's own, so a run may change how it steps."""
    factor = cosine(total_steps=8, warmup_steps=2)
    whole = model()
    optimizer = OPTIMIZERS[name](param_groups(whole))
    schedule = attach(optimizer, factor)
    in_backward = InBackward(optimizer, whole)
    train(whole, optimizer, schedule, range(4), in_backward)
    save(tmp_path, 4, {"model": trainable(whole), "optimizer": optimizer_tree(whole, optimizer)}, run_id="r")
    train(whole, optimizer, schedule, range(4, 8), in_backward)
    for way in (InBackward, lambda optimizer, model: None):
        resumed = model(seed=1)
        again = OPTIMIZERS[name](param_groups(resumed))
        saved = latest(tmp_path, "r")
        load_parameters(saved.open("model"), trainable(resumed))
        load_optimizer(saved.open("optimizer"), resumed, again)
        train(resumed, again, attach(again, factor, step=4), range(4, 8), way(again, resumed))
        for (n, p), q in zip(whole.named_parameters(), resumed.parameters()):
            assert torch.equal(p, q), n


def test_no_two_gradients_of_different_layers_are_alive():
    layers = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(6)])
    alive = []
    optimizer = torch.optim.SGD(param_groups(layers), lr=0.1)
    for p in layers.parameters():  # before our hooks
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in layers.parameters()))
        )
    InBackward(optimizer, layers)
    layers(torch.ones(1, 32)).sum().backward()
    assert alive == [1] * 6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_is_reported_as_what_it_is(value):
    m = model()
    in_backward = InBackward(torch.optim.SGD(param_groups(m), lr=0.1), m)
    m.up.bias.register_hook(lambda g: g * value)
    loss = loss_of(m, 0)
    loss.backward()
    with pytest.raises(
        UserError, match=r"step 7: .* gradients of 1 parameters: up.bias; rows of this batch: 3, 9. .* already taken"
    ):
        in_backward.finish(7, loss=loss.detach(), rows=[3, 9])


def test_a_bad_loss_is_reported():
    m = model()
    in_backward = InBackward(torch.optim.SGD(param_groups(m), lr=0.1), m)
    with pytest.raises(UserError, match=r"loss nan, gradient norm 0\.0: not finite in no parameter's gradient"):
        in_backward.finish(1, loss=torch.tensor(float("nan")))


def test_a_norm_is_of_one_step_alone():
    m = model()
    in_backward = InBackward(torch.optim.SGD(param_groups(m), lr=0.1), m)
    loss_of(m, 0).backward()
    assert in_backward.finish(1, loss=1.0) > 0
    assert in_backward.finish(2, loss=1.0) == 0


def test_removed_hooks_leave_gradients():
    m = model()
    in_backward = InBackward(torch.optim.SGD(param_groups(m), lr=0.1), m)
    in_backward.remove()
    loss_of(m, 0).backward()
    assert m.up.weight.grad is not None


@pytest.mark.gpu
def test_peak_memory_on_cuda_is_without_the_gradients():
    def peak(in_backward):
        layers = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(16)]).to("cuda", torch.bfloat16)
        optimizer = torch.optim.SGD(param_groups(layers), lr=0.1)
        if in_backward:
            InBackward(optimizer, layers)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        layers(torch.ones(1, 2048, device="cuda", dtype=torch.bfloat16)).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    peak(True)  # cuBLAS's workspace
    assert peak(True) < peak(False) / 3
