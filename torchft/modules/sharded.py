"""When the weights of a model that FSDP2 shards are whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


class GiveBack:
    """A hook of the model: a forward without gradients, which no backward follows, gives whole weights back."""

    pauses = False  # while they stay whole from one forward to the next

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not self.pauses and not torch.is_grad_enabled():
            for module in _shards(model):
                module.reshard()


def gather_once(model: nn.Module) -> None:
    """Weights stay whole from forward to backward, instead of being gathered again there: faster, for more memory."""
    for module in _shards(model):
        module.set_reshard_after_forward(False, recurse=False)
    if not _hooks(model):
        model.register_forward_hook(GiveBack())


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All ranks: inside, forward passes read whole weights and do not communicate. Nothing to do for one process.

    Costs the memory of the whole model. For generation: sharded, every step of every rank would have to wait for all
    others, who generate answers of other lengths.
    """
    shards, hooks = _shards(model), _hooks(model)
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    for hook in hooks:
        hook.pauses = True
    try:
        yield
    finally:
        for hook in hooks:
            hook.pauses = False
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(not hooks, recurse=False)


def _shards(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _hooks(model: nn.Module) -> list[GiveBack]:
    return [hook for hook in model._forward_hooks.values() if isinstance(hook, GiveBack)]
