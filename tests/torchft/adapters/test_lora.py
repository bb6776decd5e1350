"""LoRA, rsLoRA and DoRA against PEFT on the same weights; surgery, precision, merging, compile."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft_oracle import (
    CONFIGS,
    adapter_parameters,
    each_config,
    merged_state,
    our_model,
    peft_model,
    their_parameters,
)
from processes import run_ranks
from tiny import llama, tokens
from torch import nn
from torch.distributed.fsdp import fully_shard

from torchft import ranks
from torchft.adapters.lora import (
    LoRAConfig,
    adapters_off,
    apply_lora,
    init_adapters,
    lora_layers,
    merged_tensor,
    num_parameters,
)
from torchft.adapters.nf4 import NF4Config, apply_nf4
from torchft.errors import UserError
from torchft.training.distributed import SUM_IN_FP32, ParallelConfig, init

TOKENS = tokens(length=9)
NOISE = 1e-4  # of logits and gradients: with these adapters PEFT's are 4e-5 from what they are in fp64, ours 2e-5


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def randomised(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@each_config
def test_logits_and_gradients_equal_pefts(config):
    base = llama(std=0.1, attention_bias=True, mlp_bias=True)
    theirs = peft_model(base, config)
    ours = our_model(base, config, theirs)
    outputs = [model(TOKENS).logits for model in (ours, theirs)]
    assert (outputs[0] - base(TOKENS).logits).abs().max() > 0.1  # the adapters do something
    assert (outputs[0] - outputs[1]).abs().max() <= NOISE
    for logits in outputs:
        F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()
    gradients = their_parameters(theirs)
    assert gradients.keys() == adapter_parameters(ours).keys()
    for name, parameter in adapter_parameters(ours).items():
        assert relative(parameter.grad, gradients[name].grad) <= NOISE, name
    assert all(p.grad is None for n, p in ours.named_parameters() if n not in gradients)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bias", [False, True])
def test_dropout_equals_pefts(kind, bias):
    base, config = llama(std=0.1, attention_bias=bias, mlp_bias=bias), replace(CONFIGS[kind], dropout=0.4)
    theirs = peft_model(base, config)
    ours = our_model(base, config, theirs)
    outputs = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(7)
        outputs.append(model(TOKENS).logits)
    assert (outputs[0] - outputs[1]).abs().max() <= NOISE
    assert (outputs[0] - ours.eval()(TOKENS).logits).abs().max() > 0.1


@each_config
def test_merged_weights_equal_pefts(config):
    base = llama(std=0.1, attention_bias=True, mlp_bias=True)
    theirs = peft_model(base, config)
    ours = our_model(base, config, theirs)
    merged, expected = merged_state(ours), theirs.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert relative(tensor, expected[name]) <= 1e-6, name


@each_config
def test_merged_model_computes_what_the_adapted_one_did(config):
    base = llama(std=0.1, attention_bias=True, mlp_bias=True)
    model = our_model(base, config, peft_model(base, config))
    merged = copy.deepcopy(base)
    merged.load_state_dict(merged_state(model))
    assert relative(merged(TOKENS).logits, model(TOKENS).logits) <= 2e-5


@each_config
def test_k27_merging_changes_nothing_and_can_be_repeated(config):
    base = llama(std=0.1, attention_bias=True, mlp_bias=True)
    model = our_model(base, config, peft_model(base, config))
    before = copy.deepcopy(model.state_dict())
    once = {name: tensor.clone() for name, tensor in merged_state(model).items()}
    assert all(torch.equal(tensor, once[name]) for name, tensor in merged_state(model).items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@each_config
def test_a_fresh_adapter_changes_no_bit(config):
    base = llama(std=0.1, attention_bias=True, mlp_bias=True)
    model = copy.deepcopy(base)
    apply_lora(model, config)
    init_adapters(model)
    assert torch.equal(model(TOKENS).logits, base(TOKENS).logits)
    assert all(
        torch.equal(tensor, base.get_parameter(name)) for name, tensor in merged_state(model, torch.float32).items()
    )


def test_init_is_lora_s():
    """A uniform with standard deviation 1 / sqrt(3 in), B zero (https://arxiv.org/abs/2106.09685, PEFT's form)."""
    layers = nn.Sequential(nn.Linear(300, 7), nn.Linear(7, 300))
    apply_lora(layers, LoRAConfig(rank=64, targets=[".*"]))
    init_adapters(layers, torch.Generator().manual_seed(0))
    for layer in lora_layers(layers).values():
        assert layer.lora_a.std().item() == pytest.approx((3 * layer.in_features) ** -0.5, rel=0.1)
        assert layer.lora_a.abs().max() <= layer.in_features**-0.5
        assert not layer.lora_b.any()
    first = layers[0].lora_a.clone()
    init_adapters(layers, torch.Generator().manual_seed(0))
    assert torch.equal(layers[0].lora_a, first)


@each_config
def test_adapters_off_is_the_base(config):
    base = llama(std=0.1, attention_bias=True, mlp_bias=True)
    model = our_model(base, config, peft_model(base, config))
    adapted = model(TOKENS).logits
    with adapters_off(model):
        assert torch.equal(model(TOKENS).logits, base(TOKENS).logits)
        with adapters_off(model):
            pass
        assert torch.equal(model(TOKENS).logits, base(TOKENS).logits)  # the inner one did not turn them on
    assert torch.equal(model(TOKENS).logits, adapted)


def test_names_and_freezing():
    base = llama(std=0.1, attention_bias=True, mlp_bias=True)
    model = copy.deepcopy(base)
    names = apply_lora(model, LoRAConfig(rank=4, targets=["q_proj", "up_proj"]))
    assert names == [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.up_proj")]
    added = {f"{n}.{p}" for n in names for p in ("lora_a", "lora_b")}
    assert model.state_dict().keys() == base.state_dict().keys() | added
    assert {n for n, p in model.named_parameters() if p.requires_grad} == added == adapter_parameters(model).keys()
    trained, total = num_parameters(model)
    assert trained == 2 * 4 * (64 + 64 + 64 + 96)
    assert total == trained + sum(p.numel() for p in base.parameters())


def test_a_pattern_without_a_layer_leaves_the_model_as_it_was():
    model = llama(std=0.1, attention_bias=True, mlp_bias=True)
    with pytest.raises(UserError, match=r"lora\.alpha_pattern: 'o_proj' matches no linear"):
        apply_lora(model, LoRAConfig(targets=["q_proj"], alpha_pattern={"o_proj": 3.0}))
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dora", [False, True])
def test_bf16_base_with_fp32_adapters(dora):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48)).to(torch.bfloat16)
    apply_lora(model, LoRAConfig(rank=4, alpha=12.0, targets=[".*"], dora=dora))
    init_adapters(model)
    randomised(model)
    layer, x = model[0], torch.randn(5, 64, dtype=torch.bfloat16)
    out = model(x)
    out.float().pow(2).sum().backward()
    assert out.dtype == torch.bfloat16
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert {p.grad.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    exact = layer.weight.double() + 3 * layer.lora_b.double() @ layer.lora_a.double()
    if dora:
        exact *= (layer.lora_magnitude.double() / exact.norm(dim=1))[:, None]
    merged = merged_tensor(model, "0.weight")
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.float().bfloat16())  # one rounding
    assert relative(merged_tensor(model, "0.weight", torch.float32).double(), exact) <= 1e-6  # none
    reference = F.linear(x.double(), exact, layer.bias.double())
    assert relative(out.double(), reference) <= 1e-2


def test_surgery_on_meta_then_load():
    base = llama(std=0.1, attention_bias=True, mlp_bias=True)
    with torch.device("meta"):
        model = type(base)(base.config)
    apply_lora(model, LoRAConfig(rank=4, targets=["q_proj"], dora=True))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(base.state_dict(), strict=False)
    init_adapters(model)
    layer = model.model.layers[1].self_attn.q_proj
    assert torch.equal(layer.lora_magnitude, base.model.layers[1].self_attn.q_proj.weight.norm(dim=1))


def test_dora_row_of_zeros_stays_zero():
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    nn.init.zeros_(model[0].weight[1])
    apply_lora(model, LoRAConfig(rank=2, targets=[".*"], dora=True))
    init_adapters(model)
    x = torch.randn(3, 8)
    assert torch.equal(model(x), F.linear(x, model[0].weight))
    assert not merged_tensor(model, "0.weight")[1].any()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_compiled_equals_eager_without_graph_breaks(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 8, bias=False)).to(torch.bfloat16)
    apply_lora(model, replace(CONFIGS[kind], targets=[".*"]))
    init_adapters(model)
    randomised(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        out = run(x)
        out.float().pow(2).sum().backward()
        with adapters_off(model):
            off = run(x)
        results.append((out, off, *(p.grad for p in adapter_parameters(model).values())))
    for eager, same in zip(*results, strict=True):
        torch.testing.assert_close(same, eager, rtol=0, atol=0)
    assert not torch.equal(results[1][0], results[1][1])


CASES = [(nf4, dora) for nf4 in (False, True) for dora in (False, True)]


def two_layers(*, nf4, dora, mesh=None):
    """Fresh adapters on a loaded base, whole, and the merged parameters once the adapters do something.

    Their 5 rows of A and the 20 rows of the second base are no multiple of 3 ranks.
    """
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 384), nn.SiLU(), nn.Linear(384, 20)).to(torch.bfloat16)
    if nf4:
        apply_nf4(model, NF4Config(targets=["0"]))
    apply_lora(model, LoRAConfig(rank=5, alpha=9.0, targets=[".*"], dora=dora))
    if mesh:
        fully_shard(model, mesh=mesh, mp_policy=SUM_IN_FP32)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        ranks.copy_part(parameter, values * float("nan") if ".lora_" in name else values)
    init_adapters(model, generator)
    names = [name for name, _ in model.named_parameters() if ".lora_" not in name]
    found = {name: ranks.whole(parameter).clone() for name, parameter in adapter_parameters(model).items()}
    for name, parameter in adapter_parameters(model).items():
        ranks.copy_part(parameter, found[name] + 0.3 * torch.rand(parameter.shape, generator=generator))
    found |= {f"merged {name}": merged_tensor(model, name) for name in names}
    return found | {f"merged {name} in fp32": merged_tensor(model, name, torch.float32) for name in names}


def two_layers_on_ranks():
    with init(ParallelConfig(), device="cpu") as world:
        return {case: two_layers(nf4=case[0], dora=case[1], mesh=world.mesh) for case in CASES}


def test_adapters_of_a_sharded_model_begin_and_merge_as_in_one_process():
    for by_case in run_ranks(two_layers_on_ranks, 3):
        for nf4, dora in CASES:
            expected = two_layers(nf4=nf4, dora=dora)
            assert by_case[nf4, dora].keys() == expected.keys()
            assert len(expected) == 4 + 2 * dora + 8
            for name, tensor in by_case[nf4, dora].items():
                assert type(tensor) is torch.Tensor
                assert tensor.dtype == expected[name].dtype
                assert torch.equal(tensor, expected[name]), (name, nf4, dora)
