"""A base in NF4 that is loaded, trained on, compiled, merged and exported; kernels/test_nf4.py has its numbers."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from peft_oracle import adapter_parameters, merged_state
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from torchft import hub, models
from torchft.adapters.lora import (
    LoRAConfig,
    apply_lora,
    init_adapters,
    merged_tensor,
)
from torchft.adapters.nf4 import NF4Config, apply_nf4, dequantise
from torchft.errors import UserError
from torchft.training.memory import stored_bytes

SIZES = {"hidden_size": 256, "intermediate_size": 320, "num_key_value_heads": 1}  # all multiples of 64 x 256 weights


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def quantised(linear):
    model = nn.Sequential(copy.deepcopy(linear))
    apply_nf4(model, NF4Config(targets=[".*"]))
    return model


def trained_adapters(model, seed=3):
    """Adapters that do something, the same for each model of the same shapes."""
    init_adapters(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.copy_(parameter + noise if name.endswith("magnitude") else noise)  # A is drawn on its device
    return model


def load_quantised(folder, *, dtype=torch.float32, device="cpu", **lora):
    """As a recipe does it: meta build, dtype, NF4, LoRA, to_empty, load, init."""
    model = models.build(models.config_json(folder)).to(dtype)
    apply_nf4(model, NF4Config())
    apply_lora(model, LoRAConfig(rank=4, alpha=12.0, **lora))
    model.to_empty(device=device)
    hub.load_weights(model, folder)
    return trained_adapters(model)


def test_takes_about_half_a_byte_a_weight():
    weight = quantised(nn.Linear(512, 512, bias=False).to(torch.bfloat16))[0].weight
    assert (weight.shape, weight.dtype) == ((512, 512), torch.bfloat16)
    assert stored_bytes(weight) <= 0.52 * weight.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_meta_model_is_quantised_by_the_loader(tmp_path, dtype):
    theirs = tiny.checkpoint(tmp_path, dtype=dtype, **SIZES)
    model = load_quantised(tmp_path, dtype=dtype)
    ours = theirs.get_submodule("model.layers.1.mlp.up_proj")
    restored = model.layers[1].mlp.up_proj.weight.to(torch.float32)
    assert torch.equal(restored, quantised(ours)[0].weight.to(torch.float32))
    assert torch.equal(model.embed_tokens.weight, theirs.model.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, theirs.lm_head.weight)  # not a target
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qlora_equals_lora_on_the_dequantised_base(tmp_path, dora, dtype):
    tiny.checkpoint(tmp_path, dtype=dtype, **SIZES)
    model = load_quantised(tmp_path, dtype=dtype, dora=dora)
    plain = models.load(tmp_path, dtype=dtype)
    apply_lora(plain, LoRAConfig(rank=4, alpha=12.0, dora=dora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            plain.get_parameter(name).copy_(parameter.to(parameter.dtype))
    tokens, results = tiny.tokens(length=9), []
    for each in (model, plain):
        logits = each(tokens)
        F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()).backward()
        results.append({"logits": logits} | {n: p.grad for n, p in adapter_parameters(each).items()})
    for name, value in results[0].items():
        assert relative(value, results[1][name]) <= (1e-6 if dtype == torch.float32 else 1e-2), name
    assert model.layers[0].mlp.up_proj.weight.grad is None


@pytest.mark.parametrize("dora", [False, True])
def test_n12_merged_export_is_the_dequantised_base_plus_the_adapter(tmp_path, dora):
    tiny.checkpoint(tmp_path / "base", **SIZES)
    model = load_quantised(tmp_path / "base", dora=dora)
    layer = model.layers[0].self_attn.v_proj
    expected = layer.weight.to(torch.float64) + 3 * layer.lora_b.double() @ layer.lora_a.double()
    if dora:
        expected *= (layer.lora_magnitude.double() / expected.norm(dim=1)).unsqueeze(1)
    merged = merged_state(model)
    assert relative(merged["layers.0.self_attn.v_proj.weight"], expected) <= 1e-6
    assert {type(tensor) for tensor in merged.values()} <= {torch.Tensor, nn.Parameter}
    hub.save(model, tmp_path / "export", read=merged.__getitem__)
    tokens = tiny.tokens(length=9)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert relative(theirs(tokens).logits, model(tokens)) <= 1e-5


def test_an_nf4_layer_without_adapter_is_dequantised_on_export():
    linear = nn.Linear(128, 128).to(torch.bfloat16)
    merged = merged_tensor(quantised(linear), "0.weight")
    assert type(merged) is torch.Tensor  # not NF4Weight
    assert merged.dtype == torch.bfloat16
    assert relative(merged, linear.weight.detach()) < 0.1


def test_sizes_that_do_not_fit_are_all_named():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(100, 128), nn.Linear(128, 64))
    with pytest.raises(UserError) as e:
        apply_nf4(model, NF4Config(targets=[".*"]))
    assert [p.split()[1] for p in e.value.problems] == ["1", "2"]
    assert "128 x 100 = 12800 weights, not a multiple of 16384" in e.value.problems[0]
    assert type(model[0].weight) is nn.Parameter


def test_compiled_equals_eager_without_graph_breaks():
    model = nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 256)).to(torch.bfloat16)
    apply_nf4(model, NF4Config(targets=[".*"]))
    apply_lora(model, LoRAConfig(rank=4, targets=[".*"]))
    trained_adapters(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, results = torch.randn(5, 128, dtype=torch.bfloat16), []
    for run in (model, compiled):
        model.zero_grad()
        out = run(x)
        out.float().pow(2).sum().backward()
        results.append((out, *(p.grad for p in adapter_parameters(model).values())))
    for eager, same in zip(*results, strict=True):
        torch.testing.assert_close(same, eager, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_qlora_on_cuda_compiled_equals_eager(tmp_path, dora, recompute):
    tiny.checkpoint(tmp_path, dtype=torch.bfloat16, std=0.05, **SIZES)
    model = load_quantised(tmp_path, dtype=torch.bfloat16, device="cuda", dora=dora).train()
    model.recompute = recompute
    weight = model.layers[0].mlp.up_proj.weight
    assert weight.is_cuda
    assert weight.packed.is_cuda
    reference = load_quantised(tmp_path, dora=dora)
    tokens, results = tiny.tokens(length=64), []
    for run in ("reference", "eager", "compiled"):
        each = reference if run == "reference" else model
        each.zero_grad()
        if run == "compiled":
            for layer in model.layers:
                layer.compile(fullgraph=True)
        rows = tokens.to(each.embed_tokens.weight.device)
        logits = each(rows)
        F.cross_entropy(logits.float().flatten(0, 1), rows.flatten()).backward()
        results.append({"logits": logits.detach().cpu()})
        results[-1] |= {n: p.grad.cpu() for n, p in adapter_parameters(each).items()}
    for name, exact in results[0].items():
        for got in results[1:]:
            assert relative(got[name], exact) <= 0.1, name


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(128, 384, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(384, 128, bias=False)

    def forward(self, x):
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def torchaos(weight):
    from torchao.quantization import to_nf4

    return nn.Parameter(to_nf4(weight.detach(), 64, 256), requires_grad=False)


def weights_kept(apply, *, budget=1.0, recompute=False):
    """How many tensors of a weight's size a compiled QLoRA block keeps from forward to backward."""
    torch.manual_seed(0)
    block = SwiGLU().to(torch.bfloat16)
    apply(block)
    apply_lora(block, LoRAConfig(rank=4, targets=["gate_proj", "up_proj", "down_proj"]))
    trained_adapters(block)
    forwards = []

    def spy(graph, inputs):
        outputs = graph.graph.find_nodes(op="output")[0].args[0]
        forwards.append([node.meta["val"] for node in outputs if isinstance(node, torch.fx.Node)])
        return make_boxed_func(graph.forward)

    def run(x):
        return checkpoint(block, x, use_reentrant=False) if recompute else block(x)

    backend = aot_autograd(
        fw_compiler=spy,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    x = torch.randn(512, 128, dtype=torch.bfloat16, requires_grad=True)
    grads = []
    with torch._functorch.config.patch(activation_memory_budget=budget):
        for each in (torch.compile(run, backend=backend, fullgraph=True), run):
            each(x).float().pow(2).sum().backward()
            grads.append([x.grad, *(p.grad for p in adapter_parameters(block).values())])
            x.grad = None
            block.zero_grad()
    for compiled, eager in zip(*grads, strict=True):
        assert relative(compiled, eager) < 1e-2
    assert len(forwards) == 1
    return sum(value.is_floating_point() and value.numel() == 128 * 384 for value in forwards[0])


@pytest.mark.parametrize("budget", [1.0, 0.8, 0.4])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_block_keeps_no_dequantised_weight(budget, recompute):
    assert weights_kept(lambda block: apply_nf4(block, NF4Config()), budget=budget, recompute=recompute) == 0


def test_torchaos_would_be_kept():
    """What the test above is there for, and that it can fail."""

    def apply(block):
        for linear in block.children():
            linear.weight = torchaos(linear.weight)

    assert weights_kept(apply) == 3


def test_stacked_layers_are_dequantised_in_one():
    block = SwiGLU()
    apply_nf4(block, NF4Config())
    gate, up = block.gate_proj.weight, block.up_proj.weight
    assert torch.equal(dequantise(gate, up, tag=0), torch.cat((gate.to(torch.float32), up.to(torch.float32))))


def test_what_nf4_cannot_do_is_refused():
    layer = quantised(nn.Linear(128, 128))[0]
    with pytest.raises(TypeError, match="take its values"):
        nn.init.normal_(layer.weight)
    with pytest.raises(TypeError, match="take its values"):
        layer.weight.sum()
    with pytest.raises(RuntimeError, match="expand"):
        layer.weight.data.copy_(torch.ones(64, 256))


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_compiled_blocks_keep_nf4_memory(budget):
    """Without a second dequantisation in backward, a compiled block keeps 2 bytes a weight."""
    config = tiny.SIZES | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    model = models.build(config | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}).to(torch.bfloat16)
    names = apply_nf4(model, NF4Config())
    apply_lora(model, LoRAConfig(rank=4))
    model.to_empty(device="cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, device="cuda"))
    model.train()
    for layer in model.layers:
        layer.compile(fullgraph=True)
    tokens = tiny.tokens(rows=1, length=32).cuda()
    with torch._functorch.config.patch(activation_memory_budget=budget):
        model(tokens).float().logsumexp(-1).sum().backward()  # compile
        before = torch.cuda.memory_allocated()
        loss = model(tokens).float().logsumexp(-1).sum()
    num_weights = sum(model.get_submodule(name).weight.numel() for name in names)
    assert torch.cuda.memory_allocated() - before < 0.2 * num_weights  # bytes; of which 0.1 are activations
    loss.backward()
