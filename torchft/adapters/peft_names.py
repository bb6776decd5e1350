"""Where PEFT keeps an adapter's numbers.

A linear layer's A and B are weights of two linear layers beside it. For the stacked parameters of a module of experts
(``target_parameters``) PEFT wraps the module once per parameter, so that the last one has the module's own name and
those before it ``.base_layer``; A is [e * rank, in], B [out, rank * e] with the experts innermost. Where transformers
holds [e, in, out] and does not say so (Llama 4), PEFT ``swaps`` in and out: its B has our A, its A our B.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from torchft.adapters.lora import LoRALinear
from torchft.adapters.peft_files import PREFIX, SUFFIXES, Adapter
from torchft.adapters.stacked import StackedLoRA
from torchft.modules.grouped import StackedLinear

Layer = LoRALinear | StackedLoRA
Kind = Literal["as it is", "stacked a", "stacked b"]
HALVES = {"gate_up_proj": ("gate_proj", "up_proj")}  # what two equal parts of an expert's rows are called


@dataclass(frozen=True)
class Slot:
    """A tensor of PEFT's file, and the ``parameter`` that it has the numbers of."""

    parameter: nn.Parameter
    kind: Kind = "as it is"
    swaps: bool = False

    @property
    def shape(self) -> list[int]:
        return list(self.to_peft(torch.empty(self.parameter.shape, device="meta")).shape)

    def to_peft(self, values: Tensor) -> Tensor:
        """``values`` of the whole parameter as PEFT has them."""
        if self.kind == "as it is":
            return values
        values = values.mT if self.swaps else values
        return values.flatten(0, 1) if self.kind == "stacked a" else values.permute(1, 2, 0).flatten(1)

    def from_peft(self, tensor: Tensor) -> Tensor:
        if self.kind == "as it is":
            return tensor
        num_experts, *matrix = self.parameter.shape
        rows, columns = reversed(matrix) if self.swaps else matrix
        if self.kind == "stacked a":
            tensor = tensor.view(num_experts, rows, columns)
        else:
            tensor = tensor.view(rows, columns, num_experts).permute(2, 0, 1)
        return tensor.mT if self.swaps else tensor


def slots(layers: Mapping[str, Layer], *, swaps: bool = False) -> dict[str, Slot]:
    """For adapted layers by their Hub names: PEFT's tensor names and what is in them."""
    paths = wrapped([name for name, layer in layers.items() if isinstance(layer, StackedLoRA)])
    found = {}
    for name, layer in layers.items():
        for child, parameter in layer.named_parameters(recurse=False):
            if child in SUFFIXES:
                if not isinstance(layer, StackedLoRA):
                    found[PREFIX + name + SUFFIXES[child]] = Slot(parameter)
                    continue
                place = "lora_b" if swaps == (child == "lora_a") else "lora_a"
                kind: Kind = "stacked a" if place == "lora_a" else "stacked b"
                found[PREFIX + paths[name] + SUFFIXES[place]] = Slot(parameter, kind, swaps)
    return found


def wrapped(names: list[str]) -> dict[str, str]:
    """PEFT's module names for stacked layers of these Hub names, in the model's order."""
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: module + ".base_layer" * (len(children) - 1 - i)
        for module, children in modules.items()
        for i, name in enumerate(children)
    }


def adapted(adapter: Adapter, layers: Mapping[str, nn.Linear | StackedLinear]) -> tuple[dict[str, int], list[str]]:
    """Ranks by the Hub's names of what a file adapts among ``layers`` (by Hub names), and PEFT's names of the rest."""
    targets = tuple(f".{target}" for target in adapter.settings["target_parameters"] or [])
    stacked = {n: x for n, x in layers.items() if isinstance(x, StackedLinear) and f".{n}".endswith(targets)}
    paths = {path: name for name, path in wrapped(list(stacked)).items()}
    ranks, unknown = {}, []
    for path, rows in adapter.ranks.items():
        name = paths.get(path, path)
        if name in stacked:
            ranks[name] = rows // stacked[name].num_experts
        elif isinstance(layers.get(name), nn.Linear):
            ranks[name] = rows
        else:
            unknown.append(name)
    return ranks, unknown


def expert_names(name: str, layer: StackedLoRA) -> list[str]:
    """What vLLM calls the layers of one expert each in the stacked layer that the Hub calls ``name``, in order."""
    module, _, word = name.rpartition(".")
    return [f"{module}.{expert}.{part}" for expert in range(layer.num_experts) for part in HALVES.get(word, (word,))]


def expert_tensors(name: str, layer: StackedLoRA, a: Tensor, b: Tensor) -> Iterator[tuple[str, Tensor]]:
    """All of the adapter's ``a`` [e, rank, in] and ``b`` [e, out, rank] as those of layers of one expert each."""
    names = iter(expert_names(name, layer))
    for own_a, own_b in zip(a, b, strict=True):
        for rows in own_b.chunk(len(HALVES.get(name.rpartition(".")[2], " "))):
            part = next(names)
            yield PREFIX + part + SUFFIXES["lora_a"], own_a.clone()  # a file holds no tensor under two names
            yield PREFIX + part + SUFFIXES["lora_b"], rows
