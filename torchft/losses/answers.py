"""Log-probabilities of answers as a head of ``Decoder.forward``, and the losses that preference training makes of them.

``answers``: what a batch says of its answers: labels, positions, count (of documents), documents_of.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchft.losses.chunked import Project
from torchft.losses.documents import answer_lengths, desensitised, document_sums
from torchft.losses.likelihood import token_collision_logps, token_logps
from torchft.losses.preference import chosen_nll, wpo_weights
from torchft.token_shards import WHOLE_ROWS, TokenShards

ARGUMENTS = (  # what a preference loss may take
    "policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps",
    "chosen_lengths", "rejected_lengths", "policy_logps", "reference_logps", "is_desirable", "kl",
)  # fmt: skip


class Judged(NamedTuple):
    """Samples of one batch: pairs, or single answers."""

    losses: Tensor  # [samples]
    rewards: Tensor  # [samples, 1 or 2]: of pairs the chosen answer's, then the rejected one's
    logps: Tensor  # [samples, 1 or 2]


def answer_logps(
    hidden: Tensor,
    project: Project,
    *,
    labels: Tensor,
    positions: Tensor | None,
    count: int,
    documents_of: Tensor,
    shards: TokenShards = WHOLE_ROWS,
    ld_alpha: float | None = None,
    collisions: bool = False,
) -> Tensor:
    """A head: log p of each sample's answers, [samples, 1 or 2] fp32 in nats.

    ``shards``: of the rows, which tokens' hidden states these are; ranks that share rows all get their answers.
    ``ld_alpha``: of pairs, `desensitised` by it. ``collisions``: [2, samples, 2], besides the sums of log sum p^2 over
    the answers' tokens, without gradient.
    """
    own = shards.own(labels)
    logps = shards.whole(token_logps(hidden, project, labels=own))
    if ld_alpha is not None:
        assert positions is not None, "rows of pairs have positions"
        logps = desensitised(logps, labels, positions, count, documents_of, alpha=ld_alpha)
    sums = document_sums(logps, positions, count)[documents_of]
    if not collisions:
        return sums
    collided = shards.whole(token_collision_logps(hidden, project, labels=own))
    return torch.stack([sums, document_sums(collided, positions, count)[documents_of]])


def judge_pairs(
    loss: Callable[..., tuple[Tensor, Tensor, Tensor]],
    policy: Tensor,
    reference: Tensor,
    *,
    labels: Tensor,
    positions: Tensor | None,
    count: int,
    documents_of: Tensor,
    rpo_alpha: float = 0.0,
) -> Judged:
    """``loss`` of what `answer_logps` gave for both models, [samples, 2] each. Policy values with collisions, [2,
    samples, 2], are weighted as in WPO. ``rpo_alpha``: weight of the chosen answer's NLL per token."""
    logps, *collisions = policy if policy.ndim == 3 else (policy,)
    lengths = answer_lengths(labels, positions, count)[documents_of]
    losses, *rewards = loss(
        policy_chosen_logps=logps[:, 0],
        policy_rejected_logps=logps[:, 1],
        reference_chosen_logps=reference[:, 0],
        reference_rejected_logps=reference[:, 1],
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
    )
    if rpo_alpha:
        losses = losses + rpo_alpha * chosen_nll(logps[:, 0], lengths[:, 0])
    if collisions:
        losses = losses * wpo_weights(logps, collisions[0], lengths)
    return Judged(losses, torch.stack(rewards, dim=1), logps)


def judge_singles(
    loss: Callable[..., tuple[Tensor, Tensor]], policy: Tensor, reference: Tensor, **others: Any
) -> Judged:
    """``loss`` of what `answer_logps` gave for both models, [samples, 1] each, and ``others``: is_desirable, kl."""
    losses, rewards = loss(policy_logps=policy[:, 0], reference_logps=reference[:, 0], **others)
    return Judged(losses, rewards[:, None], policy)
