"""LoRA (https://arxiv.org/abs/2106.09685), rsLoRA (https://arxiv.org/abs/2312.03732) and DoRA
(https://arxiv.org/abs/2402.09353) by surgery on the finished model; numbers as in PEFT.

Order: build on meta, cast to the base dtype, ``apply_nf4``, ``apply_lora``, ``fully_shard``, ``to_empty``, load,
``init_adapters``.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.adapters.stacked import StackedLoRA
from torchft.adapters.targets import ALL_LINEAR, by_pattern, find_layers
from torchft.adapters.token_rows import TokenHead, TokenRows, token_rows
from torchft.config import Range
from torchft.errors import UserError
from torchft.modules.grouped import StackedLinear
from torchft.ranks import copy_part, local, sum_over, whole


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The ``lora:`` section of a config. A pattern is the last words of a module's name or a regex for all of it."""

    rank: Annotated[int, Range(min=1)] = 16  # inner width: parameters and capacity grow with it
    alpha: Annotated[float, Range(above=0)] = 32.0  # the update is scaled by alpha / rank
    targets: str | list[str] = ALL_LINEAR  # pattern(s) of linear layers; all-linear = every one but lm_head
    dropout: Annotated[float, Range(min=0, below=1)] = 0.0  # share of the adapter's inputs that is zeroed in training
    rslora: bool = False  # scale by alpha / sqrt(rank): higher ranks learn as fast as lower ones
    dora: bool = False  # also train the length of each weight row: often better at low rank, slower
    rank_pattern: dict[str, Annotated[int, Range(min=1)]] = field(default_factory=dict)  # the first match wins
    alpha_pattern: dict[str, Annotated[float, Range(above=0)]] = field(default_factory=dict)  # the first match wins


class LoRALinear(nn.Linear):
    """A frozen nn.Linear plus ``scaling * B A x``; with DoRA every row of W + scaling * B A gets a trained length.

    It keeps the names ``weight`` and ``bias`` of the layer it replaces. The adapter may be of a wider dtype than the
    input (fp32 beside a bf16 base); it is cast at use. The weight may be NF4: F.linear and ``.to(dtype)`` dequantise.
    """

    lora_magnitude: nn.Parameter | None  # [out], DoRA only

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=dtype))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank, device=device, dtype=dtype))
        magnitude = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if dora else None
        self.register_parameter("lora_magnitude", magnitude)
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.enabled = True
        self.row_group: str | None = None  # ranks that share the inputs (tensor parallel): outputs are summands

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of x."""
        out = self.base(x)
        if not self.enabled:
            return out
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else x
        update = self.outer(self.inner(dropped))
        if self.lora_magnitude is None:
            return out + update
        # As a correction to ``out``, so that an adapter that has learned nothing changes no bit. The correction is of
        # the dropped input, and dropout leaves the base's own output alone.
        if dropped is not x:
            projected = F.linear(dropped, self.weight)
        else:
            projected = out if self.bias is None else out - self.bias
        lengths = row_lengths(self._rows(), self.row_group)
        scale = self.lora_magnitude / lengths  # [out]; the lengths are a constant to autograd
        return out + (scale - 1).to(x.dtype) * projected + scale.to(x.dtype) * update

    def base(self, x: Tensor) -> Tensor:
        """What the layer computes without its adapter, [..., in] -> [..., out]."""
        return F.linear(x, self.weight, self.bias)

    def inner(self, x: Tensor) -> Tensor:
        """A x, [..., in] -> [..., rank]."""
        return F.linear(x, self.lora_a.to(x.dtype))

    def outer(self, inner: Tensor) -> Tensor:
        """scaling * B inner, [..., rank] -> [..., out]."""
        return F.linear(self.scaling * inner, self.lora_b.to(inner.dtype))  # scaled where it is narrow

    @torch.no_grad()
    def init_adapter(self, generator: torch.Generator | None = None) -> None:
        """A uniform in +-1/sqrt(in), B zero, lengths those of the loaded rows: the layer still computes what it did.

        All ranks call it, with generators (None: torch's own) in one state, and get parts of what one process would.
        """
        a = torch.empty(self.lora_a.shape, device=self.lora_a.device, dtype=self.lora_a.dtype)
        copy_part(self.lora_a, nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator))
        local(self.lora_b).zero_()
        if self.lora_magnitude is not None:
            copy_part(self.lora_magnitude, row_lengths(self._rows()))

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The one weight [out, in] that does what the layer does: fp32 arithmetic, cast once to ``dtype`` (None: the
        base's). An NF4 base is dequantised first, so the merged weight carries the quantisation error it trained with.
        All ranks call it; each gets all of the weight.
        """
        rows = self._rows()
        if self.lora_magnitude is not None:
            rows = rows * (whole(self.lora_magnitude) / row_lengths(rows)).unsqueeze(1)
        return rows.to(dtype or self.weight.dtype)

    def extra_repr(self) -> str:
        dora = ", dora=True" if self.lora_magnitude is not None else ""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}, rslora={self.rslora}{dora}"

    @torch.no_grad()
    def _rows(self) -> Tensor:
        """W + scaling * B A, [out, in] fp32, outside the autograd graph (DoRA paper, section 4.3).

        All of it: of a sharded layer outside of forward, all ranks call it.
        """
        update = whole(self.lora_b).to(torch.float32) @ whole(self.lora_a).to(torch.float32)
        return whole(self.weight).to(torch.float32) + self.scaling * update


def apply_lora(model: nn.Module, config: LoRAConfig, *, dtype: torch.dtype = torch.float32) -> list[str]:
    """Freeze ``model`` and give each linear layer that ``config.targets`` matches an adapter of ``dtype``.

    Returns their names in the model's order. Call it before compile and FSDP, and ``init_adapters`` (or ``load_peft``)
    once the weights are loaded. Raises UserError for a pattern that matches nothing.
    """
    layers = find_layers(model, config.targets, key="lora.targets")
    ranks = by_pattern(layers, config.rank_pattern, default=config.rank, key="lora.rank_pattern")
    alphas = by_pattern(layers, config.alpha_pattern, default=config.alpha, key="lora.alpha_pattern")
    if config.dora and (experts := [name for name, layer in layers.items() if isinstance(layer, StackedLinear)]):
        raise UserError(
            f"lora.dora: {experts[0]} has the weights of many experts, which DoRA is not for: name other layers in "
            "lora.targets, or leave dora out"
        )
    model.requires_grad_(False)
    for name, layer in layers.items():
        assert type(layer) in (nn.Linear, StackedLinear), f"an adapter would lose what a {type(layer).__name__} does"
        rank, alpha = ranks[name], alphas[name]
        adapted: LoRALinear | StackedLoRA
        if isinstance(layer, StackedLinear):
            adapted = StackedLoRA(layer, rank, alpha, dropout=config.dropout, rslora=config.rslora, dtype=dtype)
        else:
            adapted = LoRALinear(
                layer, rank, alpha, dropout=config.dropout, rslora=config.rslora, dora=config.dora, dtype=dtype
            )
        model.set_submodule(name, adapted)
    return list(layers)


def init_adapters(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Initialise every adapter, in the model's order. DoRA reads the base weights: call it after they are loaded.

    All ranks call it.
    """
    for layer in lora_layers(model).values():
        layer.init_adapter(generator)
    for rows in token_rows(model).values():
        rows.init_adapter()


def lora_layers(model: nn.Module) -> dict[str, LoRALinear | StackedLoRA]:
    """The layers with an adapter by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (LoRALinear, StackedLoRA))}


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` computes what its base does: the reference model of DPO, PPO and GRPO, for free."""
    every = [*lora_layers(model).values(), *token_rows(model).values()]
    layers = [layer for layer in every if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def merged_tensor(model: nn.Module, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Parameter ``name`` of ``model`` with its adapter merged in and NF4 dequantised, in ``dtype`` (None: its own).

    The model is not changed. A tensor that needs no work is the model's own: read it, do not write it. All ranks call
    it; of a sharded model each gets all of the tensor.
    """
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(module, (LoRALinear, StackedLoRA, TokenRows, TokenHead)) and child == "weight":
        return module.merged_weight(dtype)
    parameter = whole(model.get_parameter(name))
    return parameter.to(dtype or parameter.dtype)


def row_lengths(rows: Tensor, group: str | None = None) -> Tensor:
    """Euclidean length of each row, [out] fp32, never 0, so that a row of zeros stays zero instead of NaN.

    ``group``: ranks that hold a part of each row.
    """
    lengths = torch.linalg.vector_norm(rows, dim=1)
    if group is not None:
        lengths = sum_over(lengths.square(), group).sqrt()
    return lengths.clamp_min(torch.finfo(torch.float32).tiny)
