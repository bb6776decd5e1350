"""Policy-gradient losses: PPO, GRPO and its relatives, REINFORCE. Plain functions of log-probabilities.

b completions, s tokens of the longest, in nats. ``mask`` [b, s] bool: the tokens that the policy chose. ``old_logps``
are those of the policy that the update started from.

An objective gives a loss per token, ``token_weights`` what each counts for. Weights come from the *global* batch, so
that their sum over micro-steps and ranks is the loss of all, however it was divided:

    losses, clipped = grpo(logps, old_logps, advantages, mask, method=METHODS["dapo"])
    loss = (token_weights(mask, "token", totals) * losses).sum()
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Normalizer = Literal["sequence", "token", "constant"]
Baseline = Literal["group", "center", "leave_one_out", "batch", "center_batch"]
EPS = 1e-4  # added to standard deviations


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What the loss is divided by, counted over the global batch."""

    sequences: int  # that have an advantage
    tokens: int  # that the policy chose, in these
    max_tokens: int  # of one completion: the limit, not the longest


@dataclass(frozen=True, kw_only=True)
class Method:
    """One published method: how advantages are made of rewards, which ratio is clipped how, what divides the sum."""

    advantages: Baseline
    objective: Literal["token", "sequence", "product", "cispo"]  # a ratio for each token; for each completion: the
    # geometric mean of its tokens', or their product; a ratio for each token that is clipped as a constant
    normalizer: Normalizer
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __str__(self) -> str:
        bounds = f"{1 - self.clip_low:g} to {1 + self.clip_high:g}"
        return f"advantages by {self.advantages}, ratios by {self.objective}, {bounds}, mean by {self.normalizer}"


METHODS = {
    "grpo": Method(advantages="group", objective="token", normalizer="sequence"),  # https://arxiv.org/abs/2402.03300
    "dr_grpo": Method(advantages="center", objective="token", normalizer="constant"),  # 2503.20783
    "dapo": Method(advantages="group", objective="token", normalizer="token", clip_high=0.28),  # 2503.14476
    "gspo": Method(  # 2507.18071, section 5.1
        advantages="group", objective="sequence", normalizer="sequence", clip_low=3e-4, clip_high=4e-4
    ),
    "cispo": Method(  # 2506.13585: no lower bound
        advantages="group", objective="cispo", normalizer="token", clip_low=1.0, clip_high=4.0
    ),
    "rloo": Method(advantages="leave_one_out", objective="product", normalizer="sequence"),  # 2402.14740
    "reinforce_pp": Method(advantages="batch", objective="token", normalizer="token"),  # 2501.03262
    "reinforce_pp_baseline": Method(advantages="center_batch", objective="token", normalizer="token"),
}


def ppo(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(logps - old_logps), and where the bound is active; [b, s].

    ``advantages`` [b, s], or [b, 1] where all of a completion is judged at once. https://arxiv.org/abs/1707.06347;
    unequal bounds ("clip higher"): https://arxiv.org/abs/2503.14476.
    """
    return _clipped(logps - old_logps, advantages, clip_low, clip_high)


def cispo(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-clip(r, 1 - low, 1 + high) A log p, the clipped ratio a constant: no token loses its gradient. [b, s] each."""
    ratio = (logps - old_logps).detach().exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -clipped * advantages * logps, ratio != clipped


def grpo(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, method: Method
) -> tuple[Tensor, Tensor]:
    """Each token's loss under ``method`` and whether its bound is active, [b, s] each, 0 outside ``mask``.

    ``advantages`` [b]. What is left to do: ``token_weights(mask, method.normalizer, totals)``.
    """
    logps, old_logps = torch.where(mask, logps, 0.0), torch.where(mask, old_logps, 0.0)  # no NaN comes back, either
    log_ratio = logps - old_logps
    if method.objective == "cispo":
        losses, clipped = cispo(
            logps, old_logps, advantages[:, None], clip_low=method.clip_low, clip_high=method.clip_high
        )
    else:
        if method.objective != "token":  # one ratio per completion
            log_ratio = log_ratio.sum(-1, keepdim=True)
        if method.objective == "sequence":
            log_ratio = log_ratio / mask.sum(-1, keepdim=True).clamp_min(1)
        losses, clipped = _clipped(log_ratio, advantages[:, None], method.clip_low, method.clip_high)
    return torch.where(mask, losses, 0.0), clipped & mask


def token_weights(mask: Tensor, normalizer: Normalizer, totals: Totals) -> Tensor:
    """What each token's loss counts for, [b, s], 0 outside ``mask``.

    sequence: each completion alike, its tokens sharing (GRPO). token: each token alike (DAPO). constant: each token
    alike, and divided by the limit on a completion's tokens instead of their number (Dr. GRPO).
    """
    if normalizer == "token":
        return mask / max(totals.tokens, 1)
    sequences = max(totals.sequences, 1)
    if normalizer == "constant":
        return mask / (sequences * totals.max_tokens)
    return mask / (sequences * mask.sum(-1, keepdim=True).clamp_min(1))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2) -> Tensor:
    """max((v - R)^2, (v clipped to old +- ``clip`` - R)^2) / 2, [b, s]."""
    loss = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - returns).square())
    return loss / 2


def kl(logps: Tensor, reference_logps: Tensor, estimator: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """Estimates of KL(policy || reference) from tokens of the policy, [b, s] (http://joschu.net/blog/kl-approx.html).

    k1: log(p / q), unbiased, its expected gradient 0. k2: half its square, with the right gradient on policy. k3:
    q / p - 1 - log(q / p): never negative, unbiased.
    """
    difference = reference_logps - logps
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return difference.expm1() - difference


def truncated_weights(
    trainer_logps: Tensor, sampler_logps: Tensor, mask: Tensor, *, cap: float, whole_sequence: bool = False
) -> Tensor:
    """min(p_trainer / p_sampler, cap), [b, s] or, of a completion's product, [b, 1]: what corrects for an engine that
    samples from slightly other probabilities than training computes (https://fengyao.notion.site/off-policy-rl).
    """
    log_ratio = torch.where(mask, trainer_logps - sampler_logps, 0.0).detach()
    if whole_sequence:
        log_ratio = log_ratio.sum(-1, keepdim=True)
    return log_ratio.exp().clamp_max(cap)


def group_advantages(rewards: Tensor, baseline: Baseline = "group") -> Tensor:
    """Rewards [groups, g] -> advantages, fp64 in between. A reward that is NaN counts for nothing and gets 0.

    group: (r - mean) / std of its group. center: r - mean. leave_one_out: r - mean of the others. batch: (r - mean) /
    std of all. center_batch: r - mean of its group, over the std of all of these. Standard deviations are of samples
    (n - 1), plus 1e-4. Where rewards are all equal, of a group or for "batch" of the batch, all are exactly 0.
    """
    known = ~rewards.isnan()
    r = torch.where(known, rewards.double(), 0.0)
    if baseline == "batch":
        return _centered(r.view(1, -1), known.view(1, -1), scaled=True).view_as(r).to(rewards.dtype)
    centered = _centered(r, known, scaled=baseline == "group")
    if baseline == "leave_one_out":
        n = known.sum(-1, keepdim=True)
        centered = centered * n / (n - 1).clamp_min(1)
    elif baseline == "center_batch":
        variance = centered.square().sum() / (known.sum() - 1).clamp_min(1)
        centered = centered / (variance.sqrt() + EPS)
    return centered.to(rewards.dtype)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """Generalised advantages [b, s]: A_t = d_t + gamma lam A_t+1, d_t = r_t + gamma V_t+1 - V_t; 0 outside ``mask``.

    Time runs over the tokens in ``mask`` alone: what a tool says between two of them is no step. The value after the
    last is 0. The critic's target is A + V. https://arxiv.org/abs/1506.02438
    """
    values, rewards = torch.where(mask, values, 0.0), torch.where(mask, rewards, 0.0)
    following, advantage = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    out = torch.zeros_like(values)
    for t in range(values.shape[1] - 1, -1, -1):
        step = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        out[:, t] = torch.where(mask[:, t], step, 0.0)
        advantage = torch.where(mask[:, t], step, advantage)
        following = torch.where(mask[:, t], values[:, t], following)
    return out


def overlong_penalty(lengths: Tensor, *, max_tokens: int, buffer: int) -> Tensor:
    """0 up to max_tokens - buffer, then falling in a line to -1 at max_tokens, [b] fp32 (DAPO, section 3.4)."""
    return -((lengths.float() - (max_tokens - buffer)) / buffer).clamp(0.0, 1.0)


def _clipped(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    ratio = log_ratio.exp()
    plain, bounded = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(plain, bounded), bounded < plain


def _centered(r: Tensor, known: Tensor, *, scaled: bool) -> Tensor:
    """r [rows, n] minus the mean of each row's ``known``, over their standard deviation; 0 where none or all equal."""
    n = known.sum(-1, keepdim=True)
    mean = r.sum(-1, keepdim=True) / n.clamp_min(1)
    centered = torch.where(known, r - mean, 0.0)
    if scaled:
        variance = centered.square().sum(-1, keepdim=True) / (n - 1).clamp_min(1)
        centered = centered / (variance.sqrt() + EPS)
    highest = torch.where(known, r, -torch.inf).amax(-1, keepdim=True)
    lowest = torch.where(known, r, torch.inf).amin(-1, keepdim=True)
    return torch.where(highest > lowest, centered, 0.0)
