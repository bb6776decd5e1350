"""The `parallel:` section, and the process group and device mesh that it asks for.

    with distributed.init(config.parallel, device=config.device, debug_dir=config.output_dir / "debug") as world:
        ...
        if world.mesh:
            for layer in model.layers:
                fully_shard(layer, mesh=world.mesh, mp_policy=SUM_IN_FP32)

torchrun starts the processes and says in RANK, WORLD_SIZE and LOCAL_RANK which is which.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from torchft.config import Range
from torchft.errors import LostContact, UserError
from torchft.training import fault
from torchft.training.environment import device_name, pick_device
from torchft.training.watch import Watch, is_lost_contact

# Parameters are gathered in their own dtype, so that a sharded model computes what an unsharded one does; only sums of
# gradients over ranks are wider.
SUM_IN_FP32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
TIMEOUT_S = 600  # for which a rank waits for the others before it takes them for dead


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes share the work; the product of the numbers is how many there are."""

    shard: Annotated[int, Range(min=1)] | None = None  # ranks over which a model is sharded (FSDP2); null: what is left
    replicate: Annotated[int, Range(min=1)] = 1  # groups of such ranks, each with all of the model (HSDP): one per node
    timeout_s: Annotated[int, Range(min=1)] = TIMEOUT_S  # after which a rank that does not answer ends the run


@dataclass(frozen=True, kw_only=True)
class World:
    """What one process needs to know of all."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # what `fully_shard` takes; None: one process, and nothing is sharded
    shards: int = 1  # ranks that share one copy of the model
    watch: Watch | None = None

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
        how = (
            "sharded"
            if copies == 1
            else f"{copies} copies" + (f" sharded over {self.shards}" if self.shards > 1 else "")
        )
        return f"{self.size} x {name}, {how}"

    def sum(self, value: Tensor) -> Tensor:
        """All ranks: ``value`` summed over them, without changing it."""
        if self.mesh is not None:
            value = value.clone()
            dist.all_reduce(value)
        return value


@contextmanager
def init(config: ParallelConfig, *, device: str = "auto", debug_dir: Path | None = None) -> Iterator[World]:
    """The process group of this run, until the block ends. UserError if ``config`` does not fit the processes.

    A rank that dies or does not answer for ``timeout_s`` ends the block with LostContact on the others. What each rank
    was doing then, and what NCCL had under way, is written to ``debug_dir``.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    replicate, shard = degrees(config, size)
    own = pick_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else None)
    if size == 1:
        yield World(device=own)
        return
    backend = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}.get(own.type)
    if backend is None:
        raise UserError(f"device: several processes run on CUDA GPUs or CPUs, not on {own.type}", is_shared=True)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if rank:
        logging.getLogger("torchft").setLevel(logging.ERROR)  # the main rank says what all would say
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
    mesh = init_device_mesh(own.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    fsdp = mesh if replicate > 1 else mesh["shard"]  # FSDP2 takes two dimensions for HSDP
    watch = Watch(timeout_s=config.timeout_s, debug_dir=debug_dir)
    try:
        yield World(device=own, rank=rank, size=size, mesh=fsdp, shards=shard, watch=watch)
    except RuntimeError as e:
        if is_lost_contact(e):
            raise LostContact(watch.report(e)) from e
        raise
    finally:
        watch.close()
    dist.destroy_process_group()  # after an error it might wait for ranks that never come; the process ends anyway


def degrees(config: ParallelConfig, size: int) -> tuple[int, int]:
    """(replicate, shard) for ``size`` processes. UserError if their product is another number."""
    shard = config.shard or max(1, size // config.replicate)
    if config.replicate * shard != size:
        whole = f"replicate {config.replicate} x shard {shard} = {config.replicate * shard}"
        raise UserError(
            f"parallel: {whole}, but there are {size} processes: start as many as the product "
            "(--nproc-per-node times --nnodes), or leave parallel.shard out to take what there is",
            is_shared=True,
        )
    return config.replicate, shard
