"""LoRA on the stacked weights of experts: each expert has its own A and B (numbers as in PEFT's target_parameters)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.modules.grouped import StackedLinear, grouped_linear
from torchft.ranks import copy_part, local, whole


class StackedLoRA(StackedLinear):
    """A frozen ``StackedLinear`` plus ``scaling * B A x`` of each row's expert.

    As ``LoRALinear`` it keeps the names of what it replaces, and the adapter may be of a wider dtype than the input.
    """

    def __init__(
        self,
        layer: StackedLinear,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.in_features, self.out_features = layer.num_experts, layer.in_features, layer.out_features
        self.weight, self.bias, self.multiply = layer.weight, layer.bias, layer.multiply
        self.requires_grad_(False)
        device = layer.weight.device
        self.lora_a = nn.Parameter(torch.empty(self.num_experts, rank, self.in_features, device=device, dtype=dtype))
        self.lora_b = nn.Parameter(torch.empty(self.num_experts, self.out_features, rank, device=device, dtype=dtype))
        self.lora_magnitude = None  # DoRA is for linear layers only
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.enabled = True

    def forward(self, x: Tensor, offsets: Tensor, scale: Tensor | None = None) -> Tensor:
        x = x if scale is None else x * scale
        out = self.add_bias(self.multiply(x, self.weight, offsets), offsets, scale)
        if not self.enabled:
            return out
        x = F.dropout(x, self.dropout) if self.training and self.dropout else x
        inner = grouped_linear(x, self.lora_a.to(x.dtype), offsets)  # [n, rank]
        return out + grouped_linear(self.scaling * inner, self.lora_b.to(x.dtype), offsets)

    @torch.no_grad()
    def init_adapter(self, generator: torch.Generator | None = None) -> None:
        """A uniform in +-1/sqrt(in), B zero. All ranks call it, as that of ``LoRALinear``."""
        a = torch.empty(self.lora_a.shape, device=self.lora_a.device, dtype=self.lora_a.dtype)
        bound = 1 / math.sqrt(self.in_features)
        copy_part(self.lora_a, nn.init.uniform_(a, -bound, bound, generator=generator))
        local(self.lora_b).zero_()

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights [e, out, in] that do what the layer does: fp32 arithmetic, an expert after the other, cast once
        to ``dtype`` (None: the base's). All ranks call it; each gets all of them.
        """
        base, a, b = whole(self.weight), whole(self.lora_a).float(), whole(self.lora_b).float()
        base = base.to(torch.float32) if type(base) is not Tensor else base  # a quantised one, all at once
        merged = torch.empty(base.shape, dtype=dtype or self.weight.dtype, device=base.device)
        for expert, weight in enumerate(base):
            merged[expert] = weight.float() + self.scaling * (b[expert] @ a[expert])
        return merged

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}, rslora={self.rslora}"
