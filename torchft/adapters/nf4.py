"""A frozen base in 4-bit NormalFloat (QLoRA, https://arxiv.org/abs/2305.14314): about 0.52 bytes a weight.

Contract with the loader: none. ``apply_nf4`` works on the meta-device model; after ``model.to_empty(device=...)`` the
usual ``param.copy_(full)`` quantises. Cast the model to its dtype *before*: ``.to(dtype)`` dequantises.

Torchao's kernel is plain PyTorch. Compiled blocks keep the dequantised weights for backward, unless ``recompute`` is
on; then memory is really that of 4 bits.
"""

from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import nn

from torchft.adapters.targets import ALL_LINEAR, find_linears
from torchft.errors import UserError

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale ("double quantisation")


@dataclass(frozen=True, kw_only=True)
class NF4Config:
    """The ``nf4:`` section of a config."""

    targets: str | list[str] = ALL_LINEAR  # pattern(s) of linear layers; all-linear = every one but lm_head


def apply_nf4(model: nn.Module, config: NF4Config, *, device: torch.device | str) -> list[str]:
    """Freeze the weight of each linear layer that ``config.targets`` matches and hold it in NF4. Returns their names.

    A weight on the meta device is quantised when it is loaded onto ``device``, any other at once. Call it before
    ``apply_lora``. Raises UserError for a pattern that matches nothing and for layers whose size does not fit.
    """
    layers = find_linears(model, config.targets, key="nf4.targets")
    problems = [
        f"nf4.targets: {name} has {layer.out_features} x {layer.in_features} = {layer.weight.numel()} weights, not a "
        f"multiple of {BLOCK * SCALE_BLOCK} as NF4 needs: leave it out of the targets"
        for name, layer in layers.items()
        if layer.weight.numel() % (BLOCK * SCALE_BLOCK)
    ]
    if problems:
        raise UserError(*problems)
    for layer in layers.values():
        layer.weight = nn.Parameter(_to_nf4(layer.weight.detach(), device), requires_grad=False)
    return list(layers)


def _to_nf4(weight: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    # Imported here: it takes 3.7 s and logs lines about absent libraries, which only those who quantise should see.
    if tuple(int(part) for part in version("torchao").split(".")[:2]) >= (0, 18):
        from torchao.quantization import to_nf4
    else:  # goes with torch 2.11
        from torchao.dtypes.nf4tensor import to_nf4
    quantised = to_nf4(weight, BLOCK, SCALE_BLOCK)
    if weight.is_meta:  # to_empty brings all of an NF4 tensor to the device but these two small ones
        quantised.nf4 = torch.empty_like(quantised.nf4, device=device)
        quantised.scaler_mean = torch.empty_like(quantised.scaler_mean, device=device)
    return quantised
