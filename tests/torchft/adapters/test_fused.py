import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from torchft.adapters.fused import LoRAAttention, LoRAGatedMLP, fuse_lora, inners
from torchft.adapters.lora import LoRAConfig, LoRALinear, adapters_off, apply_lora, init_adapters, lora_layers


def adapted(**lora):
    model = tiny.decoder()
    apply_lora(model, LoRAConfig(rank=4, alpha=8, **lora))
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_a, std=0.1)
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    return model


def logits_and_gradients(model):
    tokens = torch.randint(0, 101, (2, 11), generator=torch.Generator().manual_seed(2))
    logits = model(tokens)
    logits.square().mean().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


ATTENTION, MLP = (["self_attn"], ["mlp"])


@pytest.mark.parametrize(
    ("lora", "parts"),
    [
        ({}, ATTENTION + MLP),
        ({"targets": ["q_proj", "v_proj"]}, ATTENTION),
        ({"rank_pattern": {"k_proj": 8, "v_proj": 2}, "alpha_pattern": {"q_proj": 3}}, ATTENTION + MLP),
        ({"targets": ["v_proj", "gate_proj", "up_proj", "down_proj"], "rslora": True}, MLP),
    ],
)
def test_nothing_changes_but_the_speed(lora, parts):
    plain, fused = adapted(**lora), adapted(**lora)
    names = list(fused.state_dict())
    assert fuse_lora(fused) == [f"layers.{i}.{part}" for i in range(2) for part in parts]
    assert list(fused.state_dict()) == names
    logits, grads = logits_and_gradients(plain)
    fused_logits, fused_grads = logits_and_gradients(fused)
    torch.testing.assert_close(fused_logits, logits, atol=1e-5, rtol=1e-5)
    assert grads.keys() == fused_grads.keys()
    for name, grad in grads.items():
        assert (fused_grads[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_without_adapters_it_is_the_base_bit_for_bit():
    plain, fused = adapted(), adapted()
    fuse_lora(fused)
    with adapters_off(plain), adapters_off(fused):
        torch.testing.assert_close(logits_and_base(fused), logits_and_base(plain), rtol=0, atol=0)


def logits_and_base(model):
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10))


@pytest.mark.parametrize(
    "lora",
    [
        {"dora": True},
        {"dropout": 0.1},
        {"targets": ["gate_proj", "up_proj", "q_proj"]},
        {"targets": ["gate_proj", "up_proj", "down_proj", "o_proj", "k_proj"], "rank_pattern": {"up_proj": 8}},
    ],
)
def test_what_is_not_known_stays_as_it_is(lora):
    model = adapted(**lora)
    assert fuse_lora(model) == []
    assert not any(isinstance(module, LoRAGatedMLP | LoRAAttention) for module in model.modules())


def test_inner_products_are_one_product_each_way():
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products.append(tuple(args[0].shape)) if function is torch.ops.aten.mm.default else None
            return function(*args, **(kwargs or {}))

    layers = [LoRALinear(torch.nn.Linear(6, out), rank, 8.0) for out, rank in ((5, 2), (7, 3), (9, 4))]
    init_adapters(torch.nn.ModuleList(layers))
    x = torch.randn(10, 6, requires_grad=True)
    with Products():
        torch.cat([y.square() for y in inners(x, layers)], dim=-1).sum().backward()
    assert sorted(products) == [
        (9, 10),
        (10, 6),
        (10, 9),
    ]  # [ranks, t][t, in], [t, in][in, ranks], [t, ranks][ranks, in]
