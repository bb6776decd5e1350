"""Normalisation layers, computed in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * (weight + offset), in fp32 (https://arxiv.org/abs/1910.07467). Gemma stores weight - 1: offset 1."""

    def __init__(self, dim: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps, self.offset = eps, offset
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float() + self.offset, self.eps).type_as(x)


class BareRMSNorm(nn.Module):
    """x / rms(x), in fp32."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x)


class WholeRMSNorm(RMSNorm):
    """``RMSNorm`` over all heads of x [b, s, h, c] together (OLMo 2); ``dim`` is h * c."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(2)).view_as(x)
