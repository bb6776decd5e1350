"""Run by test_checkpoint.py: forks a child that saves and prunes without end, kills it at random times, and looks.

Every number in step n's folder is n, so a mixture of two steps would show. Prints one line per kill.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from torchft.training.checkpoint import clean, latest, prune
from torchft.training.saver import save

torch.set_num_threads(1)  # a fork does not take a thread pool along
output_dir, kills = Path(sys.argv[1]), int(sys.argv[2])
random.seed(0)
newest = 0
for _ in range(kills):
    if (child := os.fork()) == 0:
        clean(output_dir)
        step = saved.number if (saved := latest(output_dir, "run")) else 0
        while True:
            step += 1
            tree = {f"layer.{i}": torch.full((50_000,), float(step)) for i in range(4)}
            save(output_dir, step, {"model": tree, "loader": {"step": step}}, run_id="run", score=-step % 7)
            prune(output_dir, "run", newest=step, keep_last=1)
    time.sleep(0.05 + 0.15 * random.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    leftovers = [p.name for p in output_dir.iterdir() if p.name.startswith(".")]
    saved = latest(output_dir, "run")
    if saved is None:
        assert newest == 0
        continue
    assert saved.number >= newest, "a saved step was lost"
    newest = saved.number
    assert saved.read("loader") == {"step": newest}
    assert all((t == newest).all() for t in saved.read("model").values())
    print(newest, *leftovers, flush=True)
clean(output_dir)
assert not [p for p in output_dir.iterdir() if p.name.startswith(".")]
