"""LoRA on the stacked weights of experts: PEFT's numbers and files, quantised bases, merging, what is chosen."""

import json

import peft
import pytest
import torch
from families import experts
from oracles import mean_nll, shifted, supervised, violations
from safetensors.torch import load_file
from tiny import tokens, transformers_model

from torchft import models
from torchft.adapters.fp8 import FP8Config, apply_fp8
from torchft.adapters.fused import fuse_lora
from torchft.adapters.lora import LoRAConfig, adapters_off, apply_lora, init_adapters, lora_layers, merged_tensor
from torchft.adapters.nf4 import NF4Config, apply_nf4, quantise
from torchft.adapters.peft import load_peft, peft_config, save_peft
from torchft.adapters.stacked import StackedLoRA
from torchft.errors import UserError
from torchft.hub import base_parameters, load_weights
from torchft.modules.grouped import StackedLinear
from torchft.training.compile import compile_blocks

FAMILIES = {name: experts.CASES[name] for name in ("mixtral", "qwen3_moe", "gpt_oss", "llama4_no_norm")}
EXPERTS = ["gate_up_proj", "down_proj"]
BATCH = tokens(length=40)
each_family = pytest.mark.parametrize("family", FAMILIES)
each_target = pytest.mark.parametrize("targets", [EXPERTS, ["gate_up_proj"], ["down_proj"]], ids=["both", "in", "out"])


@pytest.fixture
def base(tmp_path, family):
    transformers_model(**FAMILIES[family]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def hub_name(model):
    return model.hub_format.names.peft_name


def how(model):
    return {"hub_name": hub_name(model), "swaps": model.hub_format.names.peft_swaps}


def peft_model(family, targets, **options):
    parameters = [f"{'feed_forward' if 'llama4' in family else 'mlp'}.experts.{target}" for target in targets]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=7, target_modules=["q_proj"], target_parameters=parameters, **options
    )
    model = peft.get_peft_model(transformers_model(**FAMILIES[family]), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn_like(p))
    return model


def ours_of(base, folder, prepare=lambda model: None):
    model = models.load(base, dtype=torch.float32)
    prepare(model)
    apply_lora(model, peft_config(model, folder, hub_name=hub_name(model)))
    load_peft(model, folder, **how(model))
    return model


def trained(base, targets=("q_proj", *EXPERTS), prepare=None, **options):
    model = models.load(base, dtype=torch.float32)
    if prepare:
        prepare(model)
    apply_lora(model, LoRAConfig(**{"rank": 4, "alpha": 7.0} | options, targets=list(targets)))
    init_adapters(model, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def loss_and_gradients(model):
    loss = mean_nll(model, BATCH, shifted(supervised(BATCH)))
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss} | dict(zip(params, torch.autograd.grad(loss, list(params.values()))))


@each_family
@each_target
def test_we_compute_what_peft_does(base, tmp_path, family, targets):
    """Logits, loss and every gradient, from PEFT's own files."""
    theirs = peft_model(family, targets)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = ours_of(base, tmp_path / "adapter")
    loss = theirs(BATCH, labels=supervised(BATCH)).loss
    params = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()))))
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(grads[name])
    theirs.save_pretrained(tmp_path / "gradients")
    want = {n: p for n, p in ours_of(base, tmp_path / "gradients").named_parameters() if p.requires_grad}
    got = loss_and_gradients(ours)
    assert got.keys() - {"loss"} == want.keys()
    pairs = {"loss": (got["loss"], loss)} | {n: (got[n], want[n]) for n in want}
    assert violations(pairs) == {}


@each_family
@each_target
def test_peft_computes_what_we_do(base, tmp_path, family, targets):
    model = trained(base, ["q_proj", *targets])
    save_peft(model, tmp_path / "adapter", base_model_name_or_path="a/b", **how(model))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) - {"down_proj"} == {"q_proj"}  # Llama 4's shared expert has a down_proj, too
    assert config["target_parameters"] == sorted(targets)
    theirs = peft.PeftModel.from_pretrained(transformers_model(**FAMILIES[family]), tmp_path / "adapter")
    assert violations({"logits": (model(BATCH), theirs(BATCH).logits)}) == {}
    again = ours_of(base, tmp_path / "adapter")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@each_family
def test_merged_is_pefts_and_computes_the_same(base, tmp_path, family):
    theirs = peft_model(family, EXPERTS)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = ours_of(base, tmp_path / "adapter")
    merged = models.load(base, dtype=torch.float32)
    with torch.no_grad():
        for name in base_parameters(ours):
            merged.get_parameter(name).copy_(merged_tensor(ours, name))
    assert violations({"merged": (merged(BATCH), ours(BATCH))}) == {}
    assert violations({"peft": (merged(BATCH), theirs.merge_and_unload()(BATCH).logits)}) == {}
    with adapters_off(ours):
        off = ours(BATCH)
    assert torch.equal(off, models.load(base, dtype=torch.float32)(BATCH))
    assert violations({"off": (off, ours(BATCH))})


def test_merged_in_fp32_and_cast_once():
    torch.manual_seed(0)
    layer = StackedLoRA(StackedLinear(3, 16, 8).to(torch.bfloat16), 4, 8.0)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    a, b, w = (p.double() for p in (layer.lora_a, layer.lora_b, layer.weight))
    exact = w + 2.0 * torch.einsum("eor,eri->eoi", b, a)
    assert torch.equal(layer.merged_weight(), exact.float().to(torch.bfloat16))
    torch.testing.assert_close(layer.merged_weight(torch.float32).double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_per_expert_files_have_vllms_names_and_the_same_update(base, tmp_path, family):
    model = trained(base)
    folder = tmp_path / "adapter"
    save_peft(model, folder, hub_name=hub_name(model), base_model_name_or_path="a/b", each_expert=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    assert "target_parameters" not in config
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.experts.5."
    own = {key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
    assert own == {f"{part}_proj.lora_{x}.weight" for part in ("gate", "up", "down") for x in "AB"}
    layers = lora_layers(model)
    for part, name, rows in (("gate", "gate_up_proj", slice(0, 40)), ("up", "gate_up_proj", slice(40, 80))):
        a, b = (tensors[f"{prefix}{part}_proj.lora_{x}.weight"] for x in "AB")
        layer = layers[f"layers.1.mlp.experts.{name}"]
        update = (layer.merged_weight() - layer.weight)[5, rows]
        torch.testing.assert_close(7.0 / 4 * b @ a, update, rtol=1e-4, atol=1e-5)
    assert len(tensors) == 2 * 2 * (1 + 8 * 3)  # A and B, layers, q_proj and eight experts' three


BASES = {
    "nf4": lambda m: apply_nf4(m, NF4Config(targets=EXPERTS)),
    "fp8": lambda m: apply_fp8(m, FP8Config(targets=EXPERTS), device=torch.device("cpu")),
}


class Mesh:
    """Of two ranks, in which the first holds all of a padded shard's storage."""

    def size(self):
        return 2


def fp8_stack(weight):
    layer = StackedLinear(*(weight.shape[i] for i in (0, 2, 1)))
    layer.weight.data.copy_(weight)
    apply_fp8(torch.nn.ModuleDict({"experts": layer}), FP8Config(), device=torch.device("cpu"))
    return layer.weight.detach()


WIDE = experts.QWEN3_MOE | {"moe_intermediate_size": 64, "hidden_size": 128, "num_experts": 4}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("quantise", BASES.values(), ids=BASES)
def test_quantised_experts(tmp_path, monkeypatch, quantise, compiled):
    """Loss and gradients are those of a base with the dequantised weights; and a load quantises as surgery does."""
    torch._dynamo.reset()
    monkeypatch.setitem(FAMILIES, "wide", WIDE)
    transformers_model(**WIDE).save_pretrained(tmp_path)
    quantised, plain = (models.load(tmp_path, dtype=torch.float32) for _ in range(2))
    quantise(quantised)
    stacks = [n for n, m in plain.named_modules() if isinstance(m, StackedLinear)]
    with torch.no_grad():
        for name in stacks:
            weight = quantised.get_submodule(name).weight
            assert type(weight).__name__ in ("NF4Weight", "FP8Weight")
            plain.get_submodule(name).weight.copy_(weight.to(torch.float32))
    assert violations({"it rounds": (plain(BATCH), models.load(tmp_path, dtype=torch.float32)(BATCH))})
    for model in (quantised, plain):
        apply_lora(model, LoRAConfig(rank=4, targets=["q_proj", *EXPERTS]))
        init_adapters(model, torch.Generator().manual_seed(0))
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    if compiled:
        for layer in quantised.layers:
            layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    got, want = loss_and_gradients(quantised), loss_and_gradients(plain)
    assert violations({name: (got[name], want[name]) for name in want}) == {}

    loaded = models.build(models.config_json(tmp_path))
    quantise(loaded)
    loaded.to_empty(device="cpu")
    load_weights(loaded, tmp_path)
    for name in stacks:
        a, b = (m.get_submodule(name).weight.to(torch.float32) for m in (loaded, quantised))
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [quantise, fp8_stack])
def test_a_quantised_stack_is_cut_between_experts_as_fsdp_does(make):
    """Split, slice, padded storage, gathered: each part is the experts that it says."""
    weight = make(torch.randn(5, 128, 128))
    values = weight.to(torch.float32)
    assert [p.shape[0] for p in weight.split(2)] == [2, 2, 1]
    for part, want in zip(weight.split(2), values.split(2)):
        assert torch.equal(part.to(torch.float32), want)
    padded = weight.new_zeros(6, 128, 128)
    padded[:5].copy_(weight)
    assert torch.equal(padded[:5].to(torch.float32), values)
    assert padded.view(-1).shape == (6 * 128 * 128,)
    assert torch.equal(padded.as_strided((5, 128, 128), (128 * 128, 128, 1), 0).to(torch.float32), values)
    shard = padded[:3]
    parts, _ = shard.fsdp_pre_all_gather(Mesh())
    whole, _ = shard.fsdp_post_all_gather(parts, None, torch.float32)
    assert whole.shape == (6, 128, 128)
    assert torch.equal(whole[:5].to(torch.float32), values)


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_all_linear_takes_experts_and_leaves_the_router(base, family):
    model = models.load(base, dtype=torch.float32)
    names = apply_lora(model, LoRAConfig(rank=4))
    assert {n.rpartition(".")[2] for n in names} == {"q_proj", "k_proj", "v_proj", "o_proj", *EXPERTS}
    trained_names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n for n in trained_names) and not any("router" in n for n in trained_names)


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_ranks_and_alphas_by_pattern_round_trip(base, tmp_path, family):
    model = trained(base, rank_pattern={"down_proj": 2, r"layers\.0\..*gate_up_proj": 6}, alpha_pattern={"q_proj": 3.0})
    save_peft(model, tmp_path / "adapter", base_model_name_or_path="a/b", **how(model))
    again = ours_of(base, tmp_path / "adapter")
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    theirs = peft.PeftModel.from_pretrained(transformers_model(**FAMILIES[family]), tmp_path / "adapter")
    assert violations({"logits": (model(BATCH), theirs(BATCH).logits)}) == {}


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_dora_is_refused(base, family):
    model = models.load(base, dtype=torch.float32)
    with pytest.raises(
        UserError, match=r"lora.dora: layers.0.mlp.experts.gate_up_proj has the weights of many experts"
    ):
        apply_lora(model, LoRAConfig(dora=True))
    apply_lora(model, LoRAConfig(dora=True, targets=["q_proj"]))


@pytest.mark.parametrize("family", ["mixtral"])
def test_bars_see_b_in_another_order(base, tmp_path, family):
    """PEFT has a B's experts innermost; a reader that has them outermost gets every update wrong."""
    theirs = peft_model(family, EXPERTS)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = ours_of(base, tmp_path / "adapter")
    with torch.no_grad():
        for layer in lora_layers(ours).values():
            if isinstance(layer, StackedLoRA):
                wrong = layer.lora_b.clone().permute(1, 2, 0).reshape(layer.out_features, layer.num_experts, layer.rank)
                layer.lora_b.copy_(wrong.permute(1, 0, 2))
    assert violations({"logits": (ours(BATCH), theirs(BATCH).logits)})


FUSED = ("mixtral", "qwen3_moe")
UNFUSED = {name: FAMILIES[name] for name in ("gpt_oss", "llama4_no_norm")}


def check_fused(plain, fused):
    names = list(fused.state_dict())
    assert fuse_lora(fused) == [f"layers.{i}.mlp.experts" for i in range(len(fused.layers))]
    assert list(fused.state_dict()) == names
    got, want = loss_and_gradients(fused), loss_and_gradients(plain)
    assert violations({name: (got[name], want[name]) for name in want}) == {}
    with torch.no_grad(), adapters_off(plain), adapters_off(fused):
        assert torch.equal(fused(BATCH), plain(BATCH))


@pytest.mark.parametrize("family", FUSED)
def test_fused_nothing_changes_but_the_speed(base, family):
    check_fused(trained(base), trained(base))


@pytest.mark.parametrize("quantise", BASES.values(), ids=BASES)
def test_fused_on_quantised_experts_nothing_changes_but_the_speed(tmp_path, quantise):
    transformers_model(**WIDE).save_pretrained(tmp_path / "base")
    check_fused(*(trained(tmp_path / "base", prepare=quantise) for _ in range(2)))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_fused_in_bf16_on_a_gpu_is_near_fp32(tmp_path, compiled):
    """As near as the layers that are not fused, or nearer."""
    transformers_model(**WIDE).save_pretrained(tmp_path / "base")
    torch._dynamo.reset()

    def gradients(dtype, is_fused):
        model = trained(tmp_path / "base").to("cuda")
        for name, p in model.named_parameters():
            p.data = p.data if ".lora_" in name else p.data.to(dtype)
        if is_fused:
            fuse_lora(model)
        if compiled:
            compile_blocks(model.train())
        batch = BATCH.cuda()
        loss = mean_nll(model, batch, shifted(supervised(batch)))
        params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return {"loss": loss} | dict(zip(params, torch.autograd.grad(loss, list(params.values()))))

    exact, plain, fused = (
        gradients(torch.float32, False),
        gradients(torch.bfloat16, False),
        gradients(torch.bfloat16, True),
    )
    for name, want in exact.items():
        error, bar = ((got[name].float() - want).norm() / want.norm() for got in (fused, plain))
        assert error <= max(1.5 * bar, 0.02), name


@pytest.mark.parametrize("family", UNFUSED)
def test_experts_with_another_formula_stay_as_they_are(base):
    model = trained(base)
    assert not [name for name in fuse_lora(model) if "experts" in name]


@pytest.mark.parametrize("family", ["qwen3_moe"])
@pytest.mark.parametrize("lora", [{"dropout": 0.1}, {"rank_pattern": {"down_proj": 2}}, {"rank": 70}, {"rank": 1000}])
def test_adapters_that_the_kernel_cannot_do_stay_as_they_are(base, lora):
    model = trained(base, **lora)
    assert not [name for name in fuse_lora(model) if "experts" in name]
