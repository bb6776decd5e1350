"""Whether a plan of `recompute` really fits: a full micro-step before training, that falls back to leaner plans."""

import gc
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.errors import UserError
from torchft.files import cache_folder, keep_in_cache, read_json
from torchft.modules.decoder import Decoder
from torchft.ranks import num_ranks
from torchft.training.block_cost import case
from torchft.training.graphs import held_bytes
from torchft.training.memory import GIB, available_bytes
from torchft.training.recompute import FITS, Plan, apply_plan, does_not_fit

log = logging.getLogger(__name__)

Step = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (tokens, labels, positions), each [b, s] -> loss


def settle(
    model: Decoder,
    found: Sequence[Plan],
    step: Step,
    *,
    seq_len: int,
    packed: bool,
    device: torch.device,
    limit: int | None = None,
    keep: Mapping[str, Any] | None = None,
) -> Plan:
    """Apply the first plan of ``found`` whose full micro-step really runs, which also compiles what training will need.

    ``step`` gives the loss of a micro-step. It gets random tokens, all trained on, while a block of memory stands in
    for the optimizer's states. Weights, gradients and random states are left as they were. Call it before there are
    hooks that step in backward. On CPUs the first plan is applied untried, and so is one that an earlier run tried, of
    the same model on the same kind of device, if there is memory for what it took then; one that ran out of no less
    memory then is passed over. On several ranks nothing is tried: one that runs out of memory would leave the others
    waiting.

    ``keep``: the setting of the run that is resumed; that it cannot be kept is said.

    Raises:
        UserError: no plan runs within the device's memory, or below ``limit`` bytes.
    """
    plan = _first_that_runs(model, found, step, seq_len=seq_len, packed=packed, device=device, limit=limit)
    if keep is not None and plan.setting != keep:
        log.warning(
            "this run began with %s and goes on with %s, because the config, the device or its free memory is another: "
            "the same gradients, but for the rounding of sums in another order",
            keep,
            plan.setting,
        )
    return plan


def by_head(model: Decoder, head: Callable[..., Tensor]) -> Step:
    """For `settle`: the sum of what ``head(hidden, project, labels=labels)`` gives."""
    return lambda tokens, labels, positions: model(tokens, positions, head=partial(head, labels=labels)).sum()


def _first_that_runs(
    model: Decoder,
    found: Sequence[Plan],
    step: Step,
    *,
    seq_len: int,
    packed: bool,
    device: torch.device,
    limit: int | None,
) -> Plan:
    if device.type != "cuda" or num_ranks() > 1:
        apply_plan(model, found[0])
        return found[0]
    for plan in found:
        file = _remembered(model, plan, seq_len=seq_len, packed=packed, device=device)
        available = available_bytes(model, device)
        before = _result_before(file) if limit is None else {}
        if available <= 1.01 * before.get("too_little", 0.0):  # it differs by a few MB from start to start
            log.info("out of memory in a trial micro-step of an earlier run: %s", plan)
            continue
        apply_plan(model, plan)
        if before.get("peak", math.inf) <= FITS * available:
            return plan
        if peak := _runs(model, plan, step, seq_len=seq_len, packed=packed, device=device, limit=limit):
            keep_in_cache(file, json.dumps({"peak": peak}))
            return plan
        if limit is None:
            keep_in_cache(file, json.dumps({"too_little": available}))
        log.warning("out of memory in a trial micro-step: %s", plan)
    raise UserError(does_not_fit(found[-1], available_bytes(model, device) if limit is None else limit))


def _remembered(model: Decoder, plan: Plan, *, seq_len: int, packed: bool, device: torch.device) -> Path:
    """Where the result of this trial is kept, in the user's cache folder."""
    name = case(model, seq_len=seq_len, packed=packed, device=device)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    parts = (*plan.setting.values(), plan.gradients, plan.replays, plan.memory.optimizer, trained)
    return cache_folder() / "trials" / f"{name}_{'_'.join(map(str, parts))}.json"


def _result_before(file: Path) -> dict[str, float]:
    """Bytes at the ``peak`` of a trial that ran, or that were ``too_little``; empty if there was no such trial. What
    cannot be read was none: a cache never stops a run."""
    try:
        return {name: float(value) for name, value in read_json(file).items()}
    except (UserError, AttributeError, TypeError, ValueError):
        return {}


def _runs(
    model: Decoder, plan: Plan, step: Step, *, seq_len: int, packed: bool, device: torch.device, limit: int | None
) -> int | None:
    """Bytes at the peak; None: too many."""
    assert all(p.grad is None for p in model.parameters()), "before the first step"
    params = [p for p in model.parameters() if p.requires_grad]
    hooks = []
    if plan.gradients == "freed":
        hooks = [p.register_post_accumulate_grad_hook(_drop) for p in params]
    try:
        peak = _peak(model, plan, step, seq_len=seq_len, packed=packed, device=device)
        found = peak if limit is None or peak <= limit else None
    except torch.OutOfMemoryError:
        found = None  # cleaned up below, where the exception no longer holds what the frames it came through held
    for hook in hooks:
        hook.remove()
    for p in params:
        p.grad = None
    if found is None:
        model.activations, model.replay = nullcontext(), None
        gc.collect()
        torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return found


def _peak(model: Decoder, plan: Plan, step: Step, *, seq_len: int, packed: bool, device: torch.device) -> int:
    """Bytes allocated at the peak of a micro-step; of a second one too if it finds the gradients of the first."""
    torch.cuda.reset_peak_memory_stats(device)
    states = torch.empty(plan.memory.optimizer, dtype=torch.uint8, device=device)
    with torch.random.fork_rng([device]):
        for _ in range(2 if plan.gradients == "added" else 1):
            tokens = torch.randint(model.config.vocab_size, (plan.rows, seq_len), device=device)
            positions = torch.arange(seq_len, device=device).expand(plan.rows, -1) if packed else None
            step(tokens, tokens, positions).backward()
    del states
    return torch.cuda.max_memory_allocated(device) + held_bytes()


def _drop(p: Tensor) -> None:
    p.grad = None


@contextmanager
def out_of_memory_explained(plan: Plan) -> Iterator[None]:
    """Around training: running out of memory after all becomes a UserError with the ways out."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise UserError(
            f"the device is out of memory with {plan}, which was expected to need {plan.memory.total / GIB:.1f} GiB: "
            f"{str(e).splitlines()[0]}. "
            "Set a smaller batch_size or seq_len, recompute: full, or offload_activations: true"
        ) from None
