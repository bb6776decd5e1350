"""A step's episodes, for one process and for ranks that share the work in every way."""

import os

import pytest
import torch
from processes import run_ranks

from torchft import registry, shipped
from torchft.config import Component
from torchft.data.prompts import Prompt
from torchft.errors import UserError
from torchft.generation.loaded import load
from torchft.generation.sampling import Sampling
from torchft.rl.collect import RolloutConfig, Rollouts
from torchft.rl.curves import rollout_row
from torchft.rl.environments import Calculator
from torchft.rl.scoring import RewardConfig
from torchft.training.distributed import ParallelConfig, World, init

BASE = shipped.config_path("demo/base")
PROMPTS = [
    Prompt(messages=[{"role": "user", "content": f'Repeat the word "{word}".'}], answer=word, values={}, where=word)
    for word in ("red", "blue", "green", "one", "two", "cat")
]


def steps(world, **more):
    """Two steps: (the episodes' tokens and log-probabilities, rewards, the row), and the row of held-out prompts."""
    split = {"tp_mesh": world.tp_mesh, "tokens": world.tokens}
    model, tokenizer = load(BASE, dtype=torch.float32, device=world.device, **split)
    how = {"prompts_per_step": 4, "group_size": 3, "num_slots": 4, "resample": 1} | more
    rewards = [RewardConfig(reward=Component("torchft.rl.rewards.shared_start", {}), weight=-1.0)]
    config = RolloutConfig(rewards=rewards, sampling=Sampling(temperature=3.0, max_new_tokens=8), **how)
    sizes = {"seq_len": 64, "seed": 3, "world": world}
    rollouts = Rollouts(config, model, tokenizer, PROMPTS, **sizes, publish=lambda **_: BASE)
    found = []
    for _ in range(2):
        episodes, scores = rollouts.next()
        row = rollout_row(episodes, scores, group_size=3, copies=world.tokens.count)
        found.append(([e.tokens for e in episodes], [e.logps for e in episodes], scores.total.tolist(), row))
    return found, rollouts.held_out(PROMPTS[:3])


def steps_of_rank(parallel, more):
    with init(parallel, device="cpu") as world:
        return steps(world, **more)


@pytest.mark.parametrize(("size", "parallel"), [(2, {"tp": 2}), (4, {"tp": 2, "cp": 2}), (2, {})])
def test_ranks_have_the_episodes_of_one_process(size, parallel):
    """Ranks that share rows have the same ones, others each a part."""
    more = {"resample": 0}  # which takes the next prompts rank by rank
    want, want_held = steps(World(device=torch.device("cpu")), **more)
    by_rank = run_ranks(steps_of_rank, size, ParallelConfig(**parallel), more)
    share = 1 if parallel else size
    for r, (found, held) in enumerate(by_rank):
        assert held == pytest.approx(want_held)
        for ours, theirs in zip(found, want, strict=True):
            n = 12 // share
            own = slice(r * n, (r + 1) * n) if share > 1 else slice(None)
            assert ours[0] == theirs[0][own]
            logps, known = (torch.tensor([x for row in rows for x in row]) for rows in (ours[1], theirs[1][own]))
            assert torch.allclose(logps, known, atol=1e-5)
            assert ours[2] == pytest.approx(theirs[2][own])
            assert ours[3] == pytest.approx(theirs[3])
    assert len({tuple(tokens) for tokens in want[0][0]}) > 6
    assert want_held["eval_reward"] < 0 and all(row["reward"] < 0 for *_, row in want)


def test_environments_are_refused_where_ranks_would_each_ask_their_own():
    [problem, _] = run_ranks(refused, 2)
    assert "rollout.environment" in problem and "parallel.tp" in problem


def refused():
    with init(ParallelConfig(tp=2), device="cpu") as world:
        try:
            steps(world, environment=Component("torchft.rl.environments.calculator", {}))
        except UserError as e:
            return str(e)
    return ""


def without_a_table():
    if os.environ["RANK"] == "1":
        raise UserError("no such table: calls.csv")
    return Calculator("tool")


def ended_with():
    registry.add(without_a_table, kind="environment")
    with init(ParallelConfig(), device="cpu") as world:
        try:
            steps(world, environment=Component(f"{without_a_table.__module__}.without_a_table", {}), max_turns=2)
        except UserError as e:
            return str(e)


def test_one_ranks_environment_ends_all():
    """None waits for a rank that has given up, nor takes its word for another."""
    found = run_ranks(ended_with, 2, timeout_s=60)
    assert all("no such table: calls.csv" in str(problem) for problem in found), found
