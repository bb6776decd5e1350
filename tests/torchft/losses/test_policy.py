"""Policy losses in fp64: against TRL, against closed forms, and however a batch is divided."""

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from torchft.losses.policy import (
    METHODS,
    Totals,
    gae,
    group_advantages,
    grpo,
    kl,
    overlong_penalty,
    ppo,
    token_weights,
    truncated_weights,
    value_loss,
)

LENGTHS = (7, 1, 4, 5, 0, 2)
MAX_TOKENS = 9


@pytest.fixture(autouse=True)
def _fp64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def batch(lengths=LENGTHS, seed=0):
    """Log-probabilities of now (with a gradient), of before and of a reference, mask, advantages."""
    g = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    logps = -torch.rand(shape, generator=g) * 3
    old = logps + 0.3 * torch.randn(shape, generator=g)
    reference = logps + 0.5 * torch.randn(shape, generator=g)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    advantages = torch.randn(len(lengths), generator=g)
    return logps.requires_grad_(), old, reference, mask, advantages


def totals(mask):
    return Totals(sequences=len(mask), tokens=int(mask.sum()), max_tokens=MAX_TOKENS)


def loss_of(logps, old, mask, advantages, method, total):
    losses, _ = grpo(logps, old, advantages, mask, method=method)
    return (token_weights(mask, method.normalizer, total) * losses).sum()


def trl_loss(kind, logps, old, reference, mask, advantages, *, method, beta=0.0, importance=None):
    """TRL's GRPO loss of these log-probabilities; the model forward is the only part that is replaced."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = object.__new__(GRPOTrainer)
    high = method.clip_high if kind != "cispo" else 1 + method.clip_high
    settings = {
        "loss_type": kind,
        "importance_sampling_level": "sequence" if method.objective == "sequence" else "token",
        "epsilon_low": method.clip_low,
        "epsilon_high": high,
        "beta": beta,
        "max_completion_length": MAX_TOKENS,
        "current_gradient_accumulation_steps": 1,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "use_vllm": importance is not None,
        "vllm_importance_sampling_correction": True,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "accelerator": SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logps, torch.zeros_like(logps), None),
    }
    vars(trainer).update(settings)
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": importance,
    }
    return trainer._compute_loss(trainer.model, inputs)


@pytest.mark.parametrize(
    ("kind", "name"), [("grpo", "grpo"), ("dr_grpo", "dr_grpo"), ("dapo", "dapo"), ("grpo", "gspo"), ("cispo", "cispo")]
)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_and_gradient_are_trls(kind, name, beta):
    method = METHODS[name] if name != "cispo" else replace(METHODS[name], clip_high=0.1)
    logps, old, reference, mask, advantages = batch()
    losses, clipped = grpo(logps, old, advantages, mask, method=method)
    importance = truncated_weights(reference, old, mask, cap=1.2)
    losses = importance * losses
    if beta:
        losses = losses + beta * torch.where(mask, kl(logps, reference), 0.0)
    ours = (token_weights(mask, method.normalizer, totals(mask)) * losses).sum()
    theirs = trl_loss(kind, logps, old, reference, mask, advantages, method=method, beta=beta, importance=importance)
    assert abs(ours - theirs) < 1e-12
    got, want = (torch.autograd.grad(loss, logps)[0] for loss in (ours, theirs))
    assert (got - want).abs().max() < 1e-12 and want.abs().max() > 1e-3
    assert 0 < clipped.sum() < mask.sum()


def test_rloo_is_reinforce_on_policy_and_trls_off_it():
    """RLOO's ratio is that of a whole completion."""
    logps, old, _, mask, advantages = batch()
    method = METHODS["rloo"]
    on_policy = loss_of(logps, logps.detach(), mask, advantages, method, totals(mask))
    reinforce = -(torch.where(mask, logps, 0.0).sum(1) * advantages).mean()
    got, want = (torch.autograd.grad(loss, logps)[0] for loss in (on_policy, reinforce))
    assert (got - want).abs().max() < 1e-12
    ratio = torch.where(mask, logps - old, 0.0).sum(1).exp()
    full = [i for i, n in enumerate(LENGTHS) if n]  # TRL's formula, and an empty completion has no gradient
    want = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)[full].sum() / len(LENGTHS)
    assert abs(loss_of(logps, old, mask, advantages, method, totals(mask)) - want) < 1e-12


@pytest.mark.parametrize("name", METHODS)
def test_padding_micro_batches_and_ranks_change_nothing(name):
    """The sum over parts, each as short as its own rows and padded with rubbish, is the loss of the whole."""
    method = METHODS[name]
    logps, old, _, mask, advantages = batch()
    whole = loss_of(logps, old, mask, advantages, method, totals(mask))
    want = torch.autograd.grad(whole, logps)[0]
    for parts in ([[0], [1], [2, 3], [4, 5]], [[5, 0, 3], [4, 2, 1]]):
        loss = torch.zeros(())
        for rows in parts:
            longest = max(LENGTHS[i] for i in rows)
            cut = slice(None, longest)
            rubbish = torch.full((len(rows), 3), float("nan"))
            padded = torch.cat((logps[rows][:, cut], rubbish), dim=1)
            old_padded = torch.cat((old[rows][:, cut], rubbish), dim=1)
            mask_padded = torch.cat((mask[rows][:, cut], torch.zeros(len(rows), 3, dtype=torch.bool)), dim=1)
            loss = loss + loss_of(padded, old_padded, mask_padded, advantages[rows], method, totals(mask))
        assert abs(loss - whole) < 1e-12
        assert (torch.autograd.grad(loss, logps)[0] - want).abs().max() < 1e-12


def test_ppo_by_hand():
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.25, 0.9]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 2.0]])
    losses, clipped = ppo(ratio.log(), torch.zeros(1, 6), advantages, clip_low=0.2, clip_high=0.28)
    assert (losses - torch.tensor([[-1.28, 1.5, -0.5, 0.8, -1.25, -1.8]])).abs().max() < 1e-12
    assert clipped.tolist() == [[True, False, False, True, False, False]]


def test_value_loss_by_hand():
    values, old, returns = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.5, 0.1, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    assert (value_loss(values, old, returns, clip=0.2) - torch.tensor([0.5, 0.5, 0.0])).abs().max() < 1e-12
    # the old value was 0.5: a step to 0 counts as one to 0.3, which is further from the return of -1
    [loss] = value_loss(torch.tensor([0.0]), torch.tensor([0.5]), torch.tensor([-1.0]), clip=0.2)
    assert abs(loss - 1.3**2 / 2) < 1e-12
    assert value_loss(torch.tensor([0.0]), torch.tensor([0.5]), torch.tensor([-1.0]), clip=None).item() == 0.5


def test_kl_estimators_agree_with_the_divergence():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    exact = (p * (p / q).log()).sum()
    assert abs((p * kl(p.log(), q.log(), "k1")).sum() - exact) < 1e-12
    assert abs((p * kl(p.log(), q.log(), "k3")).sum() - exact) < 1e-12
    assert (kl(p.log(), q.log(), "k3") >= 0).all()
    logits = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    logp = logits.log_softmax(0)
    want = torch.autograd.grad((logp.exp() * (logp - q.log())).sum(), logits, retain_graph=True)[0]
    k2 = (logp.exp().detach() * kl(logp, q.log(), "k2")).sum()
    assert (torch.autograd.grad(k2, logits)[0] - want).abs().max() < 1e-12


def test_truncated_weights():
    trainer, sampler = torch.log(torch.tensor([[0.8, 0.2, 0.5]])), torch.log(torch.tensor([[0.2, 0.4, 0.5]]))
    mask = torch.tensor([[True, True, False]])
    assert (truncated_weights(trainer, sampler, mask, cap=2.0) - torch.tensor([[2.0, 0.5, 1.0]])).abs().max() < 1e-12
    [[of_all]] = truncated_weights(trainer, sampler, mask, cap=3.0, whole_sequence=True)
    assert abs(of_all - 2.0) < 1e-12


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 8.0]])
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    centered = rewards - mean
    want = {
        "group": centered / (std + 1e-4),  # TRL's, with TRL's constant
        "center": centered,
        "leave_one_out": rewards - others,
        "batch": (rewards - rewards.mean()) / (rewards.std() + 1e-4),
        "center_batch": centered / (centered.std() + 1e-4),
    }
    for baseline, expected in want.items():
        assert (group_advantages(rewards, baseline) - expected).abs().max() < 1e-12, baseline


@pytest.mark.parametrize("baseline", ["group", "center", "leave_one_out", "batch", "center_batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_no_advantage(baseline, dtype):
    """Exactly: the mean of three times 0.1 is not 0.1, and would be divided by a tiny deviation."""
    rewards = torch.full((2, 3), 0.1, dtype=dtype)
    assert group_advantages(rewards, baseline).abs().max() == 0
    if baseline != "batch":
        rewards[1] = 0.7
        assert group_advantages(rewards, baseline).abs().max() == 0


@pytest.mark.parametrize("baseline", ["group", "center", "leave_one_out"])
def test_a_reward_that_is_missing_counts_for_nothing(baseline):
    rewards = torch.tensor([[1.0, math.nan, 0.0, 5.0], [math.nan, 2.0, math.nan, math.nan]])
    got = group_advantages(rewards, baseline)
    want = group_advantages(torch.tensor([[1.0, 0.0, 5.0]]), baseline)
    assert (got[0, [0, 2, 3]] - want[0]).abs().max() < 1e-12
    assert got[0, 1] == 0 and (got[1] == 0).all()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0)])
def test_gae_against_brute_force(gamma, lam):
    """The sum over all later steps, with a hole in the mask where a tool spoke."""
    g = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(3, 6, generator=g), torch.randn(3, 6, generator=g)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]]).bool()
    got = gae(torch.where(mask, rewards, math.nan), torch.where(mask, values, math.nan), mask, gamma=gamma, lam=lam)
    for b in range(3):
        steps = mask[b].nonzero().flatten().tolist()
        v = [values[b, t].item() for t in steps] + [0.0]
        delta = [rewards[b, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(steps)]
        for i, t in enumerate(steps):
            want = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(steps)))
            assert abs(got[b, t] - want) < 1e-12
    assert (got[~mask] == 0).all()


def test_overlong_penalty():
    lengths = torch.tensor([0, 80, 90, 100, 200])
    assert overlong_penalty(lengths, max_tokens=100, buffer=20).tolist() == [0, 0, -0.5, -1, -1]


def test_clip_higher_lets_a_rare_token_grow_further():
    logps, old = torch.tensor([[math.log(1.27)]]), torch.zeros(1, 1)
    mask, advantage = torch.ones(1, 1, dtype=torch.bool), torch.ones(1)
    is_clipped = {name: bool(grpo(logps, old, advantage, mask, method=METHODS[name])[1]) for name in ("grpo", "dapo")}
    assert is_clipped == {"grpo": True, "dapo": False}
    assert not grpo(logps, old, advantage, mask, method=replace(METHODS["grpo"], clip_high=0.3))[1]
