"""Which base an adapter belongs to: digests that travel with it, so that it is not put on another, or merged twice."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from torchft.adapters.lora import lora_layers
from torchft.adapters.peft_fused import NONE, Fused, hub_module
from torchft.adapters.quantised import QuantisedWeight
from torchft.modules.grouped import StackedLinear
from torchft.ranks import local, whole

LAYERS = (nn.Linear, StackedLinear)
NUM_SAMPLES = 1024  # values of each tensor that go into a digest
MEANING = {
    "torchft.base": "its embedding and norms are another model's",
    "torchft.linears": "its linear layers are another model's, or this adapter is merged into them already",
}


def fingerprints(model: nn.Module, fused: Fused = NONE) -> dict[str, str]:
    """Digests of the base: of what is never quantised nor adapted, and of the adapted weights if none is quantised.

    A layer that is ``fused`` on the Hub counts whole if a part of it is adapted. All ranks call it.
    """
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, LAYERS)}
    base = {n: p for n, p in model.named_parameters() if n not in linears and ".lora_" not in n}
    names = {hub_module(name, fused) for name in lora_layers(model)}
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LAYERS) and hub_module(n, fused) in names]
    adapted = {name: layer.weight for name, layer in layers}
    digests = {"torchft.base": _digest(base)}
    if not any(isinstance(local(weight), QuantisedWeight) for weight in adapted.values()):
        digests["torchft.linears"] = _digest(adapted)
    return digests


def differences(stored: Mapping[str, str], model: nn.Module, fused: Fused = NONE) -> Iterator[str]:
    """What speaks against ``model`` being the base that ``stored`` was made of. One without a twin says nothing."""
    for kind, digest in fingerprints(model, fused).items():
        if stored.get(kind, digest) != digest:
            yield f"the adapter was trained on another base than this model: {MEANING[kind]}"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes and some values of each tensor; the same for an fp32 and a bf16 copy of a checkpoint."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        sample = whole(tensor).flatten()[:: max(1, tensor.numel() // NUM_SAMPLES)].contiguous()
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(bytes(sample.to("cpu", torch.bfloat16).view(torch.uint8).tolist()))
    return digest.hexdigest()
