"""The largest of short rows, against torch.topk."""

import pytest
import torch

from torchft.kernels.top_k import top_k


def check(x, k):
    x = x.requires_grad_()
    values, columns = top_k(x, k)
    want, at = x.topk(k, dim=-1)
    probe = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(x)
    assert torch.equal(values, want) and torch.equal(columns, at)
    ours, theirs = (torch.autograd.grad(found, x, probe)[0] for found in (values, want))
    assert torch.equal(ours, theirs)


def rows(t, e, device="cpu"):
    return torch.randn(t, e, generator=torch.Generator().manual_seed(0)).to(device)


def test_equals_topk():
    check(rows(7, 5), 2)


def test_torch_agrees_that_the_operator_is_well_formed():
    torch.library.opcheck(top_k, (rows(4, 6).requires_grad_(), 3))


@pytest.mark.gpu
@pytest.mark.parametrize(("t", "e", "k"), [(1, 1, 1), (1000, 128, 8), (33, 60, 4), (17, 384, 8), (5, 1024, 22)])
@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_the_kernel_equals_topk(t, e, k, shift):
    check(rows(t, e, "cuda") + shift, k)


@pytest.mark.gpu
def test_the_first_of_equals_and_nan():
    x = torch.zeros(3, 64, device="cuda")
    x[1, 5], x[2] = float("nan"), float("-inf")
    values, columns = top_k(x, 3)
    assert columns.tolist() == [[0, 1, 2], [5, 0, 1], [0, 1, 2]]
    assert values[1].isnan().tolist() == [True, False, False] and values[2].isneginf().all()
