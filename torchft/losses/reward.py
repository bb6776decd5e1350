"""Losses of reward models: `bradley_terry` on pairs of answers, `regression` on scores, `steps` on reasoning; and the
head that reads scores where a document is judged."""

import torch.nn.functional as F
from torch import Tensor, nn

from torchft.losses.likelihood import IGNORE
from torchft.token_shards import WHOLE_ROWS, TokenShards

ARGUMENTS = ("chosen_scores", "rejected_scores", "margins", "scores", "targets", "step_scores", "labels")


def scores_at(
    hidden: Tensor,
    project: object,
    *,
    score: nn.Module,
    labels: Tensor,
    count: int,
    shards: TokenShards = WHOLE_ROWS,
) -> Tensor:
    """A head: ``score`` of the hidden states at the ``count`` places of ``labels`` [b, s] that are not -100, [n, k].

    In reading order. ``project``, which would give logits of words, is not used. ``shards``: of the rows of ``labels``,
    which tokens' hidden states these are; ranks that share rows all get their scores.
    """
    places = (labels != IGNORE).flatten().nonzero_static(size=count).squeeze(1)
    return score(shards.whole(hidden).flatten(0, 1).index_select(0, places))


def bradley_terry(
    chosen_scores: Tensor, rejected_scores: Tensor, margins: Tensor | None = None, *, centering: float = 0.0
) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) + ``centering`` x (chosen + rejected)^2, [p].

    ``margins`` [p]: by how much the chosen answer is better (Llama 2, https://arxiv.org/abs/2307.09288). ``centering``
    keeps scores around 0, which the first term does not (https://arxiv.org/abs/2312.09244).
    """
    difference = chosen_scores - rejected_scores
    losses = -F.logsigmoid(difference if margins is None else difference - margins)
    return losses + centering * (chosen_scores + rejected_scores).square() if centering else losses


def regression(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of several objectives, [n, k] -> [n] (SteerLM, https://arxiv.org/abs/2311.09528)."""
    return (scores - targets).square().mean(1)


def steps(step_scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each step's label, 1 right, 0 wrong: [n, 2] -> [n] (https://arxiv.org/abs/2305.20050)."""
    return F.cross_entropy(step_scores, labels, reduction="none")
