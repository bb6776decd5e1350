"""Loss and speed between two reports."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from torchft.modules.decoder import Decoder
from torchft.modules.moe import MoE
from torchft.ranks import gather
from torchft.training.environment import device_name, seconds_since_start
from torchft.training.metrics import Row, flops_per_token, mfu, peak_flops, peak_memory_gib


class Meter:
    """Collects steps and turns them into a row of metrics.jsonl: means and speeds since the row before."""

    def __init__(self, device: torch.device, *, flops_per_token: float) -> None:
        self._device, self._flops = device, flops_per_token
        self._peak = peak_flops(device_name(device))
        self._began = time.perf_counter()
        self.start_to_first_step_s: float | None = None  # from the command to the end of this session's first step
        self._is_new = self._is_first_row = True
        self._reset()

    def add(self, loss: Tensor, *, tokens: int, supervised: int) -> None:
        """One optimizer step: its mean loss per supervised token, this rank's tokens, the supervised ones of all."""
        if self._is_new:
            loss.item()  # waits for the step, this once
            self.start_to_first_step_s, self._is_new = seconds_since_start(), False
        self._losses.append(loss)
        self._tokens += tokens
        self._supervised += supervised

    def row(self, step: int, *, lr: float, grad_norm: Tensor) -> Row:
        """What has come in since the last row; waits for the device. The first one has ``start_to_first_step_s``.

        All ranks call it: tokens are those of all, memory is that of the fullest, and ``mfu`` that of one device.
        """
        loss = torch.stack(self._losses).mean().item()
        seconds = time.perf_counter() - self._since - self._paused
        everyone = gather((self._tokens, peak_memory_gib(self._device)))
        tokens = sum(t for t, _ in everyone)
        speed = tokens / seconds
        row: Row = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm.item(),
            "tokens": tokens,
            "supervised_tokens": self._supervised,
            "tokens_per_second": speed,
            "mfu": mfu(speed / len(everyone), self._flops, self._peak),
            "peak_memory_gib": max(gib for _, gib in everyone),
            "time_s": time.perf_counter() - self._began,
        }
        if self._is_first_row and self.start_to_first_step_s is not None:
            row["start_to_first_step_s"] = self.start_to_first_step_s
        self._is_first_row = False
        self._reset()
        return row

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training, an evaluation or a checkpoint, so that it does not count as slow steps."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def _reset(self) -> None:
        self._losses: list[Tensor] = []
        self._tokens = self._supervised = 0
        self._since, self._paused = time.perf_counter(), 0.0


def training_flops(model: Decoder, *, seq_len: int) -> float:
    """FLOPs per token of training ``model``; ``seq_len`` is the mean length of a document."""
    share: dict[Tensor, float] = {  # of a token's experts among all: of their weights only so many multiply it
        parameter: module.router.top_k / module.router.num_experts
        for module in model.modules()
        if isinstance(module, MoE)
        for parameter in module.experts.parameters()
        if parameter.ndim == 3
    }
    matrices = [p for n, p in model.named_parameters() if (p.ndim == 2 or p in share) and "embed_tokens" not in n]
    head = [model.embed_tokens.weight] if model.lm_head is None else []  # a tied table multiplies too, as the head
    used = [(p.numel() * share.get(p, 1.0), p.requires_grad) for p in (*matrices, *head)]
    config = model.config
    return flops_per_token(
        num_matrix_params=round(sum(n for n, _ in used)),
        num_trainable=round(sum(n for n, trained in used if trained)),
        num_layers=config.num_layers,
        attention_dim=config.num_heads * config.head_dim,
        seq_len=seq_len,
    )
