"""Adapters in the dtype that they are used in, cast once for many steps: at each use that is a kernel per matrix."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from torchft.adapters.lora import lora_layers
from torchft.modules.decoder import Decoder
from torchft.ranks import local

NAMES = ("lora_a", "lora_b")


class NarrowAdapters:
    """Copies that keep their memory, as CUDA graphs want. DoRA's layers, which compute in fp32, stay as they are."""

    def __init__(self, model: Decoder) -> None:
        self._dtype = model.embed_tokens.weight.dtype
        self._layers = [layer for layer in lora_layers(model).values() if layer.lora_magnitude is None]
        self._copies: list[Tensor] = []

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the adapters are their values as of now."""
        places = [(layer._parameters, name) for layer in self._layers for name in NAMES]
        held = [parameters[name] for parameters, name in places]
        values = [local(value).detach() for value in held if value is not None and value.dtype != self._dtype]
        if not places or len(values) != len(places):  # nothing to cast
            yield
            return
        if [copy.shape for copy in self._copies] == [value.shape for value in values]:
            torch._foreach_copy_(self._copies, values)
        else:
            self._copies = [value.to(self._dtype) for value in values]
        try:
            for (parameters, name), copy in zip(places, self._copies):
                parameters[name] = copy  # type: ignore[assignment]  # no Parameter, as it is not trained
            yield
        finally:
            for (parameters, name), value in zip(places, held):
                parameters[name] = value
