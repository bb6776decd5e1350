"""Recipes on several ranks: the steps, weights and exports of one process with the same global batch."""

import pytest
import torch
from processes import run_ranks
from recipe_runs import largest_difference, load_recipe, losses, rows, train, weights
from safetensors.torch import load_file

ADAM = "optimizer={_component_: torch.optim.AdamW, lr: 1e-3, weight_decay: 0.1}"
STEPS = [
    "max_steps=20",
    "epochs=20",
    "clip_grad_norm=0.5",
    ADAM,
    "save_every=10",
]  # 20 steps; the last of an epoch has one row


def part(recipe, settings, output_dir, overrides):
    torch.distributed.set_debug_level(torch.distributed.DebugLevel.OFF)
    train(load_recipe(recipe), settings, output_dir, *overrides)


def together(size, recipe, settings, output_dir, *overrides):
    run_ranks(part, size, recipe, settings, output_dir, overrides)
    return output_dir


def same_run(ours, alone):
    assert len(losses(ours)) == len(losses(alone)) == 20
    assert (losses(ours) - losses(alone)).abs().max() <= 1e-5
    for row, want in zip(rows(ours), rows(alone), strict=True):
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
        assert (row["lr"], row["supervised_tokens"]) == (want["lr"], want["supervised_tokens"])
    assert largest_difference(weights(ours), weights(alone)) < 1e-4
    exported = [load_file(run / "export" / "model.safetensors") for run in (ours, alone)]
    assert largest_difference(*exported) < 1e-4


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_full_fine_tuning_is_that_of_one_process(full, settings, tmp_path, no_picture, size, packed):
    options = [*STEPS, f"packed={packed}"]
    alone = full(tmp_path / "alone", *options, "batch_size=4", "gradient_accumulation_steps=1")
    more = [f"batch_size={4 // size}", "gradient_accumulation_steps=1"]
    same_run(together(size, "full_finetune", settings, tmp_path / "together", *options, *more), alone)
