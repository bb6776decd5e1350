"""NF4's bytes and values against torchao and the paper; the Triton kernel against its plain twin."""

import pytest
import torch
import torch.nn.functional as F
from oracles import distance

from torchft.kernels.nf4 import (
    CODEBOOK,
    GROUP,
    GROUP_BYTES,
    SCALES,
    NF4Linear,
    dequantise,
    dequantise_plain,
    dequantise_triton,
    quantise_,
)


def packed(weight):
    return quantise_(torch.empty(weight.numel() // GROUP, GROUP_BYTES, dtype=torch.uint8, device=weight.device), weight)


def weights(rows, columns, seed=0, device="cpu", dtype=torch.float32):
    """Normal, with rows of different lengths, so that blocks differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * torch.linspace(0.01, 1, rows).unsqueeze(1)
    return values.to(device, dtype)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_the_codebook_is_the_papers():
    """Appendix E: quantiles of a normal, 8 above zero and 7 below, scaled to 1."""
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((above, below, torch.zeros(1, dtype=torch.float64)))
    expected = (values / values.max()).sort().values
    torch.testing.assert_close(torch.tensor(CODEBOOK, dtype=torch.float64), expected, rtol=0, atol=2e-7)


def codes(form):
    """[blocks, 64] of 0 to 15"""
    return torch.stack((form[:, :SCALES] >> 4, form[:, :SCALES] & 15), dim=-1).view(-1, 64).int()


def test_codes_are_the_nearest_of_each_value():
    blocks = weights(256, 320).double().view(-1, 64)
    units = blocks / blocks.abs().amax(dim=1, keepdim=True)
    nearest = (units.unsqueeze(-1) - torch.tensor(CODEBOOK, dtype=torch.float64)).abs().argmin(-1)
    assert torch.equal(codes(packed(weights(256, 320))), nearest.int())


def test_bytes_and_values_are_torchaos():
    """Its codebook is rounded to four decimals, hence 0.02% of bytes differ; its scales are less exact than ours."""
    from torchao.quantization import to_nf4

    weight = weights(256, 320)
    form, oracle = packed(weight), to_nf4(weight, 64, 256)
    assert (form[:, :SCALES].flatten() != oracle.quantized_data).float().mean() < 5e-4
    ours, theirs = dequantise([form], 320, torch.float32, 0), oracle.get_original_weight()
    assert relative(ours, theirs) < 0.01
    exact = torch.tensor(CODEBOOK)[codes(form)] * weight.view(-1, 64).abs().amax(1, keepdim=True)
    assert relative(ours, exact.view(256, 320)) < min(0.003, relative(theirs, exact.view(256, 320)))


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1.0, 1e30])
def test_scales_of_any_size(factor):
    weight = weights(64, 256) * factor
    weight[:3] = 0  # blocks of zeros stay zero
    got = dequantise([packed(weight)], 256, torch.float32, 0)
    assert got[:3].count_nonzero() == 0
    assert relative(got, weight) < 0.1 if factor else got.count_nonzero() == 0


def test_blocks_of_one_scale_are_exact():
    weight = 0.375 * torch.tensor(CODEBOOK).repeat(GROUP // 16).view(128, 128)
    torch.testing.assert_close(dequantise([packed(weight)], 128, torch.float32, 0), weight, rtol=1e-7, atol=0)


def test_matrices_are_stacked():
    q, k, v = (weights(rows, 256, seed) for seed, rows in enumerate((256, 64, 128)))
    parts = [dequantise([packed(w)], 256, torch.bfloat16, 0) for w in (q, k, v)]
    assert torch.equal(dequantise([packed(w) for w in (q, k, v)], 256, torch.bfloat16, 1), torch.cat(parts))
    assert torch.equal(packed(torch.cat((q, k, v))), torch.cat([packed(w) for w in (q, k, v)]))


def test_quantising_in_chunks_is_quantising_at_once(monkeypatch):
    weight = weights(256, 256)
    whole = packed(weight)
    monkeypatch.setattr("torchft.kernels.nf4.CHUNK", 3)
    assert torch.equal(packed(weight), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_its_gradients_are_those_of_the_dequantised_weight(dtype, bias):
    form = packed(weights(128, 256))
    dense = dequantise([form], 256, dtype, 0)
    x = torch.randn(3, 5, 256, dtype=dtype, requires_grad=True)
    b = torch.randn(128, dtype=dtype, requires_grad=True) if bias else None
    inputs = [x, b] if bias else [x]
    ours, theirs = NF4Linear.apply(x, form, b), F.linear(x, dense, b)
    upstream = torch.randn_like(ours)
    assert torch.equal(ours, theirs)
    for got, expected in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        assert torch.equal(got, expected)


def test_backward_keeps_the_packed_weight_only():
    form = packed(weights(128, 256))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        NF4Linear.apply(torch.randn(5, 256, requires_grad=True), form, None)
    assert [t.data_ptr() for t in kept] == [form.data_ptr()]


def test_the_compiler_may_trace_the_operator():
    torch.library.opcheck(dequantise, ([packed(weights(128, 256))] * 2, 256, torch.bfloat16, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("words", [128, 512, 1024])
def test_triton_is_bit_equal_to_the_plain_twin(dtype, words):
    form = packed(weights(512, 4096, device="cuda", dtype=torch.bfloat16))
    out = torch.full((form.shape[0], GROUP), torch.nan, device="cuda", dtype=dtype)
    dequantise_triton(form, out, words=words)
    assert torch.equal(out, dequantise_plain(form, dtype))
    assert torch.equal(out.cpu(), dequantise_plain(form.cpu(), dtype))


@pytest.mark.gpu
def test_quantising_on_cuda_gives_the_cpus_values_without_large_temporaries():
    weight = weights(4096, 4096, dtype=torch.bfloat16)
    on_gpu = weight.cuda()
    packed(on_gpu)  # the first call loads kernels
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    form = packed(on_gpu)
    assert torch.cuda.max_memory_allocated() - before < 150e6
    values, wanted = (dequantise_plain(x, torch.float32) for x in (form.cpu(), packed(weight)))
    # The mean of the scales is summed in another order, so scales may be rounded to the next of their 256 steps.
    assert (values - wanted).abs().max() <= 0.01 * wanted.abs().max()
    assert distance(values, wanted)[1] < 3e-3


@pytest.mark.gpu
def test_stacked_matrices_on_cuda():
    parts = [packed(weights(rows, 4096, seed, device="cuda")) for seed, rows in enumerate((4096, 1024, 1024))]
    got = dequantise(parts, 4096, torch.bfloat16, 0)
    assert torch.equal(got.view(-1, GROUP), torch.cat([dequantise_plain(p, torch.bfloat16) for p in parts]))
