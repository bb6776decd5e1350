"""Quantisation-aware training (https://arxiv.org/abs/1712.05877): a layer computes with what its weight will be in few
bits, and what its inputs will be, while gradients go to the weight that is rounded, as if it were not.

Rounding is torchao's own, so that the quantised checkpoint computes bit for bit what was trained. Of an adapted layer
the weight with its adapter merged in is rounded: that is the one weight that a quantised checkpoint has. (Rounding the
base alone, and adding the adapter in 16 bits, trains a model that no quantised checkpoint is.) Its gradient costs what
it costs in full fine-tuning; optimizer states and checkpoints stay small.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.adapters.formats import torchao_config, unfit
from torchft.adapters.lora import LoRALinear, row_lengths
from torchft.adapters.targets import ALL_LINEAR, find_linears
from torchft.config import Range
from torchft.errors import UserError

ROUNDED = {"int4": (None, "int4"), "int8_int4": ("int8", "int4"), "fp8": ("fp8", "fp8")}  # format -> inputs, weights
OWN_LAYERS = ("mxfp4", "nvfp4")  # formats that torchao trains with products in few bits, in layers of its own


@dataclass(frozen=True, kw_only=True)
class QATConfig:
    """The ``qat:`` section of a config."""

    format: Literal["int4", "int8_int4", "fp8", "mxfp4", "nvfp4"] = "int4"  # adapters/formats.py
    group_size: Annotated[int, Range(min=2)] = 32  # weights of a row that share a scale, in int4
    targets: str | list[str] = ALL_LINEAR  # pattern(s) of linear layers; all-linear = every one but lm_head
    start_step: Annotated[int, Range(min=0)] = 0  # optimizer steps before rounding begins


class QATLinear(nn.Linear):
    """``F.linear`` of the rounded input and weight; parameters and their names are the layer's that it replaces."""

    def __init__(self, layer: nn.Linear, *, inputs: str | None, weights: str | None, group_size: int) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.inputs, self.weights, self.group_size = inputs, weights, group_size  # to what each is rounded
        self.rounds = True

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of x."""
        weight = self.weight
        if self.rounds:
            x, weight = rounded(x, self.inputs), rounded(weight, self.weights, self.group_size)
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, inputs={self.inputs}, weights={self.weights}, group_size={self.group_size}"


class QATLoRALinear(LoRALinear):
    """A ``LoRALinear`` that rounds its input, and its weight with the adapter merged in."""

    def __init__(self, layer: LoRALinear, *, inputs: str | None, weights: str | None, group_size: int) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(vars(layer))
        self.inputs, self.weights, self.group_size = inputs, weights, group_size
        self.rounds = True

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of x."""
        weight = self.merged() if self.enabled else self.weight
        if self.rounds:
            x, weight = rounded(x, self.inputs), rounded(weight, self.weights, self.group_size)
        return F.linear(x, weight, self.bias)

    def merged(self) -> Tensor:
        """The values of ``merged_weight``, [out, in], with their gradient."""
        rows = self.weight.to(torch.float32) + self.scaling * (self.lora_b.float() @ self.lora_a.float())
        if self.lora_magnitude is not None:
            rows = rows * (self.lora_magnitude / row_lengths(rows.detach())).unsqueeze(1)
        return rows.to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, inputs={self.inputs}, weights={self.weights}, group_size={self.group_size}"


def rounded(x: Tensor, to: str | None, group_size: int = 0) -> Tensor:
    """x in fewer bits: "int8" or "fp8" with a scale for each row, "int4" with one for each group, None: as it is.

    The gradient is that of x (straight through, https://arxiv.org/abs/1308.3432), also of what is clipped to the
    largest code, where torchao's is 0: a group's largest weight would never change.
    """
    if to is None:
        return x
    return _round(x.detach(), to, group_size) + (x - x.detach())  # plus an exact zero


@torch.library.custom_op("torchft::round", mutates_args=())
def _round(x: Tensor, to: str, group_size: int) -> Tensor:
    """An operator because the compiler would fuse it: without bf16's roundings in between, an eightieth of all int4
    codes is another one than the quantised checkpoint has, of fp8's a third."""
    rounding: Tensor = _rounding(to, group_size)(x)
    return rounding


@_round.register_fake
def _(x: Tensor, to: str, group_size: int) -> Tensor:
    return torch.empty_like(x)


@cache
def _rounding(to: str, group_size: int) -> Callable[[Tensor], Tensor]:
    """torchao's."""
    from torchao.quantization import PerRow
    from torchao.quantization.qat import Float8FakeQuantizeConfig, IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase  # slow to import

    if to == "fp8":
        return FakeQuantizerBase.from_config(Float8FakeQuantizeConfig(torch.float8_e4m3fn, PerRow()))
    if to == "int8":
        config = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    else:
        config = IntxFakeQuantizeConfig(torch.int4, group_size=group_size)  # type: ignore[attr-defined]  # torch's stubs
    config.scale_precision = None  # the input's dtype
    return FakeQuantizerBase.from_config(config)


def apply_qat(model: nn.Module, config: QATConfig, *, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Have each linear layer that ``config.targets`` matches round as it will when quantised. Returns their names.

    Call it on the finished model, adapters included, before compile and FSDP; ``dtype`` is the weights'. Raises
    UserError for a pattern that matches nothing, and for what ``device`` cannot train or convert.
    """
    layers = find_linears(model, config.targets, key="qat.targets")
    problems = unfit(layers, config.format, group_size=config.group_size, device=device, dtype=dtype, section="qat.")
    if any(isinstance(layer, LoRALinear) and layer.dropout for layer in layers.values()):
        problems.append("lora.dropout: a merged weight has no dropout of its adapter's inputs: set it to 0 with qat")
    if config.format in OWN_LAYERS and any(isinstance(layer, LoRALinear) for layer in layers.values()):
        problems.append(f"lora: {config.format} is trained without adapters: leave lora out, or take int4 or fp8")
    if problems:
        raise UserError(*problems)
    for name, layer in layers.items():
        model.set_submodule(name, _rounding_layer(layer, config))
    return list(layers)


def set_rounding(model: nn.Module, on: bool) -> None:
    """Have the layers of ``apply_qat`` round, or compute with the weights as they are."""
    for module in model.modules():
        if isinstance(module, (QATLinear, QATLoRALinear)):
            module.rounds = on


def round_inputs(model: nn.Module, formats: Mapping[str, str]) -> None:
    """Have the linear layers named in ``formats`` round each token's input to it, "int8" or "fp8".

    A model whose weights were read from a quantised folder computes what that folder is for.
    """
    for name, format in formats.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear, "an adapter takes the inputs as they are"
        model.set_submodule(name, QATLinear(layer, inputs=format, weights=None, group_size=0))


def _rounding_layer(layer: nn.Linear, config: QATConfig) -> nn.Module:
    if config.format not in OWN_LAYERS:
        inputs, weights = ROUNDED[config.format]
        if isinstance(layer, LoRALinear):
            return QATLoRALinear(layer, inputs=inputs, weights=weights, group_size=config.group_size)
        return QATLinear(layer, inputs=inputs, weights=weights, group_size=config.group_size)
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig as Preparation  # slow to import

    shell = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta"))
    quantize_(shell, Preparation(torchao_config(config.format, group_size=config.group_size), step="prepare"))
    prepared = shell[0]
    prepared.weight, prepared.bias = layer.weight, layer.bias
    return prepared
