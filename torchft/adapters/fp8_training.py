"""Full fine-tuning with products in 8-bit floating point, by torchao's float8 training.

Weights, gradients and optimizer states keep their dtype; inputs, weights and gradients are cast to fp8 for each of a
layer's three products, in every step. Names and checkpoints do not change. Compile it: the casts take longer than fp8
saves if they are kernels of their own.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from torchft.adapters.fp8 import unfit
from torchft.adapters.targets import ALL_LINEAR, find_linears
from torchft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FP8TrainingConfig:
    """The ``fp8:`` section of a config for training all weights."""

    recipe: Literal["tensorwise", "rowwise"] = "rowwise"  # one scale per tensor is faster, one per row more exact


def apply_fp8_training(model: nn.Module, config: FP8TrainingConfig, *, device: torch.device) -> list[str]:
    """Have every linear layer of ``model`` but the output head compute in fp8. Returns their names.

    Call it on the finished model, on meta or not, before compile; parameters and their names stay. GPUs from compute
    capability 8.9 on; other devices multiply the rounded values in fp32. Raises UserError for layers that do not fit
    and for a GPU ``device`` without fp8.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # slow to import

    layers = find_linears(model, ALL_LINEAR, key="fp8")
    way_out = "a model with such layers cannot train in fp8, leave the fp8 section out"
    if problems := unfit(layers, key="fp8", way_out=way_out, device=device):
        raise UserError(*problems)
    # A weight's gradient sums over tokens, whose number must be a multiple of 16 too: padded with zeros if it is not.
    settings = replace(
        Float8LinearConfig.from_recipe_name(config.recipe), emulate=device.type != "cuda", pad_inner_dim=True
    )
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in layers, config=settings)
    return list(layers)
