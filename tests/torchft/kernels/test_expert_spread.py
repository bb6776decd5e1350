"""Rows to their experts with a narrow product in the same pass, against an index and an einsum."""

import pytest
import torch
from torch import Tensor

from torchft.kernels.expert_spread import expert_spread


def inputs(t: int, e: int, k: int, d: int, r: int, *, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """The last expert gets no token."""
    generator = torch.Generator().manual_seed(0)
    x, narrow = (torch.randn(s, generator=generator, dtype=torch.float64) for s in [(t, d), (e, r, d)])
    chosen = torch.rand(t, e - 1, generator=generator).topk(k).indices  # [t, k]
    experts, order = chosen.flatten().sort(stable=True)
    offsets = torch.bincount(experts, minlength=e).cumsum(0).to(torch.int32)
    return [x.to(device, dtype), narrow.to(device, dtype), order.to(device), offsets.to(device)]


def reference(x: Tensor, narrow: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    rows = x[order // (len(order) // len(x))]
    experts = torch.searchsorted(offsets, torch.arange(len(order), device=offsets.device), right=True)
    return rows, torch.einsum("nd,nrd->nr", rows.double(), narrow.double()[experts])


def compare(xs: list[Tensor], limit: float) -> None:
    (rows, inner), (want_rows, want_inner) = expert_spread(*xs), reference(*xs)
    assert torch.equal(rows, want_rows) and inner.dtype == xs[0].dtype
    assert (inner.double() - want_inner).norm() / want_inner.norm() < limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_rows_are_the_tokens_and_products_those_of_their_expert(dtype: torch.dtype, limit: float) -> None:
    compare(inputs(11, 5, 2, 6, 3, dtype=dtype), limit)


def test_torch_agrees_that_the_operator_is_well_formed() -> None:
    torch.library.opcheck(expert_spread, inputs(11, 5, 2, 6, 3, dtype=torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "size", [(11, 5, 2, 40, 3), (1000, 128, 8, 2048, 16), (300, 60, 4, 1408, 8), (513, 8, 2, 1000, 64), (1, 3, 1, 8, 1)]
)
def test_the_kernel_agrees(size: tuple[int, int, int, int, int]) -> None:
    compare(inputs(*size, dtype=torch.bfloat16, device="cuda"), 1e-2)
