"""Blocks that are split over ranks against whole ones: outputs, gradients, decoding, quantised bases, odd sizes."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from processes import run_ranks
from torch.distributed.fsdp import fully_shard

from torchft import models, ranks
from torchft.adapters.fp8 import FP8Config, apply_fp8
from torchft.adapters.fused import fuse_lora
from torchft.adapters.lora import LoRAConfig, apply_lora
from torchft.adapters.nf4 import NF4Config, apply_nf4
from torchft.adapters.tensor_parallel import split_blocks
from torchft.errors import UserError
from torchft.generation.engine import Engine
from torchft.generation.greedy import generate
from torchft.generation.requests import Request
from torchft.generation.sampling import Sampling
from torchft.modules.sharded import gathered
from torchft.token_shards import TokenShards
from torchft.training.distributed import SUM_IN_FP32, ParallelConfig, init, sum_gradients

CPU = torch.device("cpu")
WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE |= {"head_dim": 64}
TP = ParallelConfig(tp=2)
# sizes, what is done to the model -> how far outputs and gradients may be from those of one process
CASES = {
    "full": ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}, {}, 1e-5),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {"lora": {}}, 1e-5),
    "odd heads": ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32}, {"lora": {}}, 1e-5),
    "odd MLP": ({"intermediate_size": 77}, {}, 1e-5),
    "dora": (WIDE, {"lora": {"dora": True}}, 1e-5),
    "attention alone": (WIDE, {"lora": {"targets": ["q_proj", "o_proj"]}}, 1e-5),
    "nf4": (WIDE, {"nf4": NF4Config(targets=["q_proj", "v_proj", "gate_proj", "o_proj"]), "lora": {}}, 1e-5),
    "fp8": (WIDE, {"fp8": FP8Config(), "lora": {}}, 0.3),  # a rank scales the inputs of o and down by its own columns
}


def build(sizes, surgery, world=None, is_sharded=True):
    """As a recipe does it, with random values for all parameters, the same for any number of ranks."""
    model = models.build(tiny.SIZES | sizes | {"architectures": ["LlamaForCausalLM"]}).to(torch.float32)
    if "nf4" in surgery:
        apply_nf4(model, surgery["nf4"])
    if "fp8" in surgery:
        apply_fp8(model, surgery["fp8"], device=CPU)
    if "lora" in surgery:
        apply_lora(model, LoRAConfig(rank=4, alpha=8.0, **surgery["lora"]))
        fuse_lora(model)
    if world:
        split_blocks(model, world.tp_mesh, world.tokens)
    if world and is_sharded:
        for layer in model.layers:
            fully_shard(layer, mesh=world.mesh, mp_policy=SUM_IN_FP32)
        fully_shard(model, mesh=world.root_mesh, mp_policy=SUM_IN_FP32, reshard_after_forward=True)
        sum_gradients(model)
    model.to_empty(device=CPU)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = 0.05 * torch.randn(parameter.shape, generator=generator)
        ranks.copy_part(parameter, values.abs() + 1 if "norm" in name or "magnitude" in name else values)
    return model.train()


def outcome(model, own=lambda x: x, place=0):
    """The loss of rows that all ranks know, its gradients, and what the model decodes."""
    tokens = tiny.tokens(length=25, seed=3)
    inputs, labels = own(tokens[:, :-1]), own(tokens[:, 1:])
    loss = 0
    for _ in range(2):  # twice, as with accumulation
        part = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), reduction="sum")
        part.backward()
        loss = loss + part.detach()
    gradients = {name: ranks.whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    answers = generate(model, [[3, 5, 7], [1]], max_new_tokens=5, stop_ids=[0])
    return loss, gradients, answers


def split(cases):
    found = {}
    with init(TP, device="cpu") as world:
        for name in cases:
            sizes, surgery, _ = CASES[name]
            model = build(sizes, surgery, world)
            base = {n: ranks.whole(p).clone() for n, p in model.named_parameters()}
            loss, gradients, answers = outcome(model, world.tokens.own)
            found[name] = base, world.sum(loss), gradients, answers
            held = sum(ranks.local(p).numel() for p in model.layers.parameters())
            found[name] += (held / sum(p.numel() for p in model.layers.parameters()),)
    return found


def test_split_blocks_are_the_whole_ones():
    by_rank = run_ranks(split, 2, list(CASES))
    for name, (sizes, surgery, bar) in CASES.items():
        whole = build(sizes, {k: v for k, v in surgery.items() if k != "nf4"})  # NF4: the values that the ranks have
        for base, loss, gradients, answers, share in (found[name] for found in by_rank):
            assert share < (0.99 if "odd" in name else 0.75), name
            with torch.no_grad():
                for n, p in whole.named_parameters():
                    p.copy_(base[n])
                    p.grad = None
            want_loss, want, want_answers = outcome(whole)
            assert loss.item() == pytest.approx(want_loss.item(), rel=bar), name
            for n, gradient in gradients.items():
                assert (gradient - want[n]).norm() <= bar * want[n].norm() + 1e-9, (name, n)
            assert answers == want_answers or name == "fp8"


def sampled(model, *, compile=None, wrong=False):
    """What it draws, by an engine with fewer slots than requests; ``wrong``: a rank whose own draws are others."""
    engine = Engine(model, num_slots=2, max_len=32, stop_ids=[0, 1], compile=compile)
    if wrong:
        draw = engine._slots.sample
        engine._slots.sample = lambda *args, **how: tuple(x + 1 for x in draw(*args, **how))
    sampling = Sampling(max_new_tokens=9, temperature=1.5)
    prompts = [[3, 5, 7], [1], list(range(2, 21)), [9, 9]]
    found = engine.complete([Request(prompt=p, sampling=sampling, seed=i) for i, p in enumerate(prompts)])
    heads = {cache.k.shape[2] for cache in engine._slots.cache.layers}
    return [c.tokens for c in found], [c.logps for c in found], heads


def sampled_by_ranks(ways):
    with init(TP, device="cpu") as world:
        found = []
        for is_sharded, compile in ways:
            model = build({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}, {}, world, is_sharded)
            with gathered(model):
                found.append([sampled(model, compile=compile), sampled(model, wrong=world.rank == 1)])
    return found


def test_ranks_draw_the_same_tokens_each_with_its_heads():
    """With FSDP and without, compiled or not; also where a rank alone would have drawn others."""
    tokens, logps, heads = sampled(build({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}, {}))
    assert heads == {4} and len({t for answer in tokens for t in answer}) > 12
    for found in run_ranks(sampled_by_ranks, 2, [(True, None), (False, None), (True, "aot_eager"), (False, "eager")]):
        for ours, theirs, held in (one for way in found for one in way):
            assert ours == tokens and held == {2}
            assert [x for row in theirs for x in row] == pytest.approx([x for row in logps for x in row], abs=1e-5)


def refused():
    problems = []
    with init(TP, device="cpu") as world:
        for size, surgery in ((320, {"nf4": NF4Config()}), (336, {"fp8": FP8Config()})):
            try:
                build(WIDE | {"intermediate_size": size}, surgery, world)
            except UserError as e:
                problems.append(str(e))
    return problems


@pytest.mark.parametrize(
    ("name", "why"),
    [("gemma2/gemma-2-2b", "caps"), ("qwen3_next/Qwen3-Next-80B-A3B-Instruct", "has layers whose state")],
)
def test_what_cannot_see_a_part_of_a_row_is_refused(name, why):
    with pytest.raises(UserError, match=f"parallel.cp: this model {why}"):
        split_blocks(models.build(name), None, TokenShards(cp=2))


def test_parts_that_a_format_cannot_hold_are_refused():
    for nf4, fp8 in run_ranks(refused, 2):
        assert "nf4: tensor parallel would cut a weight of 320 x 256 into parts of 160 x 256, not a multiple of" in nf4
        assert "parallel.tp" in nf4 and "into parts of 168 x 256, not multiples of 16" in fp8
