import pytest
import torch

from tests import tiny
from torchft.adapters.fused import LoRAGatedMLP, fuse_lora
from torchft.adapters.lora import LoRAConfig, adapters_off, apply_lora, lora_layers


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


def test_nothing_changes_but_the_speed():
    plain, fused = adapted(), adapted()
    names = list(fused.state_dict())
    assert fuse_lora(fused) == ["layers.0.mlp", "layers.1.mlp"]
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
    "lora", [{"dora": True}, {"dropout": 0.1}, {"targets": ["gate_proj", "up_proj"]}, {"rank_pattern": {"up_proj": 8}}]
)
def test_what_the_kernel_does_not_know_stays_as_it_is(lora):
    model = adapted(**lora)
    assert fuse_lora(model) == []
    assert not any(isinstance(module, LoRAGatedMLP) for module in model.modules())
