"""Stepping each parameter during backward, as soon as its gradient is whole, so that the gradients never add up.

    in_backward = InBackward(optimizer, model)     # instead of optimizer.step() and zero_grad()
    loss.backward()
    grad_norm = in_backward.finish(step, loss=loss)
    schedule.step()

The optimizer stays the one that schedules and checkpoints see. Global-norm clipping and accumulation over micro-steps
need all gradients at once, so they cannot go with it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchft.errors import UserError
from torchft.ranks import local
from torchft.training.optim import total_norm


class InBackward:
    """Hooks on the optimizer's parameters that step one each, and free its gradient.

    Saves one gradient per weight (16 GB of 8B bf16 weights) but those of the block that backward is in.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self._optimizer = optimizer
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self._norms: dict[str, Tensor] = {}  # of this step's gradients, by parameter
        self._hooks = [
            p.register_post_accumulate_grad_hook(lambda p, group=group: self._step(p, group))
            for group in optimizer.param_groups
            for p in group["params"]
        ]

    def finish(self, step: int, *, loss: Tensor | float, rows: Sequence[object] = ()) -> Tensor:
        """Call after backward: the 2-norm of all gradients, fp32. UserError if it or the loss is not finite.

        The weights have taken the step by then. Waiting for each norm before its parameter's step would stall the
        device for every parameter, and not save the run either: later layers would be a step ahead of earlier ones.
        """
        norms, self._norms = self._norms, {}
        stepped = [p for p, name in self._names.items() if name in norms]  # sharded as their gradients were
        total = total_norm(stepped, [norms[self._names[p]] for p in stepped]) if norms else torch.zeros(())
        if torch.isfinite(torch.as_tensor(loss)).all() and torch.isfinite(total):
            return total
        bad = [name for name, norm in norms.items() if not torch.isfinite(norm)]
        where = f"gradients of {len(bad)} parameters: {', '.join(bad[:5])}" if bad else "no parameter's gradient"
        batch = f"; rows of this batch: {', '.join(map(str, rows))}" if rows else ""
        raise UserError(
            f"step {step}: loss {float(loss)}, gradient norm {float(total)}: not finite in {where}{batch}. With "
            "optimizer_in_backward the weights have already taken this step, and nothing of them is saved: look at "
            "these rows, lower the learning rate, or lengthen the warm-up, then go on from the newest checkpoint",
            is_shared=True,
        )

    def remove(self) -> None:
        """Takes the hooks off: ``optimizer.step()`` is the caller's again."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _step(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        self._norms[self._names[p]] = torch.linalg.vector_norm(local(p.grad), dtype=torch.float32)
        optimizer = self._optimizer
        groups, params = optimizer.param_groups, group["params"]
        optimizer.param_groups, group["params"] = [group], [p]  # for this step, all that the optimizer has
        optimizer.step()
        optimizer.param_groups, group["params"] = groups, params
        p.grad = None
