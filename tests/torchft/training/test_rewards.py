"""Columns of preference training by hand."""

import pytest
import torch

from torchft.training.distributed import World
from torchft.training.rewards import Rewards


def test_pairs():
    rewards = Rewards(World(device=torch.device("cpu")))
    rewards.add(
        torch.tensor([1.0, 2.0]), torch.tensor([[0.5, 0.1], [0.2, 0.6]]), torch.tensor([[-1.0, -2.0], [-1.0, -2.0]])
    )
    rewards.add(torch.tensor([6.0]), torch.tensor([[0.8, -0.4]]), torch.tensor([[-3.0, -2.0]]))
    rewards.add(torch.zeros(0), torch.zeros(0, 2), torch.zeros(0, 2))  # a rank without rows
    row = rewards.row(prefix="eval_", with_loss=True)
    assert row == pytest.approx({
        "eval_loss": 3.0, "eval_rewards_chosen": 0.5, "eval_rewards_rejected": 0.1, "eval_margin": 0.4,
        "eval_accuracy": 2 / 3, "eval_preferred": 2 / 3,
    })  # fmt: skip
    assert rewards.row() == {}


def test_single_answers():
    rewards = Rewards(World(device=torch.device("cpu")))
    gains, good = torch.tensor([[1.0], [2.0], [-4.0]]), torch.tensor([[True], [True], [False]])
    rewards.add(torch.tensor([1.0, 2.0, 3.0]), gains, -gains, good)
    assert rewards.row(with_loss=True) == pytest.approx(
        {"loss": 2.0, "rewards_chosen": 1.5, "rewards_rejected": -4.0, "margin": 5.5}
    )
    rewards.add(torch.tensor([1.0]), gains[:1], gains[:1], good[:1])  # only good ones
    assert rewards.row(with_loss=True) == {"loss": 1.0, "rewards_chosen": 1.0}
