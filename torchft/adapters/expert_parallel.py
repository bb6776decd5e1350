"""Expert parallel: each rank holds some experts of every layer, and computes them for all tokens of its ``ep`` group.

    for experts in split_experts(model, world.ep_mesh):
        fully_shard(experts, mesh=world.expert_mesh, ...)

Tokens are gathered and results summed over the group (modules/moe.py) instead of being sent to the ranks of their
experts. With k experts per token that moves ep / k times as much; the host need not learn how many tokens go where, and
uneven loads do not matter to memory. Surgery as in tensor_parallel.py.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchft.adapters.tensor_parallel import compute_with_parts, place
from torchft.errors import UserError
from torchft.modules.decoder import Decoder
from torchft.modules.grouped import StackedLinear
from torchft.modules.moe import ExpertShards, MoE


def split_experts(model: Decoder, mesh: DeviceMesh | None) -> list[nn.Module]:
    """Split the experts of ``model``, which is on the meta device, over ``mesh``; None: nothing is split.

    Returns the experts of each layer, which FSDP must treat apart from the rest of it, as other ranks share them. Call
    it before ``split_blocks``. UserError if there are none, or not a multiple of the ranks.
    """
    if mesh is None:
        return []
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise UserError(f"parallel.ep: {mesh.size()} ranks would share experts, but the model has none", is_shared=True)
    for moe in layers:
        if moe.router.num_experts % mesh.size():
            what = f"{mesh.size()} ranks cannot share {moe.router.num_experts} experts alike"
            raise UserError(f"parallel.ep: {what}: give it a divisor of their number", is_shared=True)
        moe.shards = ExpertShards(mesh.size(), mesh.get_local_rank(), mesh.get_group().group_name)
        modules = list(moe.experts.modules())
        for module in modules:
            for name in list(module._parameters):
                place(module, name, mesh, 0)
            if isinstance(module, StackedLinear):
                module.register_forward_pre_hook(_own_rows_in)
                module.register_forward_hook(_own_rows_out)
        moe.experts.register_forward_pre_hook(partial(compute_with_parts, modules, ()))
    return [moe.experts for moe in layers]


def _own_rows_in(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Rows of other ranks' experts come last: products leave them, and their gradients, as they find them in memory."""
    x, offsets, *scale = args
    own = _own(x, offsets)
    return (torch.where(own, x, 0), offsets, *(s if s is None else torch.where(own, s, 0) for s in scale))


def _own_rows_out(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return torch.where(_own(out, args[1]), out, 0)


def _own(rows: Tensor, offsets: Tensor) -> Tensor:
    return (torch.arange(len(rows), device=rows.device) < offsets[-1])[:, None]
