"""Optimizers as components, gradient clipping, and the checks that keep a bad step out of the weights."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from torchft.errors import UserError
from torchft.ranks import gather, local, num_copies

log = logging.getLogger(__name__)

Groups = Iterable[dict[str, Any]]


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters, named, in two groups: matrices take the optimizer's weight decay; norms and biases none."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in trainable if p.ndim >= 2]
    vectors = [(name, p) for name, p in trainable if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class MuonWithAdamW(Optimizer):
    """Muon for the hidden matrices and AdamW for the rest (embeddings, output head, norms, biases), as one optimizer.

    Needs the named groups of ``param_groups``: a matrix named ``embed_tokens`` or ``lm_head`` is AdamW's. Muon's
    update is scaled to AdamW's root mean square (https://arxiv.org/abs/2502.16982), so both share ``lr`` and the
    weight decay; ``adamw_lr`` sets another for AdamW's part. Muon itself: https://kellerjordan.github.io/posts/muon/
    """

    def __init__(
        self,
        params: Groups,
        *,
        lr: float = 1e-3,
        adamw_lr: float | None = None,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        groups = [
            {**group, "params": part, "muon": is_muon, "lr": lr if is_muon or adamw_lr is None else adamw_lr}
            for group in params
            for is_muon in (True, False)
            if (part := [(n, p) for n, p in group["params"] if _is_hidden_matrix(n, p) == is_muon])
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        hidden, rest = self._split()
        self._parts: list[Optimizer] = []
        if hidden:
            self._parts.append(Muon(hidden, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self._parts.append(AdamW(rest, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True))
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure else None
        self._share()  # the groups of now: stepping in backward shows one parameter at a time
        for part in self._parts:
            part.step()
        return loss

    def _split(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return [g for g in self.param_groups if g["muon"]], [g for g in self.param_groups if not g["muon"]]

    def _share(self) -> None:
        """Both parts work on this optimizer's own groups and state, so that schedules and checkpoints see one."""
        hidden, rest = self._split()
        for part in self._parts:
            part.state = self.state
            part.param_groups = hidden if isinstance(part, Muon) else rest


def _is_hidden_matrix(name: str, param: Tensor) -> bool:
    return param.ndim == 2 and "embed" not in name and "lm_head" not in name


@torch.no_grad()
def clip_grad_norm(params: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scales the gradients to a total 2-norm of at most ``max_norm`` (None: leaves them) and returns the norm before.

    Norms are fp32 even if the gradients are bf16, where torch.nn.utils.clip_grad_norm_ rounds each to 8 bits. A norm
    that is not finite scales nothing, so that ``check_finite`` can tell which gradients are at fault. All ranks call
    it, and get the norm of the whole gradients.
    """
    found = [p.grad for p in params if p.grad is not None]
    if not found:
        return torch.zeros(())
    grads = [local(grad) for grad in found]
    total = total_norm(found, torch._foreach_norm(grads, 2, dtype=torch.float32))
    if max_norm is not None and max_norm < (norm := total.item()) < math.inf:
        scale = max_norm / (norm + 1e-6)
        if grads[0].is_cuda:  # one kernel, in fp32; a 0-dim tensor of another dtype would make it one by one
            torch._foreach_mul_(grads, scale)
        else:  # where _foreach_mul_ would round the scale to bf16 first
            for grad in grads:
                grad.mul_(scale)
    return total


def total_norm(tensors: Sequence[Tensor], norms: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all ``tensors`` from the ``norms`` of this rank's parts of them, fp32. All ranks call it."""
    if not any(isinstance(t, DTensor) for t in tensors):
        return torch.linalg.vector_norm(torch.stack(list(norms)))
    squares = torch.stack(list(norms)).square()
    copies = torch.tensor([num_copies(t) for t in tensors], device=squares.device)  # which the sum meets too often
    total = (squares / copies).sum()
    dist.all_reduce(total)
    return total.sqrt()


def check_finite(
    step: int,
    *,
    loss: Tensor | float,
    grad_norm: Tensor,
    model: nn.Module,
    rows: Sequence[object] = (),
    own_loss: Tensor | float | None = None,
) -> None:
    """Call before ``optimizer.step()``. UserError naming step, loss, norm, batch rows and the first bad parameters.

    All ranks call it with the ``loss`` and ``grad_norm`` of all, so that all stop or none, and with their ``own_loss``
    and ``rows``: those of the ranks at fault are named.
    """
    if torch.isfinite(torch.as_tensor(loss)).all() and torch.isfinite(grad_norm):
        return
    parts = {n: local(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    mine = [n for n, grad in parts.items() if not torch.isfinite(grad).all()]
    is_mine = own_loss is not None and not math.isfinite(float(own_loss))
    everyone = gather((mine, is_mine, [str(row) for row in rows]))
    bad = list(dict.fromkeys(name for names, _, _ in everyone for name in names))
    at_fault = [r for r, (_, is_theirs, _) in enumerate(everyone) if is_theirs]
    where = f"gradients of {len(bad)} parameters: {', '.join(bad[:5])}" if bad else "no parameter's gradient"
    read = [row for r, (_, _, theirs) in enumerate(everyone) if r in at_fault or not at_fault for row in theirs]
    batch = f"; rows of this batch: {', '.join(read)}" if read else ""
    whose = f" on rank {', '.join(map(str, at_fault))}" if at_fault and len(everyone) > 1 else ""
    raise UserError(
        f"step {step}: loss {float(loss)}, gradient norm {float(grad_norm)}: not finite{whose} in {where}{batch}. "
        "Stopped before the optimizer step: the weights are those of the previous step. Look at these rows, lower the "
        "learning rate, or lengthen the warm-up",
        is_shared=True,
    )


@torch.no_grad()
def frozen_share(params: Iterable[Tensor], lr: float) -> float:
    """Share of weights that one AdamW step of size ``lr`` leaves bit-equal, as bf16 has only 8 bits of mantissa.

    Looks at up to 65536 weights of each parameter. fp32 weights count too: they almost always move.
    """
    same = total = 0
    for p in params:
        w = p.detach().flatten()[:: max(1, p.numel() // 65536)]
        same += int(((w.float() - lr).to(w.dtype) == w).sum())
        total += w.numel()
    return same / total if total else 0.0


def warn_if_frozen(params: Iterable[Tensor], lr: float, *, limit: float = 0.1) -> None:
    """Warns once, at the start, if more than ``limit`` of the weights could not move at the peak learning rate."""
    if (share := frozen_share(params, lr)) > limit:
        log.warning(
            "lr %g is below the resolution of %.0f%% of the bf16 weights: they would not change. "
            "Use torchft.training.stochastic.AdamWStochastic, raise lr, set dtype to fp32, or train LoRA, whose "
            "adapters are fp32",
            lr,
            100 * share,
        )
