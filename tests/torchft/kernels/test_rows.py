"""Rows of tokens to their experts' and back, against plain indexing."""

import pytest
import torch

from torchft.kernels.rows import collect_rows, spread_rows


def inputs(t, k, d, *, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(t, d, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    rows = torch.randn(t * k, d, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    return x, rows, torch.randperm(t * k, generator=generator).to(device)


def by_index(x, place):
    order = place.argsort()
    return x[order // (len(place) // len(x))]


def check(t, k, d, limit, **how):
    x, rows, place = inputs(t, k, d, **how)
    spread, collected = spread_rows(x, place), collect_rows(rows, place, t)
    assert torch.equal(spread, by_index(x, place))
    sums = rows.double()[place].view(t, k, d).sum(1)
    dx, d_rows = torch.autograd.grad([spread, collected], [x, rows], [rows.detach(), x.detach()])
    assert torch.equal(d_rows, by_index(x.detach(), place))
    for got, want in ((collected, sums), (dx, sums)):
        assert (got.double() - want).norm() <= limit * want.norm()


def test_equals_indexing_and_its_gradient():
    check(7, 3, 5, 1e-12)
    check(1, 1, 1, 1e-12)


def test_torch_agrees_that_the_operators_are_well_formed():
    x, rows, place = inputs(4, 2, 8, dtype=torch.float32)
    torch.library.opcheck(spread_rows, (x, place))
    torch.library.opcheck(collect_rows, (rows, place, 4))


@pytest.mark.gpu
@pytest.mark.parametrize(("t", "k", "d"), [(1, 1, 1), (33, 8, 2048), (5, 3, 1), (257, 4, 2880), (64, 10, 1000)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 4e-3), (torch.float32, 1e-6)])
def test_the_kernels_equal_indexing(t, k, d, dtype, limit):
    check(t, k, d, limit, dtype=dtype, device="cuda")
