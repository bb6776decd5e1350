"""An estimate, before anything is allocated, of what training needs on one device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchft.losses.likelihood import CHUNK
from torchft.modules.decoder import Decoder

GIB = 2**30

# What a micro-step meets and leaves: none, then all of them; all of them, added up over micro-steps; or each one is
# freed as soon as its parameter has stepped (training/in_backward.py).
Gradients = Literal["new", "added", "freed"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes, each at its own peak, and the peak of them together, to expect within about 20%, without fragmentation."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept from forward to backward
    working: int  # what a block or the head needs while it runs
    total: int  # at once: less than the sum where gradients come as activations go

    def lines(self) -> dict[str, str]:
        """For a panel: name -> "1.23 GiB", the total last."""
        return {name: f"{size / GIB:.2f} GiB" for name, size in vars(self).items()}


def estimate_step(
    model: Decoder,
    *,
    tokens: int,
    saved: int,
    recomputed: int,
    largest: int,
    offload: float = 0.0,
    optimizer_bytes: int | None = None,
    gradients: Gradients = "new",
    shards: int = 1,
) -> Estimate:
    """Of training ``model`` on micro-steps of ``tokens``, from the measured cost of a block (`block_costs`).

    Backward frees a block's activations and leaves its gradients, the last block's first. What there is at one time
    changes evenly on the way, so that its peak is in the head, in the last block or in the first.

    Args:
        saved: bytes that a block keeps for backward in a micro-step.
        recomputed: bytes that it makes again in backward.
        largest: bytes of the largest tensor that a block makes.
        offload: share of what blocks keep that is on the host; on the device is that of two of them at a time.
        optimizer_bytes: of all ranks; None: two states per trained value, of its dtype.
        shards: ranks that share weights, gradients and states. Two blocks are whole at a time, and what is in no block
            always.
    """
    parameters = list(model.parameters())
    every = _trained_bytes(parameters) // shards
    layer = max(_trained_bytes(list(layer.parameters())) for layer in model.layers)
    table = model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    of_table = _trained_bytes([table])
    hidden = tokens * model.config.dim * model.embed_tokens.weight.itemsize
    logits = min(tokens, CHUNK) * model.config.vocab_size * model.embed_tokens.weight.itemsize
    summed = table.numel() * 4 + of_table if of_table else 0  # the head's gradient over chunks, in fp32, and cast
    head = logits + 3 * hidden + summed
    block = recomputed + 3 * largest  # a gated MLP's backward has three gradients of its width at once
    activations = round(saved * ((1 - offload) * len(model.layers) + offload * min(len(model.layers), 2)))
    weights = sum(map(stored_bytes, parameters)) // shards
    if shards > 1:
        blocks = [sum(map(stored_bytes, layer.parameters())) for layer in model.layers]
        weights += 2 * max(blocks) + sum(map(stored_bytes, parameters)) - sum(blocks)
    optimizer = 2 * every if optimizer_bytes is None else optimizer_bytes // shards

    before = every if gradients == "added" else 0
    after_head = {"new": of_table, "added": every, "freed": 0}[gradients]
    in_head = before + activations + head
    in_last_block = after_head + activations + block + layer
    in_first_block = 0 if gradients == "freed" else every + saved + block
    return Estimate(
        weights=weights,
        gradients=max(layer, of_table) if gradients == "freed" else every,
        optimizer=optimizer,
        activations=activations,
        working=max(head, block),
        total=weights + optimizer + max(in_head, in_last_block, in_first_block),
    )


def stored_bytes(tensor: Tensor) -> int:
    """Bytes in memory: of a quantised tensor, of the tensors that it is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def _trained_bytes(parameters: Sequence[Tensor]) -> int:
    return sum(p.nbytes for p in parameters if p.requires_grad)


def available_bytes(model: nn.Module, device: torch.device) -> int:
    """Bytes for this model on ``device``: what is free, and what the model has already."""
    free, _ = torch.cuda.mem_get_info(device)
    own = sum(stored_bytes(t) for t in model.parameters() if t.device == device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached + own
