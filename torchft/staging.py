"""Tensors on their way from mapped files to a GPU."""

import torch
from torch import Tensor

CHUNK = 32 << 20  # bytes of a buffer


class Staging:
    """Sends tensors to ``device`` through two pinned buffers: one is filled, by all cores, while the other is sent.

    Straight from a file's mapping the driver copies through a buffer of its own with one thread, after one page fault
    at a time. On a device that is no GPU tensors are passed on as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        pins = device.type == "cuda"
        self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)] if pins else []
        self._sent = [torch.cuda.Event() for _ in self._buffers]
        self._turn = 0

    def send(self, tensor: Tensor) -> Tensor:
        """``tensor``, on the CPU, as a new one on the device, whole when the device's current stream gets there."""
        if not self._buffers:
            return tensor
        tensor = tensor.contiguous()  # a rank's columns, or a transposed matrix
        result = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        for source, target in zip(*(t.view(-1).view(torch.uint8).split(CHUNK) for t in (tensor, result)), strict=True):
            self._turn = 1 - self._turn
            self._sent[self._turn].synchronize()  # what this buffer held before has left
            buffer = self._buffers[self._turn][: len(source)]
            target.copy_(buffer.copy_(source), non_blocking=True)
            self._sent[self._turn].record(torch.cuda.current_stream(self._device))
        return result
