"""Rounding in training: against closed forms in fp64, straight-through gradients, adapters, and what is refused."""

import copy

import pytest
import tiny
import torch
from oracles import mean_nll
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig as Preparation

from torchft.adapters.formats import torchao_config
from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters, lora_layers
from torchft.adapters.qat import QATConfig, QATLinear, QATLoRALinear, apply_qat, round_inputs, rounded, set_rounding
from torchft.errors import UserError

CPU = torch.device("cpu")


def prepared(config, layer, dtype=torch.float32):
    model = nn.Sequential(layer)
    apply_qat(model, config, device=CPU, dtype=dtype)
    return model


def int4(weight, group):
    """Closed form, fp64: the largest of each group becomes 7.5, codes are -8 to 7. (-7.5 may become -8 or -7.)"""
    groups = weight.double().unflatten(1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)


def with_positive_largest(weight, group):
    """Groups are turned so that no weight is -7.5 times its scale."""
    groups = weight.unflatten(1, (-1, group))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    return (groups * largest.sign()).flatten(1)


def int8(x):
    """Closed form, fp64: the range of each token, with zero in it, is cut into 255 steps of which one is zero."""
    x = x.double()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale


def fp8(x):
    """Closed form, fp64: the largest of each row becomes 448; 3 bits of mantissa, of exponents from -6 on."""
    scale = x.double().abs().amax(-1, keepdim=True) / 448
    y = x.double() / scale
    exponent = torch.floor(torch.log2(y.abs().clamp_min(2.0**-6)))
    step = torch.exp2(exponent - 3)
    return (y / step).round() * step * scale


def forms(format, x, weight, group):
    inputs = {"int4": lambda t: t.double(), "int8_int4": int8}
    return inputs[format](x), int4(weight, group)


@pytest.mark.parametrize("format", ["int4", "int8_int4"])
@pytest.mark.parametrize("group", [8, 32])
def test_values_are_the_closed_form_and_gradients_straight_through(format, group):
    torch.manual_seed(0)
    layer = nn.Linear(64, 24)
    layer.weight.data = with_positive_largest(layer.weight.data, group)
    weight, bias = (p.detach().clone() for p in layer.parameters())
    model = prepared(QATConfig(format=format, group_size=group), layer)
    x, grad = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 24)
    out = model(x)
    out.backward(grad)

    rounded_x, rounded_w = forms(format, x.detach(), weight, group)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.double(), rounded_x @ rounded_w.t() + bias, **close)
    flat_grad, flat_x = grad.double().flatten(0, 1), rounded_x.flatten(0, 1)
    torch.testing.assert_close(x.grad.double(), grad.double() @ rounded_w, **close)
    torch.testing.assert_close(model[0].weight.grad.double(), flat_grad.t() @ flat_x, **close)
    torch.testing.assert_close(model[0].bias.grad.double(), flat_grad.sum(0), **close)
    assert (rounded_w - weight).abs().max() > 0.01 * weight.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["int4", "int8_int4"])
def test_torchaos_layer_computes_and_learns_the_same(format, dtype):
    """Outputs bit for bit; gradients but at the ends of a range: torchao has none where it clips."""
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(64, 24, bias=False, dtype=dtype))
    ours = prepared(QATConfig(format=format, group_size=16), copy.deepcopy(theirs[0]), dtype)
    base = torchao_config(format, group_size=16)
    quantize_(theirs, Preparation(base, step="prepare"))
    grad, inputs = torch.randn(5, 24, dtype=dtype), torch.randn(5, 64, dtype=dtype)
    out, x_grads = {}, {}
    for who, model in {"ours": ours, "theirs": theirs}.items():
        x = inputs.clone().requires_grad_()
        out[who] = model(x)
        out[who].backward(grad)
        x_grads[who] = x.grad
    assert torch.equal(out["ours"], out["theirs"])
    groups = ours[0].weight.detach().unflatten(1, (-1, 16)).abs()
    inner = (groups < 0.99 * groups.amax(-1, keepdim=True)).flatten(1)  # not clipped in bf16 either
    assert inner.sum() > 24 * 4 * 14
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(ours[0].weight.grad[inner], theirs[0].weight.grad[inner], **close)
    assert (theirs[0].weight.grad == 0)[~inner].any() and (ours[0].weight.grad != 0).all()
    within = (inputs > inputs.amin(1, keepdim=True)) & (inputs < inputs.amax(1, keepdim=True))
    torch.testing.assert_close(x_grads["ours"][within], x_grads["theirs"][within], **close)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("to", ["int4", "int8", "fp8"])
def test_the_compiler_rounds_as_eager_code_does(to, device):
    """In bf16, where fused arithmetic would give other codes; and gradients."""
    torch.manual_seed(0)
    found = []
    x = torch.randn(128, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    for function in (rounded, torch.compile(rounded, fullgraph=True, dynamic=False)):
        x.grad = None
        values = function(x * 1.1, to, 32)
        values.square().sum().backward()
        found += [values, x.grad]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_inputs_are_rounded_as_a_quantised_folder_wants():
    torch.manual_seed(0)
    x = torch.randn(3, 7, 48)
    for format, form in {"int8": int8, "fp8": fp8}.items():
        model = nn.Sequential(nn.Linear(48, 16, bias=False))
        round_inputs(model, {"0": format})
        want = form(x) @ model[0].weight.detach().double().t()
        torch.testing.assert_close(model(x).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", ["int4", "int8_int4"])
def test_an_adapted_layer_rounds_its_merged_weight(format, dora):
    """Value, and gradients of A and B, of the one weight that a quantised checkpoint has; switched off, the base's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24))
    apply_lora(model, LoRAConfig(rank=4, alpha=8.0, dora=dora))
    init_adapters(model)
    apply_qat(model, QATConfig(format=format, group_size=16), device=CPU, dtype=torch.float32)
    layer = model[0]
    assert isinstance(layer, QATLoRALinear) and list(lora_layers(model)) == ["0"]
    nn.init.normal_(layer.lora_b, std=0.3)
    update = 2.0 * layer.lora_b.detach() @ layer.lora_a.detach()
    layer.weight.data = with_positive_largest(layer.weight.data + update, 16) - update
    base = layer.weight.detach().clone()
    x, grad = torch.randn(6, 32), torch.randn(6, 24)
    out = model(x)
    out.backward(grad)

    a, b = layer.lora_a.detach().double().requires_grad_(), layer.lora_b.detach().double().requires_grad_()
    rows = base.double() + 2.0 * b @ a
    merged = rows
    if dora:
        merged = rows * (layer.lora_magnitude.detach().double() / rows.detach().norm(dim=1)).unsqueeze(1)
    rounded_x, quantised = forms(format, x, merged.detach(), 16)
    torch.testing.assert_close(out.double(), rounded_x @ quantised.t() + layer.bias, rtol=1e-5, atol=1e-5)
    merged.backward(grad.double().t() @ rounded_x)
    torch.testing.assert_close(layer.lora_a.grad.double(), a.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.lora_b.grad.double(), b.grad, rtol=1e-4, atol=1e-5)
    assert layer.weight.grad is None
    assert torch.equal(layer.merged(), layer.merged_weight())
    layer.enabled = False
    layer.weight.data = with_positive_largest(base, 16)
    want = rounded_x @ int4(layer.weight, 16).t() + layer.bias
    torch.testing.assert_close(model(x).double(), want, rtol=1e-5, atol=1e-5)


def test_before_rounding_begins_nothing_changes():
    dense = tiny.decoder()
    model = copy.deepcopy(dense)
    names = apply_qat(model, QATConfig(), device=CPU, dtype=torch.float32)
    assert len(names) == 7 * len(model.layers) and all(type(model.get_submodule(n)) is QATLinear for n in names)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == dict.fromkeys(dense.state_dict(), True)
    batch = tiny.tokens(2, 40)
    on = mean_nll(model, batch, batch)
    set_rounding(model, False)
    off = mean_nll(model, batch, batch)
    off.backward()
    want = mean_nll(dense, batch, batch)
    want.backward()
    assert torch.equal(off, want) and 1e-3 < (on - want).abs() < 1
    theirs = dict(dense.named_parameters())
    assert all(torch.equal(p.grad, theirs[name].grad) for name, p in model.named_parameters())


def test_what_stays_frozen_stays_so():
    model = tiny.decoder()
    apply_lora(model, LoRAConfig(rank=2, targets="q_proj"))
    apply_qat(model, QATConfig(), device=CPU, dtype=torch.float32)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}


def test_nothing_of_a_weights_size_is_kept_for_backward():
    model = prepared(QATConfig(), nn.Linear(512, 256, bias=False))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(1, 512))
    assert sum(t.numel() for t in kept) <= 512 + 256 * 512  # the input, and the rounded weight if x needs a gradient


@pytest.mark.parametrize(
    ("config", "dtype", "message"),
    [
        ({"format": "fp8"}, torch.bfloat16, r"qat.format: fp8 needs a GPU of compute capability 8.9.*this is a cpu"),
        ({"format": "nvfp4"}, torch.bfloat16, r"qat.format: nvfp4 needs a GPU of compute capability 10.0"),
        ({"format": "mxfp4"}, torch.float32, r"dtype: the products of mxfp4 give bf16, so set dtype: bf16"),
        (
            {"group_size": 40},
            torch.float32,
            r"layers.\*.self_attn.q_proj has 64 .*of 40.*qat.group_size",
        ),
        ({"targets": "down"}, torch.float32, r"qat.targets: 'down' matches no linear layer"),
    ],
)
def test_what_cannot_be_is_refused_by_name(config, dtype, message):
    with pytest.raises(UserError, match=message):
        apply_qat(tiny.decoder(), QATConfig(**config), device=CPU, dtype=dtype)


def test_dropout_of_an_adapter_is_refused():
    model = tiny.decoder()
    apply_lora(model, LoRAConfig(rank=2, dropout=0.1))
    with pytest.raises(UserError, match=r"lora.dropout: a merged weight has no dropout"):
        apply_qat(model, QATConfig(), device=CPU, dtype=torch.float32)
