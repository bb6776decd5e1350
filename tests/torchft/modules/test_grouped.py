"""Grouped products: the kernel's path, with widths that it does not take, beside an expert after the other."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torchft.modules import grouped

OFFSETS = torch.tensor([3, 3, 10, 12], dtype=torch.int32)  # the second expert has no rows


@pytest.fixture
def kernel(monkeypatch):
    """The path of GPUs, which CPUs have too."""
    monkeypatch.setattr(grouped, "_has_kernel", lambda x: True)


def results(out_features, in_features):
    torch.manual_seed(0)
    x = torch.randn(12, in_features, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, out_features, in_features, dtype=torch.bfloat16, requires_grad=True)
    out = grouped.grouped_linear(x, weight, OFFSETS)
    probe = torch.randn(12, out_features, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad((out * probe).sum(), (x, weight))
    assert grads[1].stride() == weight.stride()  # else autograd copies it
    return [out, *grads]


@pytest.mark.parametrize(("out_features", "in_features"), [(16, 24), (4, 24), (16, 6), (5, 7)])
def test_the_kernels_path_is_the_loop(request, out_features, in_features):
    want = results(out_features, in_features)
    request.getfixturevalue("kernel")
    got = results(out_features, in_features)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride()  # as the compiler was told
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_rows_go_to_their_own_expert():
    x, weight = torch.ones(12, 1), torch.arange(4.0).view(4, 1, 1)
    out = grouped.grouped_linear(x, weight, OFFSETS)
    assert out.flatten().tolist() == [0.0] * 3 + [2.0] * 7 + [3.0] * 2


@pytest.mark.parametrize("path", ["loop", "kernel"])
def test_flops_are_those_of_the_rows(request, path):
    if path == "kernel":
        request.getfixturevalue("kernel")
    x, weight = (torch.ones(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((12, 8), (4, 16, 8)))
    with FlopCounterMode(display=False) as forward:
        out = grouped.grouped_linear(x, weight, OFFSETS)
    with FlopCounterMode(display=False) as backward:
        out.backward(torch.ones(out.shape, dtype=out.dtype))
    assert (forward.get_total_flops(), backward.get_total_flops()) == (2 * 12 * 8 * 16, 4 * 12 * 8 * 16)


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait():
    x, weight = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((12, 24), (4, 6, 24)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = grouped.grouped_linear(x, weight, OFFSETS.cuda(non_blocking=True))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), grouped.grouped_linear(x.cpu(), weight.cpu(), OFFSETS), rtol=2e-2, atol=2e-2)
