"""Runs that are killed at random moments and started again: in the end they are the run that nobody killed, bit by bit.

The long form (`pytest -m long tests/recipes/test_kills.py -s`) kills 50 times each and says where the kills fell.
"""

import random
import signal
import time

import pytest
from processes import run_ranks, started
from recipe_runs import digests, load_recipe, rows, train
from safetensors.torch import load_file

from torchft.training.metrics import read_rows

STEPS_PER_KILL = 12  # more than are finished between two kills
MOST_STEPS, AFTER_S = 6, 0.1  # a kill falls within so long of one of a session's first steps


def part(recipe, settings, output_dir, overrides):
    recipe = load_recipe(recipe)
    recipe.draw_loss = lambda *args, **kwargs: None  # 0.2 s at every checkpoint
    train(recipe, settings, output_dir, *overrides)


def newest(folder):
    """The number of the newest step folder."""
    return max((int(p.name[5:]) for p in folder.glob("step_*")), default=0)


def session(draw, folder, size, args, env):
    """Starts the run again and kills one rank or all at a random moment. What it met: start, steps, or a save."""
    at_start, lasts, delay = draw.random() < 0.1, draw.randrange(MOST_STEPS), draw.random()
    metrics = folder / "metrics.jsonl"
    resumed, old = newest(folder), metrics.stat().st_ino if metrics.exists() else None
    with started(part, size, *args, env=env) as (ranks, results):
        while not at_start and not (  # the session writes the file anew, up to where it goes on, and adds its steps
            metrics.exists() and metrics.stat().st_ino != old and len(read_rows(metrics)) > resumed + lasts
        ):
            assert all(p.exitcode is None for p in ranks), results.get(timeout=5)
            time.sleep(0.005)
        time.sleep(delay if at_start else AFTER_S * delay)
        assert all(p.exitcode is None for p in ranks), f"the run ended before it was killed: {results.get(timeout=5)}"
        for process in ranks if at_start else draw.sample(ranks, draw.choice([1, size])):
            process.kill()
        for process in ranks:
            process.join(timeout=60)  # one that was not killed notices that others were
            assert process.exitcode in (-signal.SIGKILL, 1, 3), process.exitcode
    if at_start:
        return "start"
    return "save" if list(folder.glob(".step_*")) else "step"


@pytest.mark.parametrize(
    ("recipe", "size", "kills"),
    [
        ("lora_finetune", 2, 3),
        pytest.param("lora_finetune", 1, 50, marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
        pytest.param("lora_finetune", 2, 50, marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
        pytest.param("full_finetune", 2, 50, marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
        pytest.param("full_finetune", 4, 10, marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
    ],
)
def test_k1_killed_at_random_moments_it_is_the_same_run(settings, tmp_path, recipe, size, kills):
    options = [f"max_steps={STEPS_PER_KILL * kills}", "epochs=1000000", "save_every=1", "keep_last=1", "packed=true"]
    options += ["batch_size=1", "seq_len=64", "parallel.timeout_s=20"]
    options += ["lora.dropout=0.3", "export=[adapter]"] if recipe == "lora_finetune" else []
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    run_ranks(part, size, recipe, settings, tmp_path / "whole", options, env=env, timeout_s=1000)

    draw, folder, met = random.Random(0), tmp_path / "killed", []
    for _ in range(kills):
        met.append(session(draw, folder, size, (recipe, settings, folder, options), env))
    reached = newest(folder)
    run_ranks(part, size, recipe, settings, folder, options, env=env, timeout_s=1000)
    print(
        f"\n{recipe} on {size}: {kills} kills, {[(what, met.count(what)) for what in sorted(set(met))]}, at {reached}"
    )

    assert reached >= kills / 5 and set(met) & {"save", "step"}
    assert rows(folder) == rows(tmp_path / "whole")
    assert digests(folder) == digests(tmp_path / "whole")
    name = "export/model.safetensors" if recipe == "full_finetune" else "export/adapter/adapter_model.safetensors"
    ours, want = load_file(folder / name), load_file(tmp_path / "whole" / name)
    assert ours.keys() == want.keys() and all((ours[key] == t).all() for key, t in want.items())
    assert len(list(folder.glob("step_*"))) == 1 and not list(folder.glob(".step_*"))
