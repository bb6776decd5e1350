"""What preference training reports: losses, rewards, and how often the preferred answer wins."""

import torch
from torch import Tensor

from torchft.training.distributed import World
from torchft.training.metrics import Row


class Rewards:
    """Collects samples, pairs or single answers, and turns them into columns of a row of metrics.jsonl."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums = torch.zeros(8, dtype=torch.float64, device=world.device)

    @torch.no_grad()
    def add(self, losses: Tensor, rewards: Tensor, logps: Tensor, is_good: Tensor | None = None) -> None:
        """Samples of this rank: ``losses`` [p]; ``rewards`` and ``logps`` of their answers, of pairs [p, 2], chosen and
        rejected, of single ones [p, 1] with ``is_good`` [p, 1] bool."""
        zero = losses.new_zeros(())
        if is_good is None:
            good, bad = rewards[:, 0], rewards[:, 1]
            values = [good.sum(), good.new_tensor(len(good)), bad.sum(), bad.new_tensor(len(bad))]
            values += [bad.new_tensor(len(good)), (good > bad).sum(), (logps[:, 0] > logps[:, 1]).sum()]
        else:
            good, bad = rewards.where(is_good, 0.0), rewards.where(~is_good, 0.0)
            values = [good.sum(), is_good.sum(), bad.sum(), (~is_good).sum(), zero, zero, zero]
        self._sums += torch.stack([value.double() for value in (losses.sum(), *values)])

    def row(self, *, prefix: str = "", with_loss: bool = False) -> Row:
        """The means since the last row; waits for the device. All ranks call it, and get those of all.

        ``accuracy`` is the share of pairs whose chosen answer has the higher reward, ``preferred`` of those where it is
        the likelier one.
        """
        loss, good, num_good, bad, num_bad, pairs, right, preferred = self._world.sum(self._sums).tolist()
        self._sums.zero_()
        row: Row = {"loss": loss / (pairs or num_good + num_bad)} if with_loss else {}
        row |= {"rewards_chosen": good / num_good} if num_good else {}
        row |= {"rewards_rejected": bad / num_bad} if num_bad else {}
        row |= {"margin": good / num_good - bad / num_bad} if num_good and num_bad else {}
        row |= {"accuracy": right / pairs, "preferred": preferred / pairs} if pairs else {}
        return {f"{prefix}{name}": value for name, value in row.items()}
