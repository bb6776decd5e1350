"""A step of one token per slot, compiled, and full prefills, apart from what training has compiled of the blocks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from torchft import compiling
from torchft.generation.slots import Slots
from torchft.modules.decoder import Decoder

Compile = Literal["auto"] | bool  # a key of configs


def backend_of(setting: Compile, device: torch.device) -> str | None:
    """For `Engine`, whether to compile. "auto": on a GPU, where a step is many small kernels."""
    return "inductor" if setting is True or (setting == "auto" and device.type == "cuda") else None


class CompiledStep:
    """Blocks, output layer and draws of a step, compiled at the first one. All layers of a kind share a graph.

    Blocks have another graph for each shape of prefill that runs inside ``used``.

    ``backend``: torch.compile's. For a single slot inductor makes and tunes kernels of its own for the products with
    weights, as cuBLAS does not reach the memory's speed (https://pytorch.org/blog/accelerating-generative-ai-2/).
    """

    def __init__(self, model: Decoder, slots: Slots, *, backend: str) -> None:
        compiling.prepare()
        how: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
        if backend == "inductor" and slots.num_slots == 1:
            how["options"] = {"coordinate_descent_tuning": True}  # also makes a product with one row a sum
        slots.head, slots.sample = torch.compile(slots.head, **how), torch.compile(slots.sample, **how)
        self._layers = list(model.layers)
        self._calls: list[Callable[..., Any]] = [torch.compile(layer._call_impl, **how) for layer in self._layers]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, calls of blocks are these; outside they stay what they were, training's own or none."""
        kept = [layer._compiled_call_impl for layer in self._layers]
        try:
            self._set(self._calls)
            with torch.compiler.set_stance("default"):
                yield
        finally:
            self._set(kept)

    def _set(self, calls: Sequence[Callable[..., Any] | None]) -> None:
        for layer, call in zip(self._layers, calls):
            layer._compiled_call_impl = call  # what nn.Module.compile sets
