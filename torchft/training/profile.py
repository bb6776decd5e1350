"""The ``profile:`` section: what the devices do in a few steps, as files for https://ui.perfetto.dev and
https://pytorch.org/memory_viz.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from torchft.config import Range
from torchft.ranks import is_main, rank
from torchft.training.communication import communication
from torchft.training.metrics import Row

log = logging.getLogger(__name__)

ENTRIES = 200_000  # allocations that a memory snapshot holds


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    first_step: Annotated[int, Range(min=2)] = 10  # of this session, which compiles in its first ones
    steps: Annotated[int, Range(min=1)] = 2  # each adds some 10 MB
    memory: bool = False  # also every allocation of these steps, on CUDA
    all_ranks: bool = False  # else the main one alone


@contextmanager
def profiled(config: ProfileConfig | None, folder: Path) -> Iterator[Callable[[], Row]]:
    """Gives a function to call after each step; without ``config`` it does nothing. Once the profiled steps of several
    GPUs are over, it returns what share of them communication took, for the rows of that step and of all later ones.

    After the last profiled step ``folder`` holds ``trace_rank_00000.json.gz``, ``memory_rank_00000.pickle``, and, of
    several GPUs, ``communication_rank_00000.json``.
    """
    if config is None or not (is_main() or config.all_ranks):
        yield dict
        return
    measured: Row = {}
    name, count = f"rank_{rank():05d}", 0
    takes_memory = config.memory and torch.cuda.is_available()
    if config.memory and not takes_memory:
        log.warning("profile.memory: there are no allocations to see without CUDA")

    def write(profiler: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"trace_{name}.json.gz"))
        if takes_memory:
            torch.cuda.memory._dump_snapshot(str(folder / f"memory_{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        if (share := communication(profiler)) is not None:
            (folder / f"communication_{name}.json").write_text(json.dumps(share._asdict()) + "\n")
            measured.update(communication=share.running, communication_exposed=share.exposed)
            log.info("communication: %.1f%% of the time, %.1f%% not behind computation", *(100 * s for s in share))
        log.info("profiled steps %d to %d of this session: %s", config.first_step, last, folder)

    last = config.first_step + config.steps - 1
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    when = schedule(wait=config.first_step - 2, warmup=1, active=config.steps, repeat=1)
    with profile(activities=activities, schedule=when, on_trace_ready=write, record_shapes=True) as profiler:

        def step() -> Row:
            nonlocal count
            count += 1
            if takes_memory and count == config.first_step - 1:
                torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
            profiler.step()
            return measured

        yield step
