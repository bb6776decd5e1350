"""Adapters of layers that are one matrix on the Hub and several here: Phi's qkv_proj and gate_up_proj, GLM 4's latter.

Exact both ways. The Hub's A is ours one over the other and its B has each of ours in its own rows and columns, so that
ranks add up. Of one that was trained on the Hub's layer each of ours gets all of A and its rows of B.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchft.adapters.lora import LoRALinear
from torchft.adapters.peft_files import PREFIX, SUFFIXES, Adapter
from torchft.adapters.stacked import StackedLoRA
from torchft.ranks import whole

Fused = Mapping[str, tuple[str, ...]]  # the Hub's layer -> ours, in order
NONE: Fused = {}
Layer = LoRALinear | StackedLoRA


def hub_module(name: str, fused: Fused) -> str:
    """Our layer's name, or that of the Hub's layer that it is a part of."""
    parent, _, word = name.rpartition(".")
    return next((f"{parent}.{layer}" for layer, parts in fused.items() if word in parts), name)


@torch.no_grad()
def joined(model: nn.Module, layers: Mapping[str, Layer], fused: Fused) -> dict[str, Layer]:
    """Adapted ``layers`` by our names, what is one on the Hub as one that computes the same. All ranks call it."""
    found: dict[str, Layer] = {}
    for name, layer in layers.items():
        on_hub = hub_module(name, fused)
        if on_hub == name:
            found[name] = layer
        elif on_hub not in found:
            parent, _, word = on_hub.rpartition(".")
            found[on_hub] = _join([model.get_submodule(f"{parent}.{part}") for part in fused[word]])
    return found


def _join(parts: list[nn.Module]) -> LoRALinear:
    linears = [part for part in parts if isinstance(part, nn.Linear)]
    adapted = [part for part in linears if isinstance(part, LoRALinear)]
    first = adapted[0]
    a = [whole(layer.lora_a).cpu() for layer in adapted]
    is_one = len(adapted) == len(parts) and all(torch.equal(other, a[0]) for other in a)  # trained on the Hub's layer
    rank = first.rank if is_one else sum(layer.rank for layer in adapted)
    layer = LoRALinear(
        nn.Linear(first.in_features, sum(linear.out_features for linear in linears), bias=False, device="meta"),
        rank,
        first.scaling * (math.sqrt(rank) if first.rslora else rank),
        dropout=first.dropout,
        rslora=first.rslora,
        dora=first.lora_magnitude is not None,
    )
    b = a[0].new_zeros(layer.out_features, rank)
    row = column = 0
    for linear in linears:
        if isinstance(linear, LoRALinear):
            own = whole(linear.lora_b).cpu() * (linear.scaling / first.scaling)
            b[row : row + linear.out_features, column : column + linear.rank] = own
            column += 0 if is_one else linear.rank
        row += linear.out_features
    layer.lora_a, layer.lora_b = nn.Parameter(a[0] if is_one else torch.cat(a)), nn.Parameter(b)
    if layer.lora_magnitude is not None:
        layer.lora_magnitude = nn.Parameter(torch.cat([_magnitude(linear) for linear in linears]))
    return layer


def _magnitude(linear: nn.Linear) -> Tensor:
    """DoRA's row lengths, which are the weight's own where nothing was trained."""
    if isinstance(linear, LoRALinear) and linear.lora_magnitude is not None:
        return whole(linear.lora_magnitude).cpu()
    return torch.linalg.vector_norm(whole(linear.weight).to(torch.float32), dim=1).cpu()


@dataclass(frozen=True)
class SplitFile:
    """What an open safetensors file gives, with other tensors."""

    tensors: dict[str, Tensor]
    about: dict[str, str]

    def keys(self) -> Iterator[str]:
        return iter(self.tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def metadata(self) -> dict[str, str]:
        return self.about


def split(adapter: Adapter, model: nn.Module, fused: Fused, hub_name: Callable[[str], str]) -> Adapter:
    """``adapter``, of whose layers those that are several of ``model`` are these."""
    parts: dict[str, list[tuple[str, int]]] = {}  # the Hub's layer -> Hub names and rows of ours
    for name, module in model.named_modules():
        on_hub = hub_module(name, fused)
        if on_hub != name and isinstance(module, nn.Linear):
            parts.setdefault(hub_name(on_hub), []).append((hub_name(name), module.out_features))
    found = {name: own for name, own in parts.items() if name in adapter.ranks}
    if not found:
        return adapter
    ranks = dict(adapter.ranks)
    origins: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    kept = {key: adapter.file.get_tensor(key) for key in adapter.file.keys()}  # noqa: SIM118 (not a dict)
    for name, own in found.items():
        rank = ranks.pop(name)
        for suffix in SUFFIXES.values():
            tensor = kept.pop(PREFIX + name + suffix, None)
            rows = [size for _, size in own]
            if tensor is None or (suffix != SUFFIXES["lora_a"] and len(tensor) != sum(rows)):
                continue  # is told as missing
            pieces = [tensor] * len(own) if suffix == SUFFIXES["lora_a"] else tensor.split(rows)
            tensors |= {PREFIX + part + suffix: piece for (part, _), piece in zip(own, pieces, strict=True)}
        ranks |= {part: rank for part, _ in own}
        origins |= {part: name for part, _ in own}
    file = SplitFile(kept | tensors, adapter.file.metadata() or {})
    return replace(adapter, ranks=ranks, origins=origins, file=file)
