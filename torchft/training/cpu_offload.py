"""AdamW whose states live in pinned host memory and visit the device only for their step."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchft.errors import UserError
from torchft.training.pinned import pinned_zeros
from torchft.training.stochastic import AdamWStochastic, adamw

PIECE = 32 << 20  # elements on the device at a time, whatever the size of a parameter
SLOTS = 3  # pieces on the device: one arrives, one is stepped, one leaves


class _Slot:
    """Device memory for the two moments of one piece, and the event after which it is free again."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.moments = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
        self.free = torch.cuda.Event()


class AdamWOffloaded(AdamWStochastic):
    """The same steps as AdamWStochastic's, bit for bit, with no optimizer state on the device but three small pieces.

    Pieces of both moments are copied in, stepped and copied out on streams of their own, both directions at once. A
    step takes what the slower direction takes: 4 bytes per weight with bf16 states, so 8B weights need 0.6 s at 55
    GB/s. With accumulation it is paid once per optimizer step. A weight needs 4 (bf16) or 8 (fp32) bytes of pinned host
    memory. CUDA only.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        state_dtype: Literal["bf16", "fp32"] = "bf16",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, state_dtype=state_dtype, seed=seed
        )
        every = [p for group in self.param_groups for p in group["params"]]
        if devices := {str(p.device) for p in every if not p.is_cuda}:
            raise UserError(
                f"optimizer: AdamWOffloaded is for weights on CUDA, not on {devices.pop()}; "
                "use torchft.training.stochastic.AdamWStochastic"
            )
        if any(isinstance(p, DTensor) for p in every):
            raise UserError(
                "optimizer: AdamWOffloaded does not work on weights that several processes share; "
                "use torchft.training.stochastic.AdamWStochastic, whose states are sharded with the weights"
            )
        for p in every:
            moments = {key: pinned_zeros(*p.shape, dtype=self.state_dtype) for key in ("exp_avg", "exp_avg_sq")}
            self.state[p] = {"step": 0, **moments}
        size = min(PIECE, max(p.numel() for p in every))
        self._slots = [_Slot(size, self.state_dtype, every[0].device) for _ in range(SLOTS)]
        self._arriving, self._leaving = torch.cuda.Stream(), torch.cuda.Stream()
        self._left = {p: torch.cuda.Event() for p in every}  # its states are whole again in host memory
        self._turn = 0
        torch.cuda.synchronize()  # the slots' memory may have been in use until now

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], given: dict[str, Tensor]) -> None:
        flat, flat_grad = p.detach().view(-1), grad.reshape(-1)
        hosts = [state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)]
        current = torch.cuda.current_stream()
        self._arriving.wait_event(self._left[p])
        for start in range(0, p.numel(), PIECE):
            part = slice(start, min(start + PIECE, p.numel()))
            slot = self._slots[self._turn % SLOTS]
            self._turn += 1
            moments = [moment[: part.stop - start] for moment in slot.moments]
            with torch.cuda.stream(self._arriving):
                self._arriving.wait_event(slot.free)
                for moment, host in zip(moments, hosts, strict=True):
                    moment.copy_(host[part], non_blocking=True)
            current.wait_stream(self._arriving)
            adamw(flat[part], flat_grad[part], moments[0], moments[1], self.starts[p] + start, given)
            self._leaving.wait_stream(current)
            with torch.cuda.stream(self._leaving):
                for moment, host in zip(moments, hosts, strict=True):
                    host[part].copy_(moment, non_blocking=True)
                slot.free.record()
        self._left[p].record(self._leaving)
