"""The gradient of a loss of many embeddings together, with the memory of a few (GradCache,
https://arxiv.org/abs/2101.06983)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchft.data.batch import Batch


def backward_together(
    batches: Sequence[Batch], embed: Callable[[Batch], Tensor], loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """Backward of ``loss`` of what ``embed`` gives for all ``batches``, [n, ...] concatenated; returns the loss.

    Several batches are embedded twice: once without keeping anything, for the loss and its gradient with respect to
    the embeddings, and once more, one by one, to bring that to the weights. The second time draws the same random
    numbers. The gradient is that of one large batch.
    """
    if len(batches) == 1:
        value = loss(embed(batches[0]))
        value.backward()
        return value.detach()
    parts, states = [], []
    device = batches[0].tokens.device
    devices = [device] if device.type == "cuda" else []
    for batch in batches:
        states.append((torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]))
        with torch.no_grad():
            parts.append(embed(batch))
    embedded = torch.cat(parts).requires_grad_()
    value = loss(embedded)
    value.backward()
    assert embedded.grad is not None
    for batch, (state, on_device), grad in zip(batches, states, embedded.grad.split([len(part) for part in parts])):
        with torch.random.fork_rng(devices):
            torch.set_rng_state(state)
            for d, s in zip(devices, on_device):
                torch.cuda.set_rng_state(s, d)
            (embed(batch) * grad).sum().backward()
    return value.detach()
