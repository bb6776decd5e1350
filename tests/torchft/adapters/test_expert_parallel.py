"""Experts that ranks share against all of them in one process: losses, gradients, adapters, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from processes import run_ranks
from torch.distributed.fsdp import fully_shard

from torchft import models, ranks
from torchft.adapters.expert_parallel import split_experts
from torchft.adapters.lora import LoRAConfig, apply_lora
from torchft.adapters.tensor_parallel import split_blocks
from torchft.errors import UserError
from torchft.modules.moe import MoE
from torchft.training.distributed import SUM_IN_FP32, ParallelConfig, degrees, init, sum_gradients

SIZES = {
    "architectures": ["MixtralForCausalLM"], "vocab_size": 31, "hidden_size": 32, "intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
}  # fmt: skip
CASES = {"full": {}, "lora": {"rank": 2, "alpha": 4.0}, "bias": {}}
TOKENS = torch.randint(0, 31, (4, 17), generator=torch.Generator().manual_seed(1))


def build(case, world=None, balance=0.0):
    model = models.build(SIZES).to(torch.float32)
    if case == "bias":
        for moe in (m for m in model.modules() if isinstance(m, MoE)):
            for layer in (moe.experts.gate_up_proj, moe.experts.down_proj):
                layer.bias = torch.nn.Parameter(layer.weight.new_empty(layer.weight.shape[:2]))
    if CASES[case]:
        apply_lora(model, LoRAConfig(**CASES[case]))
    if world:
        for experts in split_experts(model, world.ep_mesh):
            fully_shard(experts, mesh=world.expert_mesh, mp_policy=SUM_IN_FP32)
        split_blocks(model, world.tp_mesh, world.tokens)
        for layer in model.layers:
            fully_shard(layer, mesh=world.mesh, mp_policy=SUM_IN_FP32)
        fully_shard(model, mesh=world.root_mesh, mp_policy=SUM_IN_FP32, reshard_after_forward=True)
        sum_gradients(model)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = 0.2 * torch.randn(parameter.shape, generator=generator)
        ranks.copy_part(parameter, values.abs() + 1 if "norm" in name else values)
    return model.train()


def outcome(model, rows, own=lambda x: x):
    loss = torch.zeros(())
    for micro_rows in rows:
        inputs, labels = own(micro_rows[:, :-1]), own(micro_rows[:, 1:])
        part = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), reduction="sum")
        part.backward()
        loss += part.detach()
    return loss, {name: ranks.whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}


def shared(parallel):
    found = {}
    torch.use_deterministic_algorithms(True)  # memory that nobody has written is NaN
    with init(ParallelConfig(**parallel), device="cpu") as world:
        for case in CASES:
            model = build(case, world)
            rows = TOKENS.chunk(world.data_size)[world.data_rank]
            loss, gradients = outcome(model, rows.split(1), world.tokens.own)
            experts = [p for name, p in model.named_parameters() if "experts" in name]
            share = sum(ranks.local(p).numel() for p in experts) / sum(p.numel() for p in experts)
            found[case] = world.sum(loss), gradients, share
    return found


@pytest.mark.parametrize("parallel", [{"ep": 2}, {"ep": 2, "tp": 2}, {"ep": 4, "cp": 2}, {"ep": 2, "replicate": 2}])
def test_experts_of_several_ranks_are_those_of_one(parallel):
    size = 2 if parallel == {"ep": 2} else 4
    by_rank = run_ranks(shared, size, parallel)
    for case in CASES:
        want_loss, want = outcome(build(case), TOKENS.split(1))
        for loss, gradients, share in (found[case] for found in by_rank):
            assert loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
            assert gradients.keys() == want.keys() and share == parallel.get("replicate", 1) / size
            for name, gradient in gradients.items():
                assert (gradient - want[name]).norm() <= 1e-5 * want[name].norm(), (case, name)


def refused():
    with init(ParallelConfig(ep=2), device="cpu") as world:
        with pytest.raises(UserError, match="2 ranks would share experts, but the model has none"):
            split_experts(models.build("llama3/Llama-3.2-1B"), world.ep_mesh)
        with pytest.raises(UserError, match="2 ranks cannot share 5 experts alike"):
            split_experts(models.build(SIZES | {"num_local_experts": 5}), world.ep_mesh)


def test_what_cannot_be_shared_is_refused():
    run_ranks(refused, 2)
    with pytest.raises(UserError, match="ep 3 must divide shard 2 x cp 1 x tp 2"):
        degrees(ParallelConfig(ep=3, tp=2), 4)
