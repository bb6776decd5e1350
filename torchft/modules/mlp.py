"""Feed-forward layers."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

GELU_TANH = partial(F.gelu, approximate="tanh")


class MLP(nn.Module):
    """down(act(up(x))), [b, s, d] -> [b, s, d], with biases."""

    def __init__(self, dim: int, hidden_dim: int, *, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim)
        self.down_proj = nn.Linear(hidden_dim, dim)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), [b, s, d] -> [b, s, d] (https://arxiv.org/abs/2002.05202)."""

    def __init__(
        self, dim: int, hidden_dim: int, *, act: Callable[[Tensor], Tensor] = F.silu, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
