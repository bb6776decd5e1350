"""Int4 weights that are rounded with an eye to the inputs they meet (AWQ, https://arxiv.org/abs/2306.00978).

Columns that meet large inputs are made larger before a weight is rounded, and so more exact; the inputs are made
smaller by as much when the layer computes. torchao searches how far, by the error of the layer's outputs; the inputs
that it needs for that are kept of one block at a time.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchft.modules.decoder import Decoder


class Reached(Exception):
    """What follows in the model need not be computed."""


@torch.no_grad()
def column_scales(
    model: Decoder,
    samples: Iterable[Sequence[int]],
    layers: Mapping[str, Sequence[str]],
    weight: Callable[[str], Tensor],
    config: Any,
) -> dict[str, Tensor]:
    """By what the columns of each weight are multiplied before it is rounded, [in] fp32 on the CPU.

    Args:
        samples: token ids; a few tens of thousands of tokens are enough. Their inputs to one block's layers are held.
        layers: weight -> the names of the model's layers whose rows it holds, which have the same inputs.
        weight: gives one by its name, [out, in] on the CPU.
        config: torchao's, of weights alone.
    """
    from torchao.prototype.awq.core import AWQObserver  # slow to import

    blocks: dict[int | None, list[str]] = {}  # None: outside of blocks
    for name, parts in layers.items():
        match = re.match(r"layers\.(\d+)\.", parts[0])
        blocks.setdefault(int(match[1]) if match else None, []).append(name)
    device, scales = model.embed_tokens.weight.device, {}
    for block, names in blocks.items():
        inputs = _inputs(model, samples, {name: model.get_submodule(layers[name][0]) for name in names}, block)
        for name in names:
            observer = AWQObserver(weight(name).to(device, torch.float32), None, config)
            observer.inputs = inputs.pop(name)
            scales[name] = observer.calculate_qparams().cpu()
    return scales


def _inputs(
    model: Decoder, samples: Iterable[Sequence[int]], layers: Mapping[str, nn.Module], block: int | None
) -> dict[str, list[Tensor]]:
    """What each of ``layers``, which are in one block, gets of each sample: [tokens, in] fp32 on the CPU."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name].append(args[0].flatten(0, -2).float().cpu())

    def stop(*_: Any) -> None:
        raise Reached

    hooks = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer in layers.items()]
    if block is not None:
        hooks.append(model.layers[block].register_forward_hook(stop))
    try:
        for tokens in samples:
            with suppress(Reached):
                model(torch.tensor([tokens], device=model.embed_tokens.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found
