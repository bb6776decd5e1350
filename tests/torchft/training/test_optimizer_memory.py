"""Bytes of optimizer state: what the stand-ins say against what one real step leaves."""

from functools import partial

import pytest
import tiny
import torch
import torchao.optim

from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters
from torchft.training.cpu_offload import AdamWOffloaded
from torchft.training.memory import stored_bytes
from torchft.training.optim import MuonWithAdamW, param_groups
from torchft.training.optimizer_memory import optimizer_bytes
from torchft.training.stochastic import AdamWStochastic

BUILDS = {
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "SGD with momentum": partial(torch.optim.SGD, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
    "Muon and AdamW": MuonWithAdamW,
    "bf16 states": AdamWStochastic,
    "fp32 states": partial(AdamWStochastic, state_dtype="fp32"),
    "8 bits": torchao.optim.AdamW8bit,
    "4 bits": torchao.optim.AdamW4bit,
}

CPU = torch.device("cpu")


def model_of(dtype, *, lora=False, device="cpu"):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1024, "num_hidden_layers": 3}
    model = tiny.decoder(**sizes).to(device, dtype)
    if lora:
        apply_lora(model, LoRAConfig(rank=16))
        init_adapters(model)
    return model


def after_a_step(build, model):
    optimizer = build(param_groups(model))
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    return sum(stored_bytes(t) for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", BUILDS)
def test_a_step_over_stand_ins_tells_the_real_one(name, dtype, lora):
    model = model_of(dtype, lora=lora)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    got, want = optimizer_bytes(BUILDS[name], param_groups(model), device=CPU), after_a_step(BUILDS[name], model)
    assert abs(got - want) <= 0.06 * want + 0.05 * trained
    exact = {"AdamW": 2 * trained, "SGD": 0, "SGD with momentum": trained}
    assert got == exact.get(name, got)


def test_the_model_stays_as_it_is():
    model = model_of(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert optimizer_bytes(torch.optim.AdamW, param_groups(model), device=CPU) == 2 * sum(
        p.nbytes for p in model.parameters()
    )
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_states_that_cannot_be_measured_are_not_known(caplog):
    class Picky(torch.optim.SGD):
        def step(self):
            raise RuntimeError("only weights of 8B models")

    assert optimizer_bytes(Picky, param_groups(model_of(torch.bfloat16)), device=CPU) is None
    assert "two states each are assumed: only weights of 8B" in caplog.text


@pytest.mark.gpu
def test_states_in_host_memory_take_nothing_of_the_device():
    model = model_of(torch.bfloat16, device="cuda")
    assert optimizer_bytes(AdamWOffloaded, param_groups(model), device=torch.device("cuda")) == 0
    fused = partial(torch.optim.AdamW, fused=True)
    assert optimizer_bytes(fused, param_groups(model), device=torch.device("cuda")) == 2 * sum(
        p.nbytes for p in model.parameters()
    )
