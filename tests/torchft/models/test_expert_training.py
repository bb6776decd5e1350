"""Training of the families with experts and recurrent layers: blocks compiled once for every packing and routing, with
adapters on everything, recomputed, and what a block is thought to cost."""

import pytest
import torch
from families import experts
from oracles import mean_nll, shifted, supervised, violations
from tiny import tokens, transformers_model

from torchft import models
from torchft.adapters.fused import fuse_lora
from torchft.adapters.lora import LoRAConfig, apply_lora, lora_layers
from torchft.training.block_cost import block_costs
from torchft.training.compile import compile_blocks

FAMILIES = ["deepseek_v3", "gpt_oss", "llama4", "qwen3_moe", "qwen3_next"]
each_family = pytest.mark.parametrize("family", FAMILIES)
PACKINGS = [(5, 61, 1, 33), (100,), (50, 50), (1, 1, 1, 97)]


@pytest.fixture
def make(tmp_path, family):
    """``make() -> model`` with adapters on every layer, the same each time."""
    transformers_model(**experts.CASES[family]).save_pretrained(tmp_path)

    def built():
        model = models.load(tmp_path, dtype=torch.float32)
        apply_lora(model, LoRAConfig(rank=4))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in lora_layers(model).values():
                for p in (layer.lora_a, layer.lora_b):
                    p.copy_(0.2 * torch.randn(p.shape, generator=generator))
        fuse_lora(model)
        return model.train()

    return built


def loss_and_gradients(model, packing, seed):
    batch = tokens(rows=1, seed=seed)
    positions = torch.cat([torch.arange(n) for n in packing])[None]
    loss = mean_nll(model, batch, shifted(supervised(batch)), positions)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss} | dict(zip(params, torch.autograd.grad(loss, list(params.values()))))


def pairs(got, want):
    return {name: (got[name], want[name]) for name in want}


@each_family
def test_compiled_once_for_every_packing_and_routing(make):
    torch._dynamo.reset()
    eager, compiled = make(), make()
    compile_blocks(compiled, backend="aot_eager")
    loss_and_gradients(compiled, PACKINGS[0], seed=0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, packing in enumerate(PACKINGS):
            got, want = (loss_and_gradients(m, packing, seed) for m in (compiled, eager))
            assert violations(pairs(got, want)) == {}


@each_family
def test_recomputed_is_bit_equal(make):
    model = make()
    kept = loss_and_gradients(model, PACKINGS[0], seed=0)
    model.recompute = 1.0
    again = loss_and_gradients(model, PACKINGS[0], seed=0)
    assert all(torch.equal(a, b) for a, b in pairs(again, kept).values())


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen3_next"])
def test_a_block_has_a_cost(make, tmp_path, monkeypatch):
    """Measured without memory, in the dtype of a GPU: some experts' products, not those of all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = make().to(torch.bfloat16)
    costs = block_costs(model, [None], seq_len=96, packed=True, device=torch.device("cpu"))[None]
    assert costs.saved > 96 * model.config.dim * 2
    assert costs.backward_flops > costs.forward_flops > 0


@pytest.mark.gpu
@each_family
def test_a_gpu_in_bf16_is_near_fp32(make):
    """Packed: the fused kernels, grouped products, values padded to the keys' width, chunks and windows.

    Of most tokens: rounding sends some of them to other experts, on any device.
    """
    batch = tokens(rows=1)
    positions = torch.cat([torch.arange(n) for n in PACKINGS[0]])[None]
    with torch.no_grad():
        want = make()(batch, positions)
        got = make().to("cuda", torch.bfloat16)(batch.cuda(), positions.cuda()).float().cpu()
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).median() <= 0.05
