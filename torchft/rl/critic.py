"""PPO's critic, a linear layer on the policy's trunk, and the advantages that its values give."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchft.losses.likelihood import token_logps
from torchft.losses.policy import gae, kl
from torchft.modules.decoder import Decoder, Project
from torchft.rl.batch import Rows
from torchft.rl.whole_rows import token_values
from torchft.training.distributed import World


class Judged(NamedTuple):
    """Of each token, at the place before it; [b, s] fp32 each."""

    logps: Tensor
    entropy: Tensor
    values: Tensor  # what the critic expects of the rest, this token included


class Estimate(NamedTuple):
    advantages: Tensor  # [b, s], of mean 0 and deviation 1 over all that was chosen
    returns: Tensor  # [b, s], what the critic should have said


def make_critic(dim: int, *, device: torch.device) -> nn.Linear:
    """Hidden states [..., d] -> values [..., 1], fp32, 0 before it has learned."""
    critic = nn.Linear(dim, 1, device=device)
    nn.init.zeros_(critic.weight)
    nn.init.zeros_(critic.bias)
    return critic


def judge(hidden: Tensor, project: Project, *, labels: Tensor, temperature: float, critic: nn.Module) -> Judged:
    """A head for `Decoder.forward`."""
    logps, entropy = token_logps(hidden, project, labels=labels, temperature=temperature, entropy=True)
    return Judged(logps, entropy, critic(hidden.float()).squeeze(-1))


def judge_rows(model: Decoder, batch: Rows, *, temperature: float, critic: nn.Module) -> Judged:
    """What ``model`` and ``critic`` say of each token of ``batch``."""
    head = partial(judge, temperature=temperature, critic=critic)
    return Judged(*token_values(model, batch.tokens, batch.labels, head))


def token_rewards(scores: Tensor, mask: Tensor, penalty: Tensor) -> Tensor:
    """-``penalty`` [b, s] at each chosen token, and ``scores`` [b] at the last one; 0 outside ``mask``."""
    index = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, index, -1).amax(-1, keepdim=True)
    return torch.where(mask, (index == last) * scores[:, None] - penalty, 0.0)


def estimate(
    batches: Sequence[Sequence[Rows]],
    before: Sequence[Sequence[Judged]],
    reference: Sequence[Sequence[Tensor]] | None,
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
    world: World,
) -> list[list[Estimate]]:
    """All ranks: advantages and returns of a rollout, by the critic as it was ``before``; advantages are made alike in
    size over the tokens of all ranks."""
    raw = []
    for i, part in enumerate(batches):
        for j, batch in enumerate(part):
            known, mask = before[i][j], batch.mask
            penalty = torch.zeros_like(known.values)
            if reference is not None:
                penalty = kl_coef * kl(known.logps, reference[i][j], "k1")
            rewards = token_rewards(batch.scores, mask, penalty)
            raw.append((gae(rewards, known.values, mask, gamma=gamma, lam=lam), known.values, mask))
    sums = [torch.stack((m.sum(), a.sum(), a.square().sum())).double() for a, _, m in raw]
    n, total, squares = world.sum(torch.stack(sums).sum(0)).unbind()
    mean = total / n.clamp_min(1)
    std = (squares / n.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
    found = [
        Estimate(torch.where(m, (a - mean) / (std + 1e-8), 0.0).float(), torch.where(m, a + v, 0.0)) for a, v, m in raw
    ]
    pending = iter(found)
    return [[next(pending) for _ in part] for part in batches]
