"""Mixture of experts against a loop over tokens, and the load-balancing loss against transformers'."""

import pytest
import torch
import torch.nn.functional as F
from oracles import violations
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from torchft.modules import moe
from torchft.modules.mlp import GatedMLP
from torchft.modules.moe import Experts, MoE, balance_loss
from torchft.modules.routers import GroupedRouter, SigmoidRouter, SoftmaxRouter

DIM, HIDDEN, EXPERTS = 16, 12, 8


def layer(kind="plain"):
    torch.manual_seed(0)
    experts = Experts(EXPERTS, DIM, HIDDEN, bias=kind == "biased", weighs_input=kind == "input")
    if kind == "grouped":
        router = GroupedRouter(DIM, EXPERTS, 3, num_groups=4, top_groups=2, scale=2.5)
        made = MoE(router, experts, shared=GatedMLP(DIM, HIDDEN))
    elif kind == "input":
        made = MoE(SigmoidRouter(DIM, EXPERTS, 1), experts, shared=GatedMLP(DIM, HIDDEN))
    elif kind == "gated":
        made = MoE(SoftmaxRouter(DIM, EXPERTS, 2), experts, shared=GatedMLP(DIM, HIDDEN), has_shared_gate=True)
    else:
        made = MoE(SoftmaxRouter(DIM, EXPERTS, 2), experts)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made


KINDS = ["plain", "biased", "grouped", "input", "gated"]


def by_loop(m, x):
    """What a mixture of experts is, a token and an expert at a time."""
    flat = x.flatten(0, 1)
    weights, chosen = m.router.choose(m.router(flat))
    rows = []
    for token, token_weights, token_experts in zip(flat, weights, chosen):
        out = torch.zeros(DIM)
        for weight, e in zip(token_weights, token_experts):
            first, second = m.experts.gate_up_proj, m.experts.down_proj
            inner = first.weight[e] @ (token * weight if m.experts.weighs_input else token)
            gate, up = (inner if first.bias is None else inner + first.bias[e]).chunk(2)
            expert = second.weight[e] @ (F.silu(gate) * up)
            expert = expert if second.bias is None else expert + second.bias[e]
            out = out + (expert if m.experts.weighs_input else weight * expert)
        if m.shared is not None:
            out = out + m.shared(token) * (1.0 if m.shared_gate is None else m.shared_gate(token))
        rows.append(out)
    return torch.stack(rows).view(x.shape)


def all_of(m, function, x):
    """Output and gradients for everything that is trained, the input too."""
    x = x.clone().requires_grad_()
    out = function(x)
    inputs = {"x": x} | {n: p for n, p in m.named_parameters() if p.requires_grad}
    return {"out": out} | dict(zip(inputs, torch.autograd.grad(out.square().mean(), list(inputs.values()))))


def pairs(got, want):
    return {name: (got[name], want[name]) for name in want}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_loop_over_tokens(kind):
    m, x = layer(kind), torch.randn(2, 9, DIM)
    assert violations(pairs(all_of(m, m, x), all_of(m, lambda x: by_loop(m, x), x))) == {}


def test_bars_see_rows_of_another_expert(monkeypatch):
    m, x = layer(), torch.randn(2, 9, DIM)
    spread = moe.spread
    monkeypatch.setattr(moe, "spread", lambda x, routes: spread(x, routes._replace(place=routes.place.roll(1))))
    assert violations(pairs(all_of(m, m, x), all_of(m, lambda x: by_loop(m, x), x)))


def test_one_expert_gets_all_and_others_none():
    m, x = layer(), torch.randn(1, 5, DIM)
    with torch.no_grad():
        m.router.weight.zero_()
        m.router.weight[3], m.router.weight[6] = 5.0, 4.0  # for every token, or against them, as its sum is
    x = x.abs()
    got, want = all_of(m, m, x), all_of(m, lambda x: by_loop(m, x), x)
    assert violations(pairs(got, want)) == {}
    assert got["experts.down_proj.weight"][[0, 1, 2, 4, 5, 7]].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph_for_every_routing(kind):
    torch._dynamo.reset()
    m = layer(kind)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            x = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(seed))
            assert violations(pairs(all_of(m, compiled, x), all_of(m, m, x))) == {}


def test_recomputed():
    m, x = layer("gated"), torch.randn(2, 9, DIM)
    m.balance = 0.1
    again = all_of(m, lambda x: checkpoint(m, x, use_reentrant=False), x)
    assert all(torch.equal(a, b) for a, b in pairs(again, all_of(m, m, x)).values())


def test_meta_device_has_shapes_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            m = layer("biased").to(dtype)
            assert m(torch.empty(2, 9, DIM, dtype=dtype)).shape == (2, 9, DIM)


def test_correction_stays_fp32_and_exact():
    m = layer("grouped")
    before = m.router.correction.clone()
    m.to(torch.bfloat16)
    assert m.router.weight.dtype == torch.bfloat16
    assert torch.equal(m.router.correction, before)
    assert m(torch.randn(1, 3, DIM, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_loss_is_transformers(top_k):
    torch.manual_seed(0)
    logits = torch.randn(50, EXPERTS)
    router = SoftmaxRouter(DIM, EXPERTS, top_k)
    ours = balance_loss(router.probabilities(logits), router.choose(logits)[1])
    torch.testing.assert_close(ours, load_balancing_loss_func((logits,), EXPERTS, top_k))
    even = torch.zeros(EXPERTS, EXPERTS)
    torch.testing.assert_close(balance_loss(even.softmax(-1), torch.arange(EXPERTS)[:, None]), torch.tensor(1.0))


def test_balance_is_added_to_the_loss_that_is_differentiated():
    m, x = layer(), torch.randn(2, 9, DIM)
    m.balance = 0.7
    got = all_of(m, m, x)
    x = x.clone().requires_grad_()
    m.balance = 0.0
    loss = m(x).square().mean() + 0.7 * load_balancing_loss_func((m.router(x.flatten(0, 1)),), EXPERTS, 2)
    inputs = {"x": x} | dict(m.named_parameters())
    want = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()))))
    assert violations(pairs(got, want)) == {}
    without = all_of(m, m, x.detach())
    assert violations({"router": (without["router.weight"], want["router.weight"])})


def test_counts_are_added_in_training_only():
    m, x = layer(), torch.randn(2, 9, DIM)
    m.counts = torch.zeros(EXPERTS, dtype=torch.int64)
    m(x)
    m.eval()(x)
    chosen = m.router.choose(m.router(x.flatten(0, 1)))[1]
    assert torch.equal(m.counts, chosen.flatten().bincount(minlength=EXPERTS))
