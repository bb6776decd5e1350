"""Looks at the slots that do not hold the device up: what was asked for before the next steps is read as they run."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from torchft.generation.requests import Running
from torchft.generation.send import send
from torchft.generation.slots import Slots


@dataclass(frozen=True)
class Look:
    """How far each slot was behind the steps before it, and what ran there."""

    state: Tensor  # [2, slots] int64 on the host, once ``taken``: tokens drawn, and whether its request is done
    taken: torch.cuda.Event | None
    running: dict[int, Running]  # by slot


class Reader:
    """Takes looks and reads what they found. A slot's answer up to a look never changes, whatever is computed since."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._stream = torch.cuda.Stream(slots.token.device) if slots.token.is_cuda else None
        self.is_apart = self._stream is not None  # a look is best read behind the next one

    def look(self, running: dict[int, Running]) -> Look:
        """Of what the steps that are queued by now will have done."""
        state = torch.stack((self._slots.count, self._slots.is_done.long()))
        if self._stream is None:
            return Look(state, None, dict(running))
        host = torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
        host.copy_(state, non_blocking=True)
        taken = torch.cuda.Event()
        taken.record(torch.cuda.current_stream(state.device))
        return Look(host, taken, dict(running))

    def progress(self, look: Look) -> tuple[list[int], list[int]]:
        """By slot, tokens drawn and whether the request is done. Waits for the steps before ``look``."""
        if look.taken:
            look.taken.synchronize()
        counts, done = look.state.tolist()
        return counts, done

    def answers(self, look: Look, slots: list[int], *, most: int) -> tuple[list[list[int]], list[list[float]]]:
        """The first ``most`` tokens of ``slots`` and their log-probabilities."""
        beside: AbstractContextManager = torch.cuda.stream(self._stream) if self._stream else nullcontext()
        with beside:
            if self._stream and look.taken:
                self._stream.wait_event(look.taken)
            index = send(slots, device=self._slots.token.device)
            return self._slots.answers[index, :most].tolist(), self._slots.logps[index, :most].tolist()
