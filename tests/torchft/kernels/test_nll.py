"""Rows of logits -> log-probability, entropy, gradient: the PyTorch twin against fp64, the kernel against its twin.

Without a GPU the kernel runs in Triton's interpreter: pip install triton "numpy<2.4", TRITON_INTERPRET=1 pytest <this>.
"""

import importlib.util
import os

import pytest
import torch
from oracles import distance

from torchft.kernels import nll
from torchft.kernels.nll import row_logps, row_logps_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
ON = pytest.param("cpu") if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)  # where the kernel can run


def random(*shape, seed=0, scale=3.0, dtype=torch.float32):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def case(t, v, dtype=torch.float32):
    labels = torch.randint(v, (t,), generator=torch.Generator().manual_seed(9))
    return random(t, v, dtype=dtype), labels, random(t, seed=1), random(t, seed=2)


def exact(logits, labels, temperature, grad_logp, grad_entropy):
    """Log-probability, entropy and the gradient of their weighted sum in fp64, by torch.distributions and autograd."""
    x = logits.double().requires_grad_()
    p = torch.distributions.Categorical(logits=x / temperature)
    logp, entropy = p.log_prob(labels), p.entropy()
    grad = torch.autograd.grad((grad_logp.double() * logp + grad_entropy.double() * entropy).sum(), x)[0]
    return logp.detach(), entropy.detach(), grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("t", "v"), [(5, 101), (1, 1), (3, 4096)])
def test_twin_is_exact(t, v, temperature):
    logits, labels, g, ge = case(t, v)
    want = exact(logits, labels, temperature, g, ge)
    logp, entropy = row_logps(logits, labels, temperature=temperature, entropy=True, grad_logp=g, grad_entropy=ge)
    assert logp.dtype == entropy.dtype == torch.float32
    for got, right in zip((logp, entropy, logits), want):
        assert distance(got, right)[0] <= 3e-5
        assert v == 1 or distance(got, right)[1] <= 1e-6


def test_without_a_gradient_logits_stay():
    logits, labels, g, ge = case(4, 50)
    before = logits.clone()
    logp, entropy = row_logps(logits, labels)
    assert entropy is None and torch.equal(logits, before)
    assert distance(logp, exact(before, labels, 1.0, g, ge)[0])[1] <= 1e-6


def test_rows_of_bf16_are_computed_in_fp32_and_their_gradient_rounded_once():
    logits, labels, g, _ = case(6, 300, torch.bfloat16)
    want = exact(logits, labels, 1.0, g, torch.zeros(6))
    logp, _ = row_logps(logits, labels, grad_logp=g)
    assert logits.dtype == torch.bfloat16
    assert distance(logp, want[0])[1] <= 1e-6
    assert distance(logits, want[2])[1] <= 2**-9


def test_impossible_words_count_as_zero():
    logits, labels, g, ge = case(3, 40)
    want = exact(logits[:, :30], labels % 30, 1.0, g, ge)
    logits[:, 30:] = -torch.inf
    got = *row_logps(logits, labels % 30, entropy=True, grad_logp=g, grad_entropy=ge), logits[:, :30]
    assert all(distance(a, b)[1] <= 1e-6 for a, b in zip(got, want))
    assert logits[:, 30:].eq(0).all()


def test_autograd_refuses_logits_that_a_backward_still_needs():
    x = random(2, 10).requires_grad_()
    logits = x.tanh()  # keeps its result
    row_logps(logits.detach(), torch.tensor([1, 2]), grad_logp=torch.ones(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def on_kernel(logits, labels, temperature=1.0, entropy=True, g=None, ge=None):
    return nll._on_gpu(logits, labels, temperature, entropy, g, ge)


@pytest.mark.parametrize("device", [ON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [1, 7, 101, 1024, 33_000, 70_001])  # one block, a power of two, a ragged second and third
def test_kernel_is_its_twin(device, dtype, v):
    given = [x.to(device) for x in case(5, v, dtype)]
    for temperature, entropy, with_grad, with_entropy_grad in [
        (1.0, False, False, False),
        (1.0, False, True, False),
        (0.6, True, True, False),
        (1.7, True, True, True),
        (1.0, True, False, False),
    ]:
        ours, twins = given[0].clone(), given[0].clone()
        more = (given[2] if with_grad else None, given[3] if with_entropy_grad else None)
        got = on_kernel(ours, given[1], temperature, entropy, *more)
        want = row_logps_reference(twins, given[1], temperature, entropy, *more)
        assert (got[1] is None) == (want[1] is None)
        for a, b in zip(got, want):
            assert a is None or distance(a, b)[0] <= 3e-5
        bar = (8e-3 if INTERPRETED else 1e-3) if dtype == torch.bfloat16 else 3e-6  # the interpreter cuts bits off
        assert v == 1 or distance(ours, twins)[1] <= bar
        assert v > 1 or distance(ours, twins)[0] <= 1e-5


@pytest.mark.parametrize("device", [ON])
def test_kernel_on_extreme_rows(device):
    v = 40_000
    rows = [torch.zeros(v), torch.full((v,), -80.0), torch.full((v,), 80.0), torch.linspace(-80, 80, v)]
    rows += [torch.where(torch.arange(v) == i, 80.0, -80.0) for i in (0, v - 1)]
    rows += [torch.where(torch.arange(v) < 33_000, -torch.inf, 1.0)]  # all of the first block impossible
    logits = torch.stack(rows).to(device)
    labels = torch.tensor([0, 5, v - 1, v - 1, 0, 3, v - 2], device=device)
    g, ge = torch.ones(len(labels), device=device), torch.full((len(labels),), 0.5, device=device)
    twins = logits.clone()
    got = on_kernel(logits, labels, 1.0, True, g, ge)
    want = row_logps_reference(twins, labels, 1.0, True, g, ge)
    for a, b in zip((*got, logits), (*want, twins)):
        assert a.isfinite().all()
        assert distance(a, b)[0] <= 1e-4 and distance(a, b)[1] <= 1e-5
    assert distance(got[1][:1], torch.tensor([v], device=device).log())[0] <= 1e-5  # of all equal: log v


@pytest.mark.parametrize("device", ["cpu", ON])
def test_a_label_out_of_range_is_nan_and_writes_nowhere_else(device):
    v = 128
    around = torch.zeros(6, v, device=device)  # rows 1 .. 4 are given away
    labels = torch.tensor([3, -100, v, 2**40], device=device)
    run = row_logps_reference if device == "cpu" and not INTERPRETED else nll._on_gpu
    logp, _ = run(around[1:5], labels, 1.0, False, torch.ones(4, device=device), None)
    assert logp.isnan().tolist() == [False, True, True, True]
    assert around[0].eq(0).all() and around[5].eq(0).all()
    assert around[1, 3] > 0 and around[2:5].lt(0).all()  # no label: the gradient of nothing but the sum


@pytest.mark.parametrize("device", [ON])
def test_kernel_reads_rows_of_a_wider_tensor_and_none(device):
    wide = random(4, 200).to(device)
    before, labels = wide.clone(), torch.tensor([1, 2, 3, 4], device=device)
    want = row_logps_reference(wide[:, :150].clone(), labels, 1.0, True, None, None)
    got = on_kernel(wide[:, :150], labels, g=torch.ones(4, device=device))
    assert all(distance(a, b)[0] <= 1e-5 for a, b in zip(got, want))
    assert torch.equal(wide[:, 150:], before[:, 150:])
    assert on_kernel(wide[:0], labels[:0])[0].shape == (0,)


@pytest.mark.gpu
def test_kernel_past_2_to_the_31_logits():
    t, v = 16_400, 131_072  # 4.0 GiB of bf16; the last rows lie beyond an int32 offset
    logits = torch.empty(t, v, dtype=torch.bfloat16, device="cuda").normal_()
    labels = torch.randint(v, (t,), device="cuda")
    tail = logits[-20:].clone()
    want = row_logps_reference(tail, labels[-20:], 1.0, False, torch.ones(20, device="cuda"), None)
    got = row_logps(logits, labels, grad_logp=torch.ones(t, device="cuda"))
    assert distance(got[0][-20:], want[0])[0] <= 3e-5
    assert distance(logits[-20:], tail)[1] <= 1e-3


@pytest.mark.gpu
def test_autograd_sees_what_the_kernel_wrote():
    x = random(2, 10).cuda().requires_grad_()
    logits = x.tanh()
    row_logps(logits.detach(), torch.tensor([1, 2], device="cuda"), grad_logp=torch.ones(2, device="cuda"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()
