"""A sharded model that generates: whole on every rank meanwhile, so that no rank waits for another."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All ranks: inside, forward passes read whole weights and do not communicate. Nothing to do for one process.

    Costs the memory of the whole model. (Sharded, every step of every rank would have to wait for all others, who
    generate answers of other lengths.)
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)
