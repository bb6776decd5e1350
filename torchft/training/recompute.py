"""How much of the activations is kept for backward, recomputed, or sent to the host: the keys ``recompute`` and
``offload_activations``, and the choice of `auto`.

Memory for activations is bought in three ways, and `auto` takes the cheapest that fits: fewer rows per micro-step (the
gradients are summed, so nothing changes but the size of matrix multiplications), recomputing, copies to the host.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchft.errors import UserError
from torchft.modules.decoder import Decoder
from torchft.modules.sharded import gather_once
from torchft.ranks import gather, num_ranks
from torchft.training.block_cost import EAGER, BlockCost, block_costs, draws_random_numbers
from torchft.training.compile import compile_blocks
from torchft.training.graphs import Replay
from torchft.training.memory import GIB, Estimate, Gradients, available_bytes, estimate_step, stored_bytes
from torchft.training.offload import Offload

CHEAP = 0.8  # budget that recomputes nothing but norms and activation functions; on an H200 0.1 of 28.8 ms for 5 GB
BUDGETS = (CHEAP, 0.5, 0.3, 0.1, 0.0)  # that auto looks at; 0.1 is the last that keeps attention
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the blocks, where budgets cannot be had
OFFLOADS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of what is kept that auto considers sending to the host
ROW_COST = 128  # tokens: reading the weights once more takes as long as these, at 4 TB/s and 700 TFLOP/s
# Seconds that the host needs to launch one block's forward and backward, compiled, and more for each quantised weight:
# small micro-steps wait for it. From steps of 2048 tokens of an 8B model on an H200 (bf16 4.3 ms a block, NF4 6.9).
LAUNCH, LAUNCH_QUANTISED = 4e-3, 0.4e-3
HOST_BANDWIDTH = 45e9  # bytes/s each way; 55e9 measured on PCIe 5 with nothing else on it
FLOPS = 500e12  # per second, of a block, to know whether copies are done in time
FITS = 0.94  # share of the memory that is planned with: the rest is the allocator's and the libraries'
SURELY_FITS = 0.8  # the same, for what is a gain in speed alone and is not tried before
# Bytes/s at which gathering weights holds computation up, by the copies and SMs that it takes: micro-steps of 8B on two
# H100s took 1080 ms instead of 1155 without two gathers of 16 GB (LoRA), 1165 instead of 1187 without one (full).
GATHER = 5e11


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One setting, and what it takes."""

    budget: float | None  # of the compiler, as in `compile_blocks`; None: blocks are not compiled
    share: float  # of the blocks that keep only their input and run again in backward
    offload: float  # share of what is kept that is copied to the host
    rows: int  # per micro-step
    gradients: Gradients
    memory: Estimate
    block_bytes: int  # that one block keeps in a micro-step
    time: float  # relative to the fastest; 1.0 without recompute and with endless rows
    replays: bool = False  # kernels are not launched one by one: training/graphs.py
    gathers_once: bool = False  # of several ranks: weights are whole from forward to backward
    reason: str = ""  # a sentence for the user

    @property
    def setting(self) -> dict[str, Any]:
        """What decides the bits of a step, for a checkpoint: JSON values only."""
        return {"budget": self.budget, "share": self.share, "offload": self.offload, "rows": self.rows}

    def __str__(self) -> str:
        kept = (
            f"{self.budget or 0.0:g} of the activations kept" if self.budget != CHEAP else "nothing costly recomputed"
        )
        if self.budget == 0.0 or self.share == 1.0:
            kept = "full recompute"
        elif self.share or self.budget is None:
            kept = f"{self.share:.0%} of the blocks recomputed" if self.share else "no recompute"
        away = {0.0: "", 1.0: ", offloaded"}.get(self.offload, f", {self.offload:.0%} of it offloaded")
        whole = "; weights whole from forward to backward" if self.gathers_once else ""
        return f"{kept}{away}, {self.rows} row{'s' * (self.rows > 1)} per micro-step{whole}"


def plans(
    model: Decoder,
    *,
    recompute: str | float,
    offload: float,
    compiled: bool,
    rows: int,
    seq_len: int,
    packed: bool,
    device: torch.device,
    optimizer_bytes: int | None = None,
    in_backward: bool = False,
    accumulation: int = 1,
    keep: Mapping[str, Any] | None = None,
    limit: int | None = None,
    shards: int = 1,
    reshard: bool | None = None,
    branches: bool = False,
) -> list[Plan]:
    """The setting to use, and leaner ones to fall back to, if it was chosen by `auto`. Call it after all surgery.

    Args:
        recompute: "none" (nothing that takes long), "full" (all but the blocks' inputs), a share 0.0-1.0 of the
            activations to keep, or "auto".
        offload: share to copy to the host (True: 1); if 0, auto does it where that is the fastest that fits.
        rows: of a batch; auto divides them into micro-steps.
        optimizer_bytes: of the states; None: two per trainable value, as AdamW's.
        in_backward: gradients are freed within backward, so that a batch cannot be divided.
        accumulation: batches per optimizer step.
        keep: `Plan.setting` of the run that is resumed; auto takes it again, other rows would change the last bits.
        limit: bytes of the device that may be used; None: what is free, of several ranks on the fullest.
        shards: ranks over which the model will be sharded; ``model`` itself is whole.
        reshard: free gathered weights between forward and backward; None: on GPUs, what is faster and fits.
        branches: documents share prompts, with masks that no graph holds: kernels are launched one by one.

    Raises:
        UserError: auto finds nothing that fits.
    """
    dice = any(draws_random_numbers(layer) for layer in model.layers)
    # The compiler's partitioner, below CHEAP, draws a block's random numbers anew in backward: wrong gradients, and no
    # error (torch 2.11 and 2.13). torch.utils.checkpoint restores the generator.
    budgets = compiled and not dice
    budget_of_share = CHEAP if compiled else EAGER
    if recompute == "auto":
        settings = [(b, 0.0) for b in BUDGETS] if budgets else [(budget_of_share, share) for share in SHARES]
        if device.type != "cuda":
            settings = settings[:1]
    else:
        kept = {"none": CHEAP if budgets else 1.0, "full": 0.0}.get(str(recompute))
        kept = float(recompute) if kept is None else kept
        settings = [(kept, 0.0) if budgets else (budget_of_share, 1.0 - kept)]
    automatic = recompute == "auto" and device.type == "cuda"
    splits = [r for r in range(rows, 0, -1) if rows % r == 0] if automatic and not in_backward else [rows]

    base = EAGER if not compiled else CHEAP
    costs = block_costs(
        model, list(dict.fromkeys([base, *(b for b, _ in settings)])), seq_len=seq_len, packed=packed, device=device
    )
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes of memory
    quantised = sum(is_traceable_wrapper_subclass(p) for p in model.layers[0].parameters())
    launch = LAUNCH + LAUNCH_QUANTISED * quantised
    # A graph owns the gradients, also while nothing else would hold them: too much where all weights are trained.
    every, block = list(model.parameters()), list(model.layers[0].parameters())
    stored = sum(map(stored_bytes, every))
    adapters = sum(p.nbytes for p in every if p.requires_grad) < 0.1 * stored
    # Where weights stay whole, the base of adapters does so for good.
    whole = stored if adapters else stored + stored // shards
    again = sum(stored_bytes(p) for p in block if p.requires_grad or not adapters)
    # Bytes of a block that are gathered in a micro-step, by whether weights stay whole.
    gathered = {True: again, False: 2 * sum(map(stored_bytes, block))} if shards > 1 else {False: 0}
    if reshard is not None and shards > 1:
        gathered.pop(reshard)
    found = []
    for budget, share in settings:
        for r, away, once in product(splits, OFFLOADS if automatic and not offload else (float(offload),), gathered):
            cost = _mixed(costs[budget], share)
            gradients: Gradients = "freed" if in_backward else "added" if accumulation * rows > r else "new"
            replays = compiled and device.type == "cuda" and not away and not share and not in_backward
            replays = replays and num_ranks() == 1 and not branches
            replays = replays and (adapters or gradients == "added")
            memory = estimate_step(
                model, tokens=r * seq_len, saved=r * cost.saved, recomputed=r * (costs[base].saved - cost.saved),
                largest=r * costs[base].largest, offload=away, optimizer_bytes=optimizer_bytes,
                gradients="added" if replays else gradients, shards=shards,
            )  # fmt: skip
            if once:
                memory = replace(memory, weights=whole, total=memory.total - memory.weights + whole)
            time = _time(
                cost, costs[base], rows=r, seq_len=seq_len, offload=away, gathered=gathered[once],
                launch=0.0 if replays else launch,
            )  # fmt: skip
            plan = Plan(
                budget=budget, share=share, offload=away, rows=r, gradients=gradients, memory=memory,
                block_bytes=r * cost.saved, replays=replays, gathers_once=once, time=time,
            )  # fmt: skip
            if not automatic or away * r * cost.saved * len(model.layers) < host / 2:
                found.append(plan)
    available = 0  # CPUs never gather once by themselves
    if device.type == "cuda":
        available = min(gather(available_bytes(model, device) if limit is None else limit))
    if reshard is None:
        found = [p for p in found if not p.gathers_once or p.memory.total <= SURELY_FITS * available]
    if automatic:
        return choose(found, available=available, keep=keep)
    why = "CPUs need no choice" if recompute == "auto" else f"recompute: {recompute}"
    fastest = min(found, key=lambda plan: plan.time)
    return [replace(fastest, reason=f"{fastest} ({why})")]


def choose(found: Sequence[Plan], *, available: int, keep: Mapping[str, Any] | None = None) -> list[Plan]:
    """The fastest plan that fits into ``available`` bytes, then leaner ones, each with its reason.

    Before all of them the one whose setting is ``keep``, which has run already, whatever it is thought to need.
    """
    kept = [replace(plan, reason=f"{plan}: as this run began") for plan in found if plan.setting == keep]
    ordered = sorted(found, key=lambda plan: (plan.time, plan.memory.total))
    fitting = [i for i, plan in enumerate(ordered) if plan.memory.total <= FITS * available]
    if not fitting and kept:
        return kept
    if not fitting:
        leanest = min(found, key=lambda plan: plan.memory.total)
        raise UserError(does_not_fit(leanest, available))
    chosen = ordered[fitting[0]]
    has = f"needs about {chosen.memory.total / GIB:.1f} of {available / GIB:.1f} GiB"
    faster = ordered[fitting[0] - 1] if fitting[0] else None
    next_ = f"; {faster} would be {chosen.time / faster.time - 1:.0%} faster and needs " if faster else "; the fastest"
    next_ += f"{faster.memory.total / GIB:.1f} GiB" if faster else ""
    result = [replace(chosen, reason=f"{chosen}: {has}{next_}")]
    for plan in ordered[fitting[0] + 1 :]:
        if plan.memory.total < 0.9 * result[-1].memory.total:
            result.append(replace(plan, reason=f"{plan}: what was chosen first did not fit"))
    return kept + [plan for plan in result if plan.setting != keep]


def apply_plan(model: Decoder, plan: Plan) -> None:
    """Set ``model`` to run as ``plan`` says; compiles its blocks anew if the compiler's budget changes."""
    model.recompute = plan.share
    window = round(2 * plan.offload * plan.block_bytes)
    smallest = plan.block_bytes // 64  # a copy costs the host a tenth of a millisecond, however little it is
    away = Offload(model, window=window, share=plan.offload, smallest=smallest) if plan.offload else nullcontext()
    model.activations = away
    if plan.budget is not None:
        compile_blocks(model, budget=plan.budget)
    model.replay = Replay(model) if plan.replays else None
    if plan.gathers_once:
        gather_once(model)


def _time(
    cost: BlockCost, base: BlockCost, *, rows: int, seq_len: int, offload: float, launch: float, gathered: int
) -> float:
    """Relative time of a block per token. ``gathered``: bytes of weights in a micro-step."""
    again = (cost.forward_flops + cost.backward_flops) / (base.forward_flops + base.backward_flops)
    base_s = rows * (base.forward_flops + base.backward_flops) / FLOPS
    compute_s = again * max(base_s * (1 + ROW_COST / (rows * seq_len)), launch)  # what runs again is launched again
    copies_s = rows * (offload * cost.saved / HOST_BANDWIDTH - cost.forward_flops / FLOPS)  # beyond forward
    return (compute_s + 2 * max(0.0, copies_s) + gathered / GATHER) / base_s + 0.02 * offload


def _mixed(cost: BlockCost, share: float) -> BlockCost:
    """The mean of blocks of which ``share`` run under torch.utils.checkpoint."""
    again = round(share * cost.forward_flops)
    saved = round((1 - share) * cost.saved + share * cost.inputs)
    return replace(cost, saved=saved, backward_flops=cost.backward_flops + again)


def does_not_fit(plan: Plan, available: int) -> str:
    parts = ", ".join(f"{name} {size}" for name, size in plan.memory.lines().items())
    return (
        f"the model does not fit: {plan} needs about {plan.memory.total / GIB:.1f} GiB ({parts}), "
        f"{available / GIB:.1f} GiB are free. A shorter seq_len, an adapter (LoRA), a smaller base (nf4 or fp8), an "
        "optimizer with 8-bit states or states on the host need less; or stop what else uses the device"
    )
