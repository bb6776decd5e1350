"""Optimizer groups, Muon + AdamW, clipping and the finite check, against torch's own optimizers and closed forms."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from torchft.errors import UserError
from torchft.training.optim import (
    MuonWithAdamW,
    check_finite,
    clip_grad_norm,
    frozen_share,
    param_groups,
    warn_if_frozen,
)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(11, 6),
            "up": nn.Linear(6, 10),
            "norm": nn.LayerNorm(10),
            "lm_head": nn.Linear(10, 4),
        }
    ).to(dtype)


def backward(m, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (8,), generator=g)
    m["lm_head"](m["norm"](m["up"](m["embed_tokens"](tokens)))).square().sum().backward()


def test_no_decay_on_vectors_and_frozen_left_out():
    m = model()
    m["embed_tokens"].weight.requires_grad_(False)
    opt = torch.optim.AdamW(param_groups(m), lr=0.1, weight_decay=0.5)
    decayed, rest = opt.param_groups
    assert decayed["param_names"] == ["up.weight", "lm_head.weight"] and decayed["weight_decay"] == 0.5
    assert rest["param_names"] == ["up.bias", "norm.weight", "norm.bias", "lm_head.bias"] and rest["weight_decay"] == 0
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    for name, p in m.named_parameters():
        share = 0.95 if name in decayed["param_names"] else 1.0
        torch.testing.assert_close(p.detach(), before[name] * share)


def test_muon_with_adamw_equals_two_optimizers():
    ours, reference = model(), model()
    opt = MuonWithAdamW(param_groups(ours), lr=0.02, adamw_lr=0.003, weight_decay=0.1)
    muon = torch.optim.Muon([reference["up"].weight], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    decayed = [reference["embed_tokens"].weight, reference["lm_head"].weight]
    plain = [p for p in reference.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=0.003,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedules = [LambdaLR(o, lambda step: 1 / (1 + step)) for o in (opt, muon, adam)]
    for step in range(5):
        backward(ours, step), backward(reference, step)
        for o in (opt, muon, adam):
            o.step()
            o.zero_grad()
        for schedule in schedules:
            schedule.step()
    for (name, p), q in zip(ours.named_parameters(), reference.parameters()):
        assert torch.equal(p, q), name
    assert set(opt.state) == set(ours.parameters())


def test_muon_state_dict_round_trip():
    a, b = model(), model()
    first, second = MuonWithAdamW(param_groups(a)), MuonWithAdamW(param_groups(b))
    backward(a)
    first.step()
    b.load_state_dict(a.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # the dict shares its tensors
    for m, opt in ((a, first), (b, second)):
        opt.zero_grad()
        backward(m, 1)
        opt.step()
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)


def test_muon_of_adapters_only_has_no_adamw_part():
    m = model()
    for name, p in m.named_parameters():
        p.requires_grad_(name == "up.weight")
    opt = MuonWithAdamW(param_groups(m))
    assert [g["param_names"] for g in opt.param_groups] == [["up.weight"]]


def test_clip_equals_torch_in_fp32():
    ours, reference = model(), model()
    for m in (ours, reference):
        backward(m)
    norm = clip_grad_norm(ours.parameters(), 1.0)
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for p, q in zip(ours.parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)


def test_clip_measures_bf16_gradients_in_fp32():
    m = model(torch.bfloat16)
    backward(m)
    exact = torch.cat([p.grad.double().flatten() for p in m.parameters()]).norm()
    torch.testing.assert_close(clip_grad_norm(m.parameters(), None).double(), exact, rtol=1e-6, atol=0)


def test_clipping_does_not_round_its_factor():
    m = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    m.weight.grad = torch.ones(64, 64, dtype=torch.bfloat16)
    factor = 1.0 / (64 + 1e-6) * 0.99609375 * 3
    clip_grad_norm(m.parameters(), 64 * factor)
    assert torch.equal(m.weight.grad, torch.full((64, 64), factor, dtype=torch.float32).to(torch.bfloat16))
    m.weight.grad = torch.full((64, 64), 1.9921875, dtype=torch.bfloat16)
    clip_grad_norm(m.parameters(), 64 * 1.9921875 * 0.7265)
    assert m.weight.grad[0, 0] == torch.tensor(1.9921875 * 0.7265).to(torch.bfloat16)


def test_no_clip_leaves_gradients_alone():
    m = model()
    backward(m)
    before = [p.grad.clone() for p in m.parameters()]
    clip_grad_norm(m.parameters(), None)
    clip_grad_norm(m.parameters(), 1e9)
    assert all(torch.equal(p.grad, g) for p, g in zip(m.parameters(), before))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_n1_bad_loss_stops_and_names_the_batch(value):
    m = model()
    backward(m)
    norm = clip_grad_norm(m.parameters(), 1.0)
    with pytest.raises(
        UserError, match=r"step 7: loss (nan|inf), .* no parameter's gradient; rows of this batch: 3, 9"
    ):
        check_finite(7, loss=torch.tensor(value), grad_norm=norm, model=m, rows=[3, 9])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_n2_bad_gradient_stops_and_names_only_the_bad_parameters(value):
    m = model()
    backward(m)
    m["up"].weight.grad[2, 3] = value
    norm = clip_grad_norm(m.parameters(), 1.0)
    with pytest.raises(UserError, match=r"gradients of 1 parameters: up.weight. Stopped"):
        check_finite(7, loss=1.0, grad_norm=norm, model=m)


def test_finite_passes():
    m = model()
    backward(m)
    check_finite(0, loss=1.0, grad_norm=clip_grad_norm(m.parameters(), 1.0), model=m)


@pytest.mark.parametrize("lr", [1e-4, 1e-5, 1e-6])
def test_n4_frozen_share_is_what_adamw_does(lr):
    torch.manual_seed(0)
    p = nn.Parameter((0.02 * torch.randn(40_000)).bfloat16())
    predicted = frozen_share([p], lr)
    before = p.detach().clone()
    p.grad = torch.randn_like(p)  # AdamW's first update has size lr for every gradient but 0
    torch.optim.AdamW([p], lr=lr, weight_decay=0.0).step()
    assert predicted == pytest.approx((p == before).float().mean().item(), abs=0.02)


def test_n4_warning(caplog):
    p = nn.Parameter((0.02 * torch.randn(4000)).bfloat16())
    with caplog.at_level(logging.WARNING):
        warn_if_frozen([p], 1e-2)
        warn_if_frozen([nn.Parameter(p.float())], 1e-6)
        assert not caplog.text
        warn_if_frozen([p], 1e-6)
    assert "lr 1e-06 is below the resolution of" in caplog.text
