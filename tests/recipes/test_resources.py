"""A real disk of few MB that two ranks fill while they train; memory that does not grow with the steps."""

import json
import subprocess
from functools import partial

import pytest
from processes import run_ranks
from recipe_runs import digests, load_recipe, rows, train

from torchft.training.checkpoint import damage, steps
from torchft.training.metrics import read_rows

MOUNT = ["mount", "-t", "tmpfs", "-o"]


def part(settings, output_dir, overrides):
    recipe = load_recipe("full_finetune")
    recipe.draw_loss = lambda *args, **kwargs: None
    train(recipe, settings, output_dir, *overrides)


@pytest.fixture
def disk(tmp_path):
    """Two checkpoints of 7.5 MB fit on it, and half of a third."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run([*MOUNT, "size=19m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs root, to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_k5_a_full_disk_keeps_the_last_checkpoint_and_the_same_command_goes_on(settings, tmp_path, disk):
    run = partial(run_ranks, part, 2, settings)
    options = ["max_steps=8", "epochs=3", "save_every=2", "keep_last=2", "batch_size=1", "packed=true"]
    with pytest.raises(AssertionError) as stop:
        run(disk / "run", options)
    text = str(stop.value)
    assert "step 6 could not be saved" in text and "No space left on device" in text and "Free some space" in text
    assert "need 0.00" in text and "have 0.00" in text
    found = steps(disk / "run", json.loads((disk / "run" / "run.json").read_text())["id"])
    assert [step.number for step in found] == [2, 4] and not any(damage(step) for step in found)

    subprocess.run([*MOUNT, "remount,size=64m", "tmpfs", disk], check=True)
    run(disk / "run", options)
    run(tmp_path / "whole", options)
    assert rows(disk / "run") == rows(tmp_path / "whole") and digests(disk / "run") == digests(tmp_path / "whole")


@pytest.mark.long
def test_r4_memory_does_not_grow_with_steps_and_saves(settings, tmp_path):
    options = ["max_steps=500", "epochs=1000", "save_every=20", "batch_size=1", "seq_len=64", "packed=true"]
    run_ranks(part, 1, settings, tmp_path, options, timeout_s=1000)
    most = {row["step"]: row["peak_memory_gib"] for row in read_rows(tmp_path / "metrics.jsonl")}
    assert most[500] - most[100] < 0.02  # GiB; 400 steps that kept one batch's activations each would be 0.5
