"""Losses of scores that documents get: `bradley_terry` and `margin` on pairs, `listwise` on candidates, `regression` on
numbers, `cross_entropy` and `binary_cross_entropy` on labels, `steps` on reasoning; and the heads that read scores."""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from torchft.losses.contrastive import pooled
from torchft.losses.likelihood import IGNORE
from torchft.token_shards import WHOLE_ROWS, TokenShards

ARGUMENTS = (
    "chosen_scores", "rejected_scores", "margins", "candidate_scores", "scores", "class_scores", "yes_scores",
    "targets", "step_scores", "labels",
)  # fmt: skip


class Kind(NamedTuple):
    """What goes with one of the arguments by which a loss takes scores."""

    data: str  # of data/preferences.py
    reports: tuple[str, ...]
    problem: str | None = None  # transformers' word for what the scores are


KINDS = {
    "step_scores": Kind("stepwise", ("loss", "accuracy")),
    "chosen_scores": Kind("pairs", ("loss", "accuracy", "margin", "score")),
    "candidate_scores": Kind("candidates", ("loss", "accuracy", "mrr")),
    "class_scores": Kind("classes", ("loss", "accuracy"), "single_label_classification"),
    "yes_scores": Kind("scored", ("loss", "accuracy", "score"), "multi_label_classification"),
    "scores": Kind("scored", ("loss", "score"), "regression"),
}


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


def document_scores(hidden: Tensor, project: object, *, score: nn.Module, **reading: Any) -> Tensor:
    """A head: ``score`` of the samples' documents as `pooled`, which takes ``reading``, reads them; [samples, n, k]."""
    scores: Tensor = score(pooled(hidden, project, **reading))
    return scores


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


def margin(
    chosen_scores: Tensor, rejected_scores: Tensor, margins: Tensor | None = None, *, margin: float = 1.0
) -> Tensor:
    """max(0, ``margin`` - (chosen - rejected)), [p]; ``margins`` [p] in place of ``margin`` where the data has them."""
    return F.relu((margin if margins is None else margins) - (chosen_scores - rejected_scores))


def listwise(candidate_scores: Tensor) -> Tensor:
    """-log softmax over a query's candidates at the first, the right one: [n, c] -> [n]. Of two it is `bradley_terry`.

    Cross-encoders trained so: https://arxiv.org/abs/2101.08751.
    """
    return -candidate_scores.log_softmax(1)[:, 0]


def cross_entropy(class_scores: Tensor, targets: Tensor) -> Tensor:
    """-sum targets log softmax(scores), [n, k] -> [n]; a row's ``targets`` are 1 for its label, else 0."""
    return F.cross_entropy(class_scores, targets, reduction="none")


def binary_cross_entropy(yes_scores: Tensor, targets: Tensor) -> Tensor:
    """Mean of -t log sigmoid(score) - (1 - t) log sigmoid(-score) over ``targets`` t from 0 to 1, [n, k] -> [n]."""
    return F.binary_cross_entropy_with_logits(yes_scores, targets, reduction="none").mean(1)


def regression(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of several objectives, [n, k] -> [n] (SteerLM, https://arxiv.org/abs/2311.09528)."""
    return (scores - targets).square().mean(1)


def steps(step_scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each step's label, 1 right, 0 wrong: [n, 2] -> [n] (https://arxiv.org/abs/2305.20050)."""
    return F.cross_entropy(step_scores, labels, reduction="none")
