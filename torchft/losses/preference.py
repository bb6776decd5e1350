"""Losses on pairs of answers, one preferred, from the log-probabilities of whole answers; `kto` on single answers.

Each gives (losses [b], chosen_rewards [b], rejected_rewards [b]) in the inputs' dtype; the rewards carry no gradient.
``..._logps`` [b] are sums over an answer's tokens, in nats. Losses that are defined on means per token take
``..._lengths`` [b], in tokens, and divide by them; without lengths the log-probabilities are means already.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchft.errors import UserError

Result = tuple[Tensor, Tensor, Tensor]


def dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Result:
    """-log sigmoid(beta x margin of the log-ratios): https://arxiv.org/abs/2305.18290.

    ``label_smoothing``: the probability that a label is flipped, which bounds the margin (conservative DPO,
    https://ericmitchell.ai/cdpo.pdf).
    """
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    return _logistic(chosen - rejected, label_smoothing), chosen.detach(), rejected.detach()


def dpo_normalised(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Result:
    """`dpo` of log-ratios per token, so that long answers weigh no more; beta is larger then (5 in Tulu 3,
    https://arxiv.org/abs/2411.15124)."""
    chosen = beta * _mean(policy_chosen_logps - reference_chosen_logps, chosen_lengths)
    rejected = beta * _mean(policy_rejected_logps - reference_rejected_logps, rejected_lengths)
    return _logistic(chosen - rejected, label_smoothing), chosen.detach(), rejected.detach()


def robust(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Result:
    """`dpo` made unbiased for labels of which a share ``label_smoothing`` < 0.5 is flipped:
    https://arxiv.org/abs/2403.00409. Single losses may be negative."""
    if not 0 <= label_smoothing < 0.5:
        raise UserError(
            f"label_smoothing: {label_smoothing} must be at least 0 and below 0.5, where labels say nothing"
        )
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    margin = chosen - rejected
    losses = label_smoothing * F.logsigmoid(-margin) - (1 - label_smoothing) * F.logsigmoid(margin)
    return losses / (1 - 2 * label_smoothing), chosen.detach(), rejected.detach()


def ipo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Result:
    """(margin of the log-ratios per token - 1 / (2 beta))^2: https://arxiv.org/abs/2310.12036.

    The paper leaves the length open; its authors' own results are of means per token.
    """
    chosen = _mean(policy_chosen_logps - reference_chosen_logps, chosen_lengths)
    rejected = _mean(policy_rejected_logps - reference_rejected_logps, rejected_lengths)
    losses = (chosen - rejected - 1 / (2 * beta)).square()
    return losses, beta * chosen.detach(), beta * rejected.detach()


def hinge(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Result:
    """max(0, 1 - beta x margin of the log-ratios): https://arxiv.org/abs/2309.06657.

    It is SLiC's rank calibration (https://arxiv.org/abs/2305.10425) with margin 1 / beta, where the reference
    gives both answers the same probability.
    """
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    return torch.relu(1 - (chosen - rejected)), chosen.detach(), rejected.detach()


def nca(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Result:
    """Noise-contrastive: the chosen answer's own likelihood must not fall: https://arxiv.org/abs/2402.05369."""
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))
    return losses, chosen.detach(), rejected.detach()


def bco(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    delta: float = 0.0,
) -> Result:
    """A classifier of good and bad answers by reward: https://arxiv.org/abs/2404.04656.

    ``delta``: the reward that is neither; the paper moves it with the mean of all rewards.
    """
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    losses = -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)
    return losses, chosen.detach(), rejected.detach()


def simpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Result:
    """-log sigmoid(beta x margin of the log-probabilities per token - gamma), without a reference:
    https://arxiv.org/abs/2405.14734."""
    chosen = beta * _mean(policy_chosen_logps, chosen_lengths)
    rejected = beta * _mean(policy_rejected_logps, rejected_lengths)
    return _logistic(chosen - rejected - gamma, label_smoothing), chosen.detach(), rejected.detach()


def cpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float,
    nll_weight: float = 1.0,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
) -> Result:
    """-log sigmoid(beta x margin of the log-probabilities) + ``nll_weight`` x NLL of the chosen answer, without a
    reference: https://arxiv.org/abs/2401.08417.

    The margin is of sums; the NLL is per token where ``chosen_lengths`` are given, of the whole answer otherwise.
    """
    chosen, rejected = beta * policy_chosen_logps, beta * policy_rejected_logps
    losses = _logistic(chosen - rejected, label_smoothing) - nll_weight * _mean(policy_chosen_logps, chosen_lengths)
    return losses, chosen.detach(), rejected.detach()


def orpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    beta: float,
    nll_weight: float = 1.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Result:
    """``nll_weight`` x NLL of the chosen answer per token - beta log sigmoid(log odds ratio), without a reference:
    https://arxiv.org/abs/2403.07691 (beta is its lambda).

    The odds are those of the geometric mean of an answer's token probabilities, p / (1 - p).
    """
    chosen = _mean(policy_chosen_logps, chosen_lengths)
    rejected = _mean(policy_rejected_logps, rejected_lengths)
    log_odds_ratio = chosen - rejected - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))
    losses = -nll_weight * chosen - beta * F.logsigmoid(log_odds_ratio)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def kto(
    policy_logps: Tensor,
    reference_logps: Tensor,
    is_desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """weight x (1 - sigmoid(+-beta (log-ratio - kl))) of single answers: https://arxiv.org/abs/2402.01306.

    Gives (losses [b], rewards [b]). ``is_desirable`` [b] bool. ``kl``: an estimate of KL(policy || reference), at
    least 0, in nats; no gradient goes through it.
    """
    rewards = beta * (policy_logps - reference_logps)
    kl = kl.detach() if isinstance(kl, Tensor) else kl
    good = is_desirable.to(rewards.dtype)
    sign, weight = 2 * good - 1, good * desirable_weight + (1 - good) * undesirable_weight
    return weight * torch.sigmoid(sign * (beta * kl - rewards)), rewards.detach()


def chosen_nll(policy_chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Negative log-likelihood of the chosen answer per token, [b]: the term that RPO adds to `dpo`, so that its
    likelihood does not fall with the rejected one's (https://arxiv.org/abs/2404.19733)."""
    return -policy_chosen_logps / chosen_lengths


def wpo_weights(logps: Tensor, collision_logps: Tensor, lengths: Tensor) -> Tensor:
    """How much each pair looks like the policy's own work, [p], to weight its loss: https://arxiv.org/abs/2406.11827.

    exp of the mean over an answer's tokens of log p - log sum p^2, one answer times the other. ``logps`` and
    ``collision_logps`` [p, 2]: sums over the answers' tokens, of ``lengths`` [p, 2]. No gradient.
    """
    return ((logps - collision_logps).detach() / lengths).sum(1).exp()


def _logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(margin) with a share ``label_smoothing`` of the opposite label."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def _mean(logps: Tensor, lengths: Tensor | None) -> Tensor:
    return logps if lengths is None else logps / lengths
