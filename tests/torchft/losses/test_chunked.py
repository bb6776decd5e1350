"""The core of the chunked likelihoods: how much it projects, what it finds in a head, how much memory it takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchft.adapters.lora import LoRALinear
from torchft.losses.chunked import trained_leaves
from torchft.losses.likelihood import nll_sum, token_logps, token_nll


def counted(project, sizes):
    def head(x):
        sizes.append(len(x))
        return project(x)

    return head


def project_sizes(loss, *, trained):
    """How many tokens went through the head, call by call, in forward and in backward."""
    torch.manual_seed(0)
    head, sizes = nn.Linear(8, 11).requires_grad_(trained), []
    hidden, labels = torch.randn(2, 20, 8, requires_grad=True), torch.randint(11, (2, 20))
    labels[0] = -100
    value = loss(hidden, counted(head, sizes), labels=labels, chunk=6)
    forward = sizes.copy()
    value.sum().backward()
    return forward[1:], sizes[len(forward) :]  # the first call, of one token, looks for parameters


CHUNKS = [6, 6, 6, 2]  # of 20 supervised tokens


@pytest.mark.parametrize(
    ("loss", "trained", "backward"),
    [(nll_sum, False, []), (nll_sum, True, []), (token_nll, False, []), (token_nll, True, CHUNKS)],
)
def test_only_supervised_tokens_and_only_as_often_as_needed(loss, trained, backward):
    assert project_sizes(loss, trained=trained) == (CHUNKS, backward)


def test_an_entropy_that_is_logged_costs_nothing():
    def logged(*args, **more):
        return token_logps(*args, entropy=True, **more)[0]

    def trained_on(*args, **more):
        return token_logps(*args, entropy=True, **more)[1]

    assert project_sizes(logged, trained=False) == (CHUNKS, [])
    assert project_sizes(trained_on, trained=False) == (CHUNKS, CHUNKS)


def test_trained_leaves_are_what_the_head_trains():
    linear, x = nn.Linear(4, 6), torch.randn(3, 4, requires_grad=True)
    layer = LoRALinear(nn.Linear(4, 6, device="cpu"), 2, 4.0)
    assert {id(p) for p in trained_leaves(lambda h: linear(h).tanh() * 3, x)} == {id(p) for p in linear.parameters()}
    assert {id(p) for p in trained_leaves(layer, x)} == {id(layer.lora_a), id(layer.lora_b)}
    assert trained_leaves(nn.Linear(4, 6).requires_grad_(False), x) == []
    assert [id(p) for p in trained_leaves(lambda h: F.linear(h, linear.weight), x[:0])] == [id(linear.weight)]
    with torch.no_grad():
        assert trained_leaves(linear, x) == []


def test_a_head_that_keeps_its_output_is_refused():
    hidden, labels = torch.randn(1, 5, 4, requires_grad=True), torch.zeros(1, 5, dtype=torch.long)
    linear = nn.Linear(4, 6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nll_sum(hidden, lambda x: linear(x).tanh(), labels=labels)


def test_gradients_of_a_trained_head_are_summed_in_fp32():
    """1,024 chunks of one token each, all alike: a sum in bf16 stops growing once a chunk is below half a ulp."""
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    hidden, labels = torch.ones(1, 1024, 1, dtype=torch.bfloat16), torch.zeros(1, 1024, dtype=torch.long)
    nll_sum(hidden, lambda x: F.linear(x, weight), labels=labels, chunk=1).backward()
    assert weight.grad.flatten().tolist() == [-512, 512]  # each token gives -+1/2; bf16 stops at 128


def test_scaling_a_gradient_does_not_round_the_scale():
    torch.manual_seed(0)
    linear = nn.Linear(64, 50, bias=False).bfloat16()
    hidden = torch.randn(1, 200, 64).bfloat16().requires_grad_()
    labels = torch.randint(50, (1, 200))
    one = torch.autograd.grad(nll_sum(hidden, linear, labels=labels), linear.weight)[0].double()
    third = torch.autograd.grad(nll_sum(hidden, linear, labels=labels) / 3, linear.weight)[0].double()
    along = (one * third).sum() / one.square().sum()
    assert abs(along * 3 - 1) < 3e-4  # bf16's own third is 0.13% too large


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [nll_sum, token_nll])
@pytest.mark.parametrize("trained", [False, True])
def test_memory_of_one_chunk_of_logits(loss, trained):
    """Beyond inputs, gradients and the fp32 sum of the head's: one chunk of bf16 logits, not two and none in fp32."""
    d, v, t, chunk = 256, 65_536, 8192, 2048
    head = nn.Linear(d, v, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(trained)
    hidden = torch.randn(4, t // 4, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(v, (4, t // 4), device="cuda")
    loss(hidden, head, labels=labels, chunk=chunk).sum().backward()  # cuBLAS workspace, Triton
    hidden.grad = head.weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss(hidden, head, labels=labels, chunk=chunk).sum().backward()
    logits = 2 * chunk * v  # bytes: 256 MiB
    of_head = (2 + 4 + 2 + 2) * d * v if trained else 0  # of a chunk, fp32 sum, rounded, scaled: 160 MiB in all
    of_hidden = 4 * 2 * d * t  # 16 MiB
    assert torch.cuda.max_memory_allocated() - before <= logits + of_head + of_hidden + 2**22


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [False, True])
def test_the_gpu_agrees_with_the_cpu(trained):
    torch.manual_seed(0)
    head = nn.Linear(128, 40_001, bias=False).requires_grad_(trained)
    hidden, labels = torch.randn(2, 100, 128, requires_grad=True), torch.randint(40_001, (2, 100))
    labels[:, ::3] = -100
    upstream = torch.randn(2, 100)

    def run(device):
        h = hidden.detach().to(device).requires_grad_()
        logps, entropy = token_logps(
            h, head.to(device), labels=labels.to(device), temperature=0.8, entropy=True, chunk=50
        )
        loss = (upstream.to(device) * (logps + 0.1 * entropy)).sum()
        inputs = [h, head.weight] if trained else [h]
        return [x.cpu() for x in (logps, entropy, *torch.autograd.grad(loss, inputs))]

    for ours, cpu in zip(run("cuda"), run("cpu")):
        assert (ours - cpu).norm() / cpu.norm() <= 1e-5


@pytest.mark.gpu
def test_the_host_waits_once():
    """For the number of supervised tokens; anything more would stall the queue of kernels."""
    head = nn.Linear(64, 1000, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(2, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(1000, (2, 64), device="cuda")
    labels[0, :9] = -100
    nll_sum(hidden, head, labels=labels, chunk=32).backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as seen:
            nll_sum(hidden, head, labels=labels, chunk=32).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchroniz" in str(w.message)]) == 1
