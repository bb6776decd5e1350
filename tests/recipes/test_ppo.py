"""PPO from end to end on the demo's model: against transformers, divided, on ranks, resumed, and that it learns."""

from functools import partial

import pytest
import torch
from processes import run_ranks
from recipe_runs import digests, hub_model, interrupted, largest_difference, load_recipe, train, weights
from safetensors.torch import load_file

from torchft import shipped
from torchft.errors import UserError
from torchft.losses.policy import gae
from torchft.training.metrics import read_rows

CONFIG = shipped.configs()["demo/ppo"]
SMALL = [
    "max_steps=2", "rollout.prompts_per_step=12", "rollout.sampling.temperature=3.0", "~prompts_eval", "~eval_every",
    "seq_len=48", "export_dtype=fp32", "batch_size=12",
]  # fmt: skip
SGD = "optimizer={_component_: torch.optim.SGD, lr: 0.5}"
FULL = ["~lora", SGD, "clip_grad_norm=null"]
CLOCK = ("tokens_per_second", "mfu", "peak_memory_gib", "time_s", "start_to_first_step_s", "rollout_s")


@pytest.fixture
def ppo(monkeypatch):
    recipe = load_recipe("ppo")
    monkeypatch.setattr(recipe, "draw_loss", lambda *args, **kwargs: None)
    run = partial(train, recipe, CONFIG)
    return lambda folder, *overrides: run(folder, *SMALL, *overrides)


def rows(folder):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_rows(folder / "metrics.jsonl")]


def test_a_step_is_transformers_with_the_closed_form(tmp_path, monkeypatch):
    """One update on policy, the critic still at 0: the policy's gradient is -A times that of log p, and the critic's
    that of (value - return)^2 / 2; and the value's gradient reaches the trunk only once the critic is not 0."""
    recipe, seen = load_recipe("ppo"), []
    make = recipe.rows
    monkeypatch.setattr(recipe, "rows", lambda *args, **kwargs: seen.append(make(*args, **kwargs)) or seen[-1])
    options = ["max_steps=1", "passes=1", "kl_coef=0", "gamma=0.9", "lam=0.7", "value_coef=0.4"]
    run = train(recipe, CONFIG, tmp_path / "run", *SMALL, *FULL, *options)
    [batch] = seen
    model, mask = hub_model(shipped.config_path("demo/base")), batch.mask
    out = model(batch.tokens, output_hidden_states=True)
    logps = (out.logits.float() / 3.0).log_softmax(-1).gather(-1, batch.labels.clamp_min(0)[..., None]).squeeze(-1)
    last = mask & ~torch.cat((mask[:, 1:], torch.zeros_like(mask[:, :1])), 1)
    rewards = last * batch.scores[:, None]
    a = gae(rewards, torch.zeros_like(rewards), mask, gamma=0.9, lam=0.7)
    chosen = a[mask]
    whitened = (a - chosen.mean()) / chosen.std(correction=0)
    (-(torch.where(mask, logps * whitened, 0.0)).sum() / mask.sum()).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.5 * p.grad
    got = load_file(run / "export" / "model.safetensors")
    assert largest_difference(got, {name: p for name, p in model.named_parameters() if name in got}) < 2e-5
    h = out.hidden_states[-1]  # after the last norm
    gradient = 0.4 * (-a[mask][:, None] * h[mask]).sum(0) / mask.sum()  # of the critic's weight at 0
    saved = weights(run)
    assert torch.allclose(saved["critic.weight"][0], -0.5 * gradient, atol=1e-5)
    assert torch.allclose(saved["critic.bias"], 0.5 * 0.4 * a[mask].mean(), atol=1e-5)


def test_micro_batches_change_nothing(ppo, tmp_path):
    whole = ppo(tmp_path / "whole", *FULL, "optimizer.lr=0.01", "batch_size=12")
    parts = ppo(tmp_path / "parts", *FULL, "optimizer.lr=0.01", "batch_size=5")
    assert largest_difference(weights(whole), weights(parts)) < 2e-5
    assert [r["reward"] for r in rows(whole)] == [r["reward"] for r in rows(parts)]


def part(folder, overrides):
    recipe = load_recipe("ppo")
    recipe.draw_loss = lambda *args, **kwargs: None
    train(recipe, CONFIG, folder, *SMALL, *overrides)


@pytest.mark.parametrize("spread", [[], ["parallel.tp=2"], ["parallel.cp=2"]])
def test_ranks_are_one_process(ppo, tmp_path, spread):
    options = ["mini_batches=2", "kl_coef=0.1", "max_steps=1", SGD]
    alone = ppo(tmp_path / "alone", *options)
    run_ranks(part, 2, tmp_path / "ranks", [*options, *spread, "batch_size=6"])
    assert largest_difference(weights(alone), weights(tmp_path / "ranks")) < 2e-5
    for ours, want in zip(rows(tmp_path / "ranks"), rows(alone), strict=True):
        for name, value in want.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_resume_is_bit_exact(ppo, tmp_path, monkeypatch):
    options = ["max_steps=3", "save_every=1"]
    whole = ppo(tmp_path / "whole", *options)
    with interrupted(monkeypatch, 2):
        ppo(tmp_path / "parts", *options)
    parts = ppo(tmp_path / "parts", *options)
    assert digests(parts) == digests(whole) and rows(parts) == rows(whole)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("rollout.resample=1", "every round would be taken"),
        ("lora.dropout=0.1", "leave it 0"),
        ("gamma=1.5", "gamma"),
        ("mini_batches=5", "do not divide"),
        ("nf4={}", "nf4"),
        ("lam=2", "lam"),
    ],
)
def test_configs_that_cannot_work(ppo, tmp_path, override, problem):
    with pytest.raises(UserError, match=problem):
        ppo(tmp_path / "run", override, *(["~lora"] if "nf4" in override else []))


def test_it_learns(tmp_path):
    """The demo, cut short: the reward of held-out answers."""
    run = train(
        load_recipe("ppo"), CONFIG, tmp_path / "run", "max_steps=12", "eval_every=100", "rollout.prompts_per_step=96"
    )
    before, after = (row["eval_reward"] for row in read_rows(run / "metrics.jsonl") if "eval_reward" in row)
    assert after > 1.5 * before
