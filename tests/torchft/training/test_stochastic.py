"""Stochastic rounding and the AdamW built on it: against closed forms, integers of any size, and fp64 AdamW."""

import pytest
import torch
from torch import nn

from torchft.errors import UserError
from torchft.training.optim import param_groups
from torchft.training.schedules import attach, cosine
from torchft.training.stochastic import (
    AdamWStochastic,
    adamw,
    random_bits,
    rounds_stochastically,
    scalars,
    stochastic_round,
)

GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "seed": 0}


def int32(value):
    return torch.tensor(value, dtype=torch.int32)


def lowbias32(i, key):
    x = (i * 0x9E3779B9 % 2**32) ^ key
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize("first", [0, 5, 2**31 - 10])
@pytest.mark.parametrize("key", [0, 123456789, -5])
def test_random_bits_equal_the_hash_in_python_integers(key, first):
    bits = random_bits(torch.empty(4, 25), int32(key), int32(first)).flatten()
    assert [int(b) % 2**32 for b in bits] == [lowbias32((i + first) % 2**32, key % 2**32) for i in range(100)]


def test_random_bits_are_uniform_and_unrelated():
    """Each half's mean, each bit, neighbours, and one key against the next: all within 5 standard errors."""
    n = 1 << 18
    keys = [scalars(GROUP, step)["key"] for step in (1, 2)]
    (low, high), (other, _) = [
        ((bits & 0xFFFF).double() / 2**16 - 0.5, (bits >> 16 & 0xFFFF).double() / 2**16 - 0.5)
        for bits in (random_bits(torch.empty(n), key, int32(0)) for key in keys)
    ]
    for x in (low, high):
        assert abs(x.mean()) < 5 / (12 * n) ** 0.5
        assert x.var() == pytest.approx(1 / 12, rel=0.01)
    for a, b in [(low, high), (low, other), (low[1:], low[:-1]), (high[1:], high[:-1]), (low[1024:], low[:-1024])]:
        assert abs((a * b).mean()) < 5 / 12 / len(a) ** 0.5


def test_rounding_is_one_of_two_neighbours_and_unbiased():
    """Over 2^16 evenly spread random bits the mean is the value itself, exactly."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    for value in (1.003, -1.003, 3.14159e-30, -7.7e20, 0.1, 1e-40, 0.0):
        x = torch.tensor(value, dtype=torch.float32)
        rounded = stochastic_round(x.expand(1 << 16).contiguous(), bits)
        assert rounded.dtype == torch.bfloat16
        neighbours = set(rounded.tolist())
        assert len(neighbours) <= 2 and min(neighbours) <= float(x) <= max(neighbours)
        assert rounded.double().mean().item() == pytest.approx(float(x), rel=1e-12)


def test_rounding_keeps_what_bf16_holds_and_what_is_not_finite():
    bits = int32(0xFFFF)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(stochastic_round(exact.float(), bits), exact)
    odd = torch.tensor([float("inf"), -float("inf"), 0x7FFFFFFF]).view(torch.int32)
    odd[2] = 0x7FFFFFFF  # CUDA's NaN, whose bits would carry into -0
    rounded = stochastic_round(odd.view(torch.float32), bits)
    assert rounded[0] == float("inf") and rounded[1] == -float("inf") and rounded[2].isnan()


def reference_step(w, m, v, g, step, group):
    """AdamW in fp64."""
    (b1, b2), lr = group["betas"], group["lr"]
    m.mul_(b1).add_(g, alpha=1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    w.mul_(1 - lr * group["weight_decay"])
    w.sub_(lr * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + group["eps"]))


def test_fp32_weights_equal_torch_adamw():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(30, 7)), nn.Parameter(torch.randn(5))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    a, b = AdamWStochastic(ours, state_dtype="fp32", **options), torch.optim.AdamW(theirs, **options)
    for _ in range(20):
        for p, q in zip(ours, theirs):
            p.grad = q.grad = torch.randn_like(p)
        a.step(), b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("state_dtype", ["bf16", "fp32"])
def test_bf16_follows_fp64_on_average_where_rounding_to_the_nearest_stands_still(state_dtype):
    """40000 copies of a few weights, the same gradients for all: the mean of the copies is the fp64 trajectory.

    The lr moves a weight by 1/20 of the distance of its bf16 neighbours per step: torch's AdamW leaves all as they are.
    """
    torch.manual_seed(0)
    copies, weights = 40_000, torch.tensor([1.0, -1.5, 0.75, 0.011])
    p = nn.Parameter(weights.repeat(copies, 1).bfloat16())
    q = nn.Parameter(p.detach().clone())
    w = p.detach()[0].double()
    start, m, v = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
    options = {"lr": 4e-4 * 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = AdamWStochastic([p], state_dtype=state_dtype, seed=3, **options)
    nearest = torch.optim.AdamW([q], **options)
    for step in range(1, 41):
        g = (torch.rand(4) + 0.5).bfloat16()
        p.grad = q.grad = g.repeat(copies, 1)
        optimizer.step(), nearest.step()
        reference_step(w, m, v, g.double(), step, options)
    mean, spread = p.detach().double().mean(0), p.detach().double().std(0)
    moved = (w - start).abs()
    assert (moved > 4e-3).all()
    bars = 5 * spread / copies**0.5 + 0.02 * moved * (state_dtype == "bf16")  # E[1 / sqrt(v)] is not 1 / sqrt(E[v])
    assert ((mean - w).abs() <= bars + 1e-6).all(), (mean - w, bars)
    assert torch.equal(q.detach()[0, :3], p.new_tensor([1.0, -1.5, 0.75]))


def test_bf16_second_moment_decays():
    """Gradients of 1, then of 0: v goes down with 0.999^n on average; torch's, rounded to the nearest, stays."""
    p, q = (nn.Parameter(torch.ones(20_000).bfloat16()) for _ in range(2))
    ours, theirs = AdamWStochastic([p], lr=0.0), torch.optim.AdamW([q], lr=0.0)
    for step in range(301):
        p.grad = q.grad = torch.full_like(p, float(step == 0))
        ours.step(), theirs.step()
    v, stuck = (o.state[x]["exp_avg_sq"].double().mean().item() for o, x in ((ours, p), (theirs, q)))
    assert v == pytest.approx(1e-3 * 0.999**300, rel=0.01)
    assert stuck == pytest.approx(1e-3, rel=0.01)


def test_rounding_depends_on_seed_step_and_place_alone():
    def run(seed, poke=False):
        p = nn.Parameter(torch.linspace(-1, 1, 5000).bfloat16())
        r = nn.Parameter(torch.linspace(-1, 1, 5000).bfloat16())
        optimizer = AdamWStochastic([p, r], lr=1e-4, seed=seed)
        for _ in range(3):
            if poke:
                torch.rand(7)
            p.grad, r.grad = torch.ones_like(p), torch.ones_like(r)
            optimizer.step()
        return p.detach(), r.detach()

    state = torch.get_rng_state()
    p, r = run(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(p, run(0, poke=True)[0])
    assert not torch.equal(p, run(1)[0])
    assert not torch.equal(p, r)  # equal weights and gradients, other places


def test_pieces_of_a_parameter_round_like_the_whole():
    torch.manual_seed(0)
    whole = [torch.randn(3000).bfloat16(), torch.randn(3000).bfloat16(), *torch.zeros(2, 3000).bfloat16()]
    cut = [t.clone() for t in whole]
    given = scalars(GROUP, 1)
    adamw(*whole, int32(17), given)
    for part in (slice(0, 1024), slice(1024, 3000)):
        adamw(*(t[part] for t in cut), int32(17 + part.start), given)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut))


def test_schedules_set_its_lr_and_groups_their_decay():
    m = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    optimizer = AdamWStochastic(param_groups(m), lr=1.0, weight_decay=0.5)
    schedule = attach(optimizer, cosine(total_steps=4, warmup_steps=2))
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    for _ in range(2):
        for p in m.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()  # lr 0, then 0.5
        schedule.step()
    for name, p in m.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.75 if p.ndim == 2 else 1.0))


def test_bad_settings_are_refused():
    p = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(UserError, match=r"state_dtype: 'fp8' is not one of bf16, fp32"):
        AdamWStochastic(p, state_dtype="fp8")
    with pytest.raises(UserError, match=r"lr -1\.0"):
        AdamWStochastic(p, lr=-1.0)
    with pytest.raises(UserError, match="betas"):
        AdamWStochastic(p, betas=(0.9, 1.0))


def test_who_rounds_stochastically():
    from torchao.optim import AdamW8bit

    p = [nn.Parameter(torch.zeros(2))]
    assert rounds_stochastically(AdamWStochastic(p))
    assert rounds_stochastically(AdamW8bit(p, bf16_stochastic_round=True))
    assert not rounds_stochastically(AdamW8bit(p)) and not rounds_stochastically(torch.optim.AdamW(p))


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", ["bf16", "fp32"])
def test_the_compiled_step_equals_eager_and_compiles_once(state_dtype):
    shapes = [(2048, 1024), (4096,), (1024,), (3, 700), (512, 4096), *((n,) for n in range(5, 16))]

    def run(device):
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(shape).bfloat16().to(device)) for shape in shapes]
        optimizer = AdamWStochastic(ps, lr=1e-3, state_dtype=state_dtype)
        for _ in range(3):
            for p in ps:
                p.grad = torch.randn(p.shape).bfloat16().to(device)
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9
        return ps

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for p, q in zip(run("cuda"), run("cpu")):
        differ = (p.cpu() != q).float().mean().item()  # where a fused multiply-add moves a sum over the random bits
        assert differ < 1e-3, differ
        torch.testing.assert_close(p.cpu(), q, rtol=0.02, atol=1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # rows of 1024, and everything else


@pytest.mark.gpu
def test_the_compiled_step_on_cuda_takes_no_memory_beside_the_states():
    p = nn.Parameter(torch.randn(64 << 20, device="cuda").bfloat16())
    p.grad = torch.ones_like(p)
    optimizer = AdamWStochastic([p])
    optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
