"""What reinforcement learning reports: rewards, lengths, and how far policy, engine and reference are apart."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchft.files import atomic_write
from torchft.losses.policy import kl
from torchft.ranks import gather, is_main
from torchft.rl.batch import Rows
from torchft.rl.rollout import Episode
from torchft.rl.scoring import Scores
from torchft.training.distributed import World
from torchft.training.metrics import Row

NAMES = ("entropy", "clipped", "capped", "kl", "mismatch_kl", "value_error")  # means per token
SHOWN = 4  # episodes of a step in samples.jsonl


class Curves:
    """Collects the updates of one rollout."""

    def __init__(self, world: World, *, importance_cap: float | None = None) -> None:
        """``importance_cap``: of `truncated_weights`, to report how often it holds."""
        self._world, self._cap = world, importance_cap
        self._sums = torch.zeros(len(NAMES), dtype=torch.float64, device=world.device)
        self._counts = torch.zeros_like(self._sums)

    @torch.no_grad()
    def add(
        self,
        batch: Rows,
        logps: Tensor,
        *,
        entropy: Tensor,
        clipped: Tensor,
        before: Tensor,
        reference: Tensor | None,
        value_error: Tensor | None = None,
    ) -> None:
        """A micro-step; [b, s] each. ``before``: the trainer's log-probabilities with the weights that generated."""
        mask = batch.mask
        values = {"entropy": entropy, "clipped": clipped.float(), "mismatch_kl": kl(batch.sampler_logps, before)}
        if self._cap is not None:
            values["capped"] = (before - batch.sampler_logps > math.log(self._cap)).float()
        if reference is not None:
            values["kl"] = kl(logps, reference)
        if value_error is not None:
            values["value_error"] = value_error
        for i, name in enumerate(NAMES):
            if name in values:
                self._sums[i] += torch.where(mask, values[name], 0.0).sum()
                self._counts[i] += mask.sum()

    def row(self) -> Row:
        """All ranks: means over the tokens of all. ``mismatch_kl``: KL(engine || trainer) at the same weights, nats
        per token."""
        sums, counts = self._world.sum(torch.stack((self._sums, self._counts))).tolist()
        return {name: s / n for name, s, n in zip(NAMES, sums, counts) if n}


def rollout_row(
    episodes: Sequence[Episode], scores: Scores, *, group_size: int, copies: int = 1, prefix: str = ""
) -> Row:
    """All ranks: of all their episodes, of which every ``copies`` neighbours have the same ones. Rewards are means of
    those that are known; ``groups_equal`` is the share of groups without a difference, which teach nothing."""
    totals = scores.total.view(-1, group_size)
    is_equal = totals.eq(totals[:, :1]).all(1) | (totals.isnan().sum(1) >= group_size - 1)
    sums = Counter[str](episodes=len(episodes), groups=len(totals), equal=int(is_equal.sum()))
    for name, values in ({"reward": scores.total} | {f"reward/{n}": v for n, v in scores.by_reward.items()}).items():
        sums[name] = float(values[~values.isnan()].sum())  # type: ignore[assignment]  # a Counter adds floats, too
        sums[f"known {name}"] += int((~values.isnan()).sum())
    for episode in episodes:
        sums["response_tokens"] += episode.num_chosen
        sums["turns"] += episode.num_turns
        sums[f"ended/{episode.finish}"] += 1
    for name, count in scores.num_failed.items():
        sums[f"rewards_failed/{name}"] += count
    total = Counter[str]()
    for own in gather(dict(sums))[::copies]:
        total.update(own)  # where + would drop what is not above 0
    row: Row = {n: total[n] / total[f"known {n}"] for n in sums if f"known {n}" in sums and total[f"known {n}"]}
    row |= {n: total[n] / total["episodes"] for n in ("response_tokens", "turns")}
    row |= {n: total[n] / total["episodes"] for n in sorted(total) if n.startswith("ended/") and n != "ended/stop"}
    row |= {"groups_equal": total["equal"] / total["groups"]} if group_size > 1 else {}
    row |= {n: total[n] for n in sorted(total) if n.startswith("rewards_failed/") and total[n]}
    return {f"{prefix}{name}": value for name, value in row.items()}


def write_samples(path: Path, step: int, episodes: Sequence[Episode], scores: Scores) -> None:
    """Appends the first episodes of a step, to read what the model says; of several ranks the main one's."""
    if not is_main():
        return
    with open(path, "a", encoding="utf-8") as f:
        for i, episode in enumerate(episodes[:SHOWN]):
            row = {"step": step, "messages": episode.messages, "reward": _number(scores.total[i])}
            row |= {name: _number(values[i]) for name, values in scores.by_reward.items()}
            row |= {"finish": episode.finish, "wanted": episode.prompt.answer}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def cut_samples(path: Path, *, resume_step: int) -> None:
    """Removes the episodes of steps after ``resume_step``, which are to be taken again."""
    if not is_main() or not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):  # of bytes: at line feeds alone
        try:
            if json.loads(line)["step"] <= resume_step:
                kept.append(line)
        except ValueError:  # a line that a killed process did not finish
            continue
    atomic_write(path, b"".join(kept))


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
