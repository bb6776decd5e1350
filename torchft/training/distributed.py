"""The `parallel:` section, and the process group and device mesh that it asks for.

    with distributed.init(config.parallel, device=config.device, debug_dir=config.output_dir / "debug") as world:
        ...
        if world.mesh:
            for experts in split_experts(model, world.ep_mesh):
                fully_shard(experts, mesh=world.expert_mesh, mp_policy=world.sums)
            split_blocks(model, world.tp_mesh, world.tokens)
            for layer in model.layers:
                fully_shard(layer, mesh=world.mesh, mp_policy=world.sums)
            fully_shard(model, mesh=world.root_mesh, mp_policy=world.sums)
            sum_gradients(model)

A rank's number is ((replicate * shards + shard) * cp + c) * tp + t: neighbours share a row of tokens.

torchrun starts the processes and says in RANK, WORLD_SIZE and LOCAL_RANK which is which.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from torchft.config import Range
from torchft.cuda_graphs import forget_all
from torchft.errors import LostContact, UserError
from torchft.token_shards import TokenShards
from torchft.training import fault
from torchft.training.environment import device_name, pick_device
from torchft.training.rank_log import rank_log
from torchft.training.watch import Watch, is_lost_contact

# Parameters are gathered in their own dtype, so that a sharded model computes what an unsharded one does; only sums of
# gradients over ranks are wider.
SUM_IN_FP32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
# Two bf16 gradients have the same sum, rounded once, in bf16 as in fp32 that is then made bf16: the same bits, for half
# the bytes. Full fine-tuning of 8B on two H100s: 1170 ms a step instead of 1195 (docs/distributed.md).
SUM_OF_TWO = MixedPrecisionPolicy(cast_forward_inputs=False)
TIMEOUT_S = 600  # for which a rank waits for the others before it takes them for dead


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes share the work; the product of the numbers is how many there are."""

    replicate: Annotated[int, Range(min=1)] = 1  # groups of ranks, each with all of the model (HSDP): one per node
    shard: Annotated[int, Range(min=1)] | None = None  # ranks over which a model is sharded (FSDP2); null: what is left
    cp: Annotated[int, Range(min=1)] = 1  # ranks that share the tokens of a row, for long ones (context parallel)
    tp: Annotated[int, Range(min=1)] = 1  # ranks that share heads and MLPs (tensor parallel): of one node, with NVLink
    ep: Annotated[int, Range(min=1)] = (
        1  # ranks that share the experts of a mixture: some of those above, no further ones
    )
    reshard_after_forward: bool | None = None  # free gathered weights until backward; null: if memory is short
    timeout_s: Annotated[int, Range(min=1)] = TIMEOUT_S  # after which a rank that does not answer ends the run


@dataclass(frozen=True, kw_only=True)
class World:
    """What one process needs to know of all."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # what `fully_shard` takes for blocks; None: one process, and nothing is sharded
    root_mesh: DeviceMesh | None = None  # and for what is outside of blocks, which has no tensor parallel
    tp_mesh: DeviceMesh | None = None  # of the ranks that split a block
    ep_mesh: DeviceMesh | None = None  # of the ranks that share the experts, if any
    expert_mesh: DeviceMesh | None = None  # what `fully_shard` then takes for experts
    shards: int = 1  # ranks that share one copy of the model
    sums: MixedPrecisionPolicy = SUM_IN_FP32  # of gradients, for `fully_shard`
    reshard: bool | None = None  # `reshard_after_forward`
    tokens: TokenShards = field(default_factory=TokenShards)  # of a row, which are this rank's
    watch: Watch | None = None

    @property
    def data_rank(self) -> int:
        """Which rows are this rank's: ranks that share tokens have the same."""
        return self.rank // self.tokens.count

    @property
    def data_size(self) -> int:
        """How many parts the rows of a batch are shared out in."""
        return self.size // self.tokens.count

    def begin_step(self, step: int) -> None:
        """Where step ``step`` (finished ones before it) begins: what messages name when a rank is lost."""
        if self.watch is not None:
            self.watch.begin_step(step)
        fault.point("before_step", step=step, rank=self.rank)

    def __str__(self) -> str:
        """For people: "NVIDIA H200", "8 x NVIDIA H200, sharded", "16 x NVIDIA H200, 2 copies sharded over 8"."""
        name = device_name(self.device)
        if self.size == 1:
            return name
        copies = self.size // self.shards
        how = "sharded"
        if copies > 1:
            how = f"{copies} copies" + (f" sharded over {self.shards}" if self.shards > 1 else "")
        how += f", tp {self.tokens.tp}" if self.tokens.tp > 1 else ""
        how += f", cp {self.tokens.cp}" if self.tokens.cp > 1 else ""
        how += f", ep {self.ep_mesh.size()}" if self.ep_mesh is not None else ""
        return f"{self.size} x {name}, {how}"

    def sum(self, value: Tensor) -> Tensor:
        """All ranks: ``value`` summed over them, without changing it."""
        if self.mesh is not None:
            value = value.clone(memory_format=torch.contiguous_format)  # gloo may mix up the others
            dist.all_reduce(value)
        return value


@contextmanager
def init(config: ParallelConfig, *, device: str = "auto", debug_dir: Path | None = None) -> Iterator[World]:
    """The process group of this run, until the block ends. UserError if ``config`` does not fit the processes.

    A rank that dies or does not answer for ``timeout_s`` ends the block with LostContact on the others. What each rank
    was doing then, what it warned of, and what NCCL had under way, is written to ``debug_dir``.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    replicate, shard, cp, tp = degrees(config, size)
    own = pick_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else None)
    if size == 1:
        yield World(device=own)
        return
    backend = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}.get(own.type)
    if backend is None:
        raise UserError(f"device: several processes run on CUDA GPUs or CPUs, not on {own.type}", is_shared=True)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if debug_dir is not None:  # https://docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(debug_dir / "nccl_rank_"))
    timeout = timedelta(seconds=config.timeout_s)
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=own if own.type == "cuda" else None)
    except (ValueError, RuntimeError) as e:  # torch's own errors of the network are RuntimeErrors
        where = ", ".join(f"{n}={os.environ.get(n)}" for n in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
        raise UserError(
            f"rank {rank} cannot reach the others ({where}): {str(e).splitlines()[0]}. Start with `tune run` or "
            "torchrun, on each node with the same --rdzv-endpoint, of a host and port that all nodes can reach"
        ) from None
    sharing = shard * cp * tp
    axes = ("replicate", "shard") if replicate > 1 else ("shard",)  # FSDP2 takes two dimensions for HSDP
    make = partial(init_device_mesh, own.type)
    blocks = root = make((replicate, shard * cp, tp), mesh_dim_names=("replicate", "shard", "tp"))
    tokens, experts = TokenShards(), None
    if tp > 1:
        root = make((replicate, sharing), mesh_dim_names=("replicate", "shard"))
    if config.ep > 1:
        experts = make((replicate, sharing // config.ep, config.ep), mesh_dim_names=("replicate", "shard", "ep"))
    if cp * tp > 1:
        rows = make((replicate * shard, cp, tp), mesh_dim_names=("rows", "cp", "tp"))
        tokens = TokenShards(
            cp=cp,
            tp=tp,
            cp_rank=rows.get_local_rank("cp"),
            tp_rank=rows.get_local_rank("tp"),
            cp_group=rows.get_group("cp").group_name,
            tp_group=rows.get_group("tp").group_name,
        )
    watch = Watch(timeout_s=config.timeout_s, debug_dir=debug_dir)
    try:
        dist.all_reduce(torch.zeros(1))  # none goes on, and perhaps ends, while another still connects to it
        with rank_log(debug_dir, rank):
            yield World(
                device=own,
                rank=rank,
                size=size,
                mesh=blocks[axes],
                root_mesh=root[axes],
                tp_mesh=blocks["tp"],
                ep_mesh=experts["ep"] if experts else None,
                expert_mesh=experts[axes] if experts else None,
                shards=sharing,
                sums=SUM_OF_TWO if size == 2 else SUM_IN_FP32,
                reshard=config.reshard_after_forward,
                tokens=tokens,
                watch=watch,
            )
    except RuntimeError as e:
        if is_lost_contact(e):
            raise LostContact(watch.report(e)) from e
        raise
    finally:
        watch.close()
    forget_all()
    dist.destroy_process_group()  # after an error it might wait for ranks that never come; the process ends anyway


def sum_gradients(model: nn.Module) -> None:
    """Gradients of all ranks are summed, where FSDP2 would take their mean: each has a part of one loss."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def frozen_weights(model: nn.Module) -> set[nn.Parameter]:
    """Of a model with adapters, all else: held whole (``ignored_params`` of ``fully_shard``), it is never gathered.

    Empty if most weights are trained, or if tensor or expert parallel has split them: only FSDP2 puts their parts back
    after a block has run.
    """
    frozen = {p for p in model.parameters() if not p.requires_grad}
    is_split = any(isinstance(p, DTensor) for p in frozen)
    is_adapted = sum(p.numel() for p in frozen) > sum(p.numel() for p in model.parameters()) / 2
    return frozen if is_adapted and not is_split else set()


def degrees(config: ParallelConfig, size: int) -> tuple[int, int, int, int]:
    """(replicate, shard, cp, tp) for ``size`` processes. UserError if their product is another number."""
    others = config.replicate * config.cp * config.tp
    shard = config.shard or max(1, size // others)
    if others * shard != size:
        named = {"replicate": config.replicate, "shard": shard, "cp": config.cp, "tp": config.tp}
        product = " x ".join(f"{name} {n}" for name, n in named.items() if n > 1 or name in ("replicate", "shard"))
        whole = f"{product} = {others * shard}"
        way = "leave parallel.shard out to take what there is" if config.shard else "give numbers that divide them"
        raise UserError(
            f"parallel: {whole}, but there are {size} processes: start as many as the product "
            f"(--nproc-per-node times --nnodes), or {way}",
            is_shared=True,
        )
    if shard * config.cp * config.tp % config.ep:
        raise UserError(
            f"parallel: ep {config.ep} must divide shard {shard} x cp {config.cp} x tp {config.tp}, "
            "the ranks that share a model",
            is_shared=True,
        )
    return config.replicate, shard, config.cp, config.tp
