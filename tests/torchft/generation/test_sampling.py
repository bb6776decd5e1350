"""Draws against transformers' processors, and against the probabilities that they should have."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from torchft.generation import sampling
from torchft.generation.sampling import Sampling, rules, sample, uniform

V = 300


def logits(rows=6, seed=0):
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def drawn(x, how, *, seeds, draws=0, seen=None, vocab_size=V):
    own = rules([how] * len(x), list(seeds), vocab_size=V, device=x.device)
    count = torch.full((len(x),), draws)
    return sample(x, own, count, seen=seen, filtered=how.is_filtered, vocab_size=vocab_size)


@pytest.mark.parametrize(
    ("how", "theirs"),
    [
        ({"top_k": 1}, [TopKLogitsWarper(1)]),
        ({"top_k": 17}, [TopKLogitsWarper(17)]),
        ({"top_p": 0.9}, [TopPLogitsWarper(0.9)]),
        ({"top_p": 0.01}, [TopPLogitsWarper(0.01)]),
        ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        (
            {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
            [TemperatureLogitsWarper(1.7), TopKLogitsWarper(40), TopPLogitsWarper(0.8), MinPLogitsWarper(0.02)],
        ),
    ],
)
def test_filters_are_transformers(how, theirs, monkeypatch):
    """What is left, and with what probability: read where the sums are made that a draw falls into."""
    x, kept = logits(), []
    filtered = sampling._filtered
    monkeypatch.setattr(sampling, "_filtered", lambda *args: kept.append(filtered(*args)) or kept[-1])
    drawn(x, Sampling(**how), seeds=range(6))
    want = x
    for processor in theirs:
        want = processor(torch.zeros(6, 1, dtype=torch.long), want)
    [got] = kept
    assert torch.equal(got.isinf(), want.isinf())
    assert (got.softmax(-1) - want.softmax(-1)).abs().max() < 1e-6
    assert 0 < want.isinf().sum() < want.numel()


def test_repetition_penalty_is_transformers():
    x, held = (
        logits() - torch.tensor([0.0, 0, 0, 30, 30, 30])[:, None],
        torch.randint(V, (6, 200), generator=torch.Generator().manual_seed(1)),
    )
    seen = torch.zeros(6, V, dtype=torch.bool).scatter_(1, held, True)
    want = RepetitionPenaltyLogitsProcessor(1.8)(held, x.clone()).argmax(-1)
    got, logp = drawn(x, Sampling(repetition_penalty=1.8, temperature=0), seeds=range(6), seen=seen)
    assert torch.equal(got, want) and not torch.equal(got, x.argmax(-1))
    assert torch.equal(logp, x.log_softmax(-1)[torch.arange(6), got])  # of the model itself


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2, "temperature": 1.5}]
)
def test_frequencies_are_the_probabilities(how):
    """Chi-square of 40,000 draws, by seeds and by draws of one seed."""
    n, x = 40_000, logits(1)[:, :20]
    how = Sampling(**how)
    own = rules([how], [0], vocab_size=20, device=x.device)
    scaled = x / how.temperature
    want = (sampling._filtered(scaled, own) if how.is_filtered else scaled).softmax(-1)[0]
    many = rules([how] * n, list(range(n)), vocab_size=20, device=x.device)
    one = many._replace(seed=torch.zeros_like(many.seed))
    for own, draws in ((many, torch.zeros(n, dtype=torch.long)), (one, torch.arange(n))):
        token, logp = sample(x.expand(n, -1), own, draws, seen=None, filtered=how.is_filtered, vocab_size=20)
        count = torch.bincount(token, minlength=20)
        assert (count[want == 0] == 0).all()
        likely = want * n > 5
        chi2 = ((count - want * n)[likely] ** 2 / (want * n)[likely]).sum().item()
        freedom = int(likely.sum()) - 1
        assert chi2 < freedom + 4 * (2 * freedom) ** 0.5 + 1e-9
        assert torch.allclose(logp, (x / how.temperature).log_softmax(-1)[0, token], atol=1e-6)


def test_uniform_is_spread_and_independent_of_its_neighbours():
    seeds = torch.tensor([0, 1, 2, 2**62, -5]).repeat_interleave(20_000)
    draws = torch.arange(20_000).repeat(5)
    u = uniform(seeds, draws).view(5, -1)
    assert (u >= 0).all() and (u < 1).all()
    assert (u.mean(1) - 0.5).abs().max() < 0.01
    assert (u.var(1) - 1 / 12).abs().max() < 0.005
    correlations = torch.corrcoef(torch.cat((u, u.roll(1, 1))))
    assert (correlations - torch.eye(10)).abs().max() < 0.04
    first = uniform(torch.arange(20_000), torch.zeros(20_000, dtype=torch.long))  # of seeds that follow each other
    assert torch.histc(first, 20, 0, 1).sub(1000).abs().max() < 150


def test_a_draw_of_zero_takes_no_forbidden_token(monkeypatch):
    monkeypatch.setattr(sampling, "uniform", lambda seeds, draws: torch.zeros(len(seeds)))
    x = torch.tensor([[-5.0, 1.0, 0.5]])
    assert drawn(x.expand(2, 3), Sampling(top_k=2), seeds=[0, 1])[0].tolist() == [1, 1]


def test_greedy_and_sampled_rows_in_one_batch():
    x = logits(2)
    own = rules([Sampling(temperature=0), Sampling()], [3, 3], vocab_size=V, device=x.device)
    draws = torch.zeros(2, dtype=torch.long)
    token, logp = sample(x, own, draws, seen=None, filtered=False, vocab_size=V)
    assert token[0] == x[0].argmax() and logp[0] == x[0].log_softmax(-1).max()
    assert token[1] == drawn(x[1:], Sampling(), seeds=[3])[0]


def test_only_ids_that_are_tokens_are_drawn():
    x = logits(2000)
    x[:, 250:] += 5.0
    for how in (Sampling(), Sampling(temperature=0), Sampling(top_k=3)):
        token, _ = drawn(x, how, seeds=range(2000), vocab_size=250)
        assert token.max() < 250


def test_nan_logits_give_nan():
    x = logits(2)
    x[0, 3] = float("nan")
    _, logp = drawn(x, Sampling(top_p=0.9), seeds=[0, 1])
    assert logp.isnan().tolist() == [True, False]


@pytest.mark.parametrize("v", [1, 2, 3, 64, 1000, 5003])
def test_a_draw_is_where_the_sums_pass_it(v):
    """As found in fp64 at one go; words without probability are never drawn, whatever the rounding."""
    generator = torch.Generator().manual_seed(v)
    probs = torch.rand(400, v, generator=generator) ** 8
    probs[torch.rand(400, v, generator=generator) < 0.5] = 0.0
    probs[:, v // 2] = 0.3
    probs[:100, v // 2 + 1 :] = 0.0  # the last parts hold nothing
    at = torch.rand(400, 1, generator=generator) * (1 - 2**-22)
    at[::7], at[1::7] = 0.0, 1 - 2**-23
    token = sampling._drawn(probs, at)
    assert (probs.gather(1, token[:, None]) > 0).all()
    sums = probs.double().cumsum(-1)
    want = torch.searchsorted(sums, at.double() * sums[:, -1:], right=True).squeeze(1)
    off = (token != want).nonzero().flatten()
    low, high = (torch.minimum(token, want)[off], torch.maximum(token, want)[off])
    assert len(off) < 4 and (sums[off, high - 1] - sums[off, low]).max() < 1e-5 if len(off) else True
