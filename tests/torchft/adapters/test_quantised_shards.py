"""A quantised base under FSDP2: each rank's part, what is gathered of it, training and memory, against one process."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from processes import run_ranks
from torch import nn
from torch.distributed.fsdp import _fully_shard, fully_shard

from torchft import models, ranks
from torchft.adapters.fp8 import FP8, FP8Config, FP8Weight, apply_fp8
from torchft.adapters.fused import fuse_lora
from torchft.adapters.lora import LoRAConfig, apply_lora
from torchft.adapters.nf4 import NF4Config, NF4Weight, apply_nf4, check_shards, quantise
from torchft.adapters.quantised import QuantisedWeight
from torchft.errors import UserError
from torchft.kernels import nf4
from torchft.training.compile import compile_blocks, compiled
from torchft.training.distributed import SUM_IN_FP32, ParallelConfig, init

SIZES = tiny.SIZES | {"hidden_size": 256, "intermediate_size": 384}  # halves and quarters of 64 x 256 weights
FORMATS = {"nf4": NF4Weight, "fp8": FP8Weight}
STEPS = MICRO_STEPS = 2
CPU = torch.device("cpu")


def build(kind, *, mesh=None, backend=None, reshard=True, dora=False, recompute=0.0, dtype=torch.float32):
    """As a recipe does it, with random values for all parameters, the same for any number of ranks."""
    model = models.build(SIZES | {"architectures": ["LlamaForCausalLM"]}).to(dtype)
    apply_nf4(model, NF4Config()) if kind == "nf4" else apply_fp8(model, FP8Config(), device=CPU)
    apply_lora(model, LoRAConfig(rank=4, alpha=8.0, dora=dora))
    fuse_lora(model)
    model.train().recompute = recompute
    if backend:
        compile_blocks(model, backend=backend)
    if mesh:
        for layer in (*model.layers, model):
            fully_shard(layer, mesh=mesh, mp_policy=SUM_IN_FP32, reshard_after_forward=reshard)
    model.to_empty(device=CPU)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = 0.05 * torch.randn(parameter.shape, generator=generator)
        ranks.copy_part(parameter, values.abs() + 1 if name.endswith("magnitude") else values)
    return model


def train(model, *, rank=None, size=1):
    """Losses of this rank's rows (None: of all ranks' rows, in one process) and gradients, whole, of every step."""
    results = []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for step in range(STEPS):
        losses = []
        for micro_step in range(MICRO_STEPS):
            for r in range(size) if rank is None else [rank]:
                tokens = tiny.tokens(length=9, seed=100 * step + 10 * micro_step + r)
                loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
                (loss / size if rank is None else loss).backward()
                losses.append(loss.detach())
        results.append((torch.stack(losses), {name: ranks.whole(p.grad) for name, p in trained.items()}))
        with torch.no_grad():
            for p in trained.values():
                ranks.local(p).sub_(ranks.local(p.grad), alpha=0.5)
                p.grad = None
    return results


def stored(parts):
    return {part.untyped_storage().nbytes() for part in parts}


def gathered_parts(layer):
    """The tensors that all gathered weights of an FSDP layer consist of; they are empty when this returns."""
    layer.unshard()
    parts = [p for w in layer.parameters() if isinstance(w, QuantisedWeight) for p in w._parts()]
    assert len(parts) >= 7
    assert 0 not in stored(parts)
    layer.reshard()
    return parts


def sharded_training(cases, replicate):
    """Each case's results, and the graphs that were compiled for it."""
    reduced, reduce = [], _fully_shard._fsdp_param_group.foreach_reduce

    def spy(params, gradients, *args):
        reduced.extend(gradient.numel() for gradient in gradients)
        return reduce(params, gradients, *args)

    _fully_shard._fsdp_param_group.foreach_reduce = spy
    found = []
    with init(ParallelConfig(replicate=replicate), device="cpu") as world:
        for kind, case in cases:
            torch._dynamo.reset()
            graphs = compiled().graphs
            model = build(kind, mesh=world.mesh, **case)
            reduced.clear()
            results = train(model, rank=world.rank)
            found.append((results, compiled().graphs - graphs))
            assert sum(reduced) == STEPS * MICRO_STEPS * sum(p.numel() for p in model.parameters() if p.requires_grad)
            if world.shards > 1:
                frees_what_it_gathers(model, reshards=case.get("reshard", True))
            assert all(p.requires_grad or p.grad is None for p in model.parameters())
    return found


def frees_what_it_gathers(model, *, reshards):
    parts = [part for layer in model.layers for part in gathered_parts(layer)]
    assert stored(parts) == {0}
    loss = model(tiny.tokens(length=9)).logsumexp(-1).sum()
    assert stored(parts) == {0} if reshards else 0 not in stored(parts)
    loss.backward()
    assert stored(parts) == {0}
    again = [part for layer in model.layers for part in gathered_parts(layer)]
    assert all(a is b for a, b in zip(again, parts, strict=True))  # which autograd may have saved


NF4_CASES = [
    {},
    {"reshard": False},
    {"backend": "aot_eager"},
    {"dora": True, "recompute": 0.5, "dtype": torch.bfloat16},
    {"dora": True, "backend": "aot_eager", "reshard": False},
]
FP8_CASES = [{}, {"reshard": False}, {"backend": "aot_eager"}]


@pytest.mark.parametrize(
    ("size", "replicate", "cases"),
    [
        (2, 1, [("nf4", case) for case in NF4_CASES] + [("fp8", case) for case in FP8_CASES]),
        (4, 2, [("nf4", {}), ("fp8", {})]),
        (2, 2, [("nf4", {}), ("fp8", {})]),  # each rank has the whole model
    ],
    ids=["shard2", "replicate2-shard2", "replicate2"],
)
def test_training_equals_one_process(size, replicate, cases):
    """Losses to the bit, then gradients over ranks and micro-steps; the second step's follow from the first's."""
    by_rank = run_ranks(sharded_training, size, cases, replicate)
    for i, (kind, case) in enumerate(cases):
        expected = train(build(kind, **{key: case[key] for key in case.keys() & {"dora", "dtype"}}), size=size)
        for rank, found in enumerate(by_rank):
            results, graphs = found[i]
            for step, ((losses, gradients), (all_losses, all_gradients)) in enumerate(zip(results, expected)):
                about = kind, case, step
                own_losses = all_losses.view(MICRO_STEPS, size)[:, rank]
                assert (losses - own_losses).abs().max() <= (1e-6 if step else 0), about
                assert gradients.keys() == all_gradients.keys()
                for name, gradient in all_gradients.items():
                    assert gradient.norm() > 0, (name, about)
                    assert (gradients[name] - gradient).norm() <= 4e-5 * gradient.norm(), (name, about)
            assert graphs == (1 if "backend" in case else 0), about


def loaded():
    with init(ParallelConfig(), device="cpu") as world:
        found = {}
        for kind in FORMATS:
            reference = build(kind, dtype=torch.bfloat16)
            model = build(kind, mesh=world.mesh, dtype=torch.bfloat16)
            for name, p in model.named_parameters():
                if not isinstance(whole := reference.get_parameter(name), QuantisedWeight):
                    continue
                part = p.to_local()
                assert type(part) is type(ranks.local(p)) is FORMATS[kind]
                assert (part.shape, part.dtype) == ((p.shape[0] // 2, p.shape[1]), torch.bfloat16)
                for own, every in zip(part._parts(), whole._parts(), strict=True):
                    assert torch.equal(own, every.chunk(2)[world.rank])
                assert torch.equal(ranks.whole(p), whole.to(torch.bfloat16))
                assert torch.equal(p.to(torch.float64).full_tensor(), whole.to(torch.float64))
                found[kind] = found.get(kind, 0) + 1
        return found


def test_each_rank_holds_its_rows_of_what_one_process_would():
    assert run_ranks(loaded, 2) == 2 * [{"nf4": 14, "fp8": 14}]


def quantised(kind, dense):
    if kind == "nf4":
        return quantise(dense)
    codes = torch.empty_like(dense, dtype=FP8)
    weight = FP8Weight(codes, codes.new_empty(len(dense), dtype=torch.float32), shape=dense.shape, dtype=dense.dtype)
    return weight if dense.is_meta else weight.copy_(dense)


def sharded_unevenly(sizes):
    """How many rows of each weight this rank has."""
    found = []
    with init(ParallelConfig(), device="cpu") as world:
        for kind, *shape in sizes:
            dense = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(world.rank), requires_grad=True)
            whole = quantised(kind, dense)
            for source in (torch.empty(shape, device="meta"), dense):
                layer = nn.Linear(shape[1], shape[0], bias=False, device="meta")
                layer.weight = nn.Parameter(quantised(kind, source), requires_grad=False)
                fully_shard(layer, mesh=world.mesh, mp_policy=SUM_IN_FP32, reshard_after_forward=True)
                if source.is_meta:
                    layer.to_empty(device=CPU)
                    ranks.copy_part(layer.weight, dense)
                for _ in range(2):  # the second time into the first one's memory
                    outputs = [F.linear(x, whole), layer(x)]
                    assert torch.equal(*outputs)
                    assert torch.equal(*(torch.autograd.grad(out.cos().sum(), x)[0] for out in outputs))
                assert torch.equal(ranks.whole(layer.weight), whole.to(torch.float32))
            found.append(len(layer.weight.to_local()))
    return found


def test_the_last_ranks_may_have_fewer_rows_or_none():
    sizes = [("nf4", 10, 8192), ("nf4", 2, nf4.GROUP), ("fp8", 16, 16), ("fp8", 2, 16)]
    assert list(zip(*run_ranks(sharded_unevenly, 3, sizes))) == [(4, 4, 2), (1, 1, 0), (6, 6, 4), (1, 1, 0)]


def test_nf4_layers_that_cannot_be_cut_are_all_named():
    model = nn.Sequential(*(nn.Linear(256, out, device="meta") for out in (256, 128, 320)), nn.Linear(4, 3))
    apply_nf4(model, NF4Config(targets=["0", "1", "2"]))
    check_shards(model, 1)
    with pytest.raises(UserError) as e:
        check_shards(model, 4)
    assert [p.split()[1] for p in e.value.problems] == ["1", "2"]
    assert "128 x 256 weights; each of 4 ranks would hold 32 rows = 8192, not a multiple of 16384" in str(e.value)
    with pytest.raises(UserError, match="2 has 320 x 256"):  # whose first rank would have 160 rows
        check_shards(model, 2)
    check_shards(model[:2], 2)
    uneven = nn.Sequential(nn.Linear(8192, 10, device="meta"))
    apply_nf4(uneven, NF4Config(targets=["0"]))
    check_shards(uneven, 3)  # 4, 4 and 2 rows
    with pytest.raises(AssertionError, match="cannot be cut after 32 rows"):
        model[1].weight.chunk(4)


@pytest.mark.parametrize("kind", FORMATS)
def test_other_cuts_are_refused(kind):
    weight = quantised(kind, torch.ones(128, 256))
    for cut in (
        lambda: weight[:, :128],
        lambda: weight[::2],
        lambda: weight.view(256, 128),
        lambda: weight.t(),
        lambda: weight.as_strided((64, 256), (256, 1), 64 * 256),
    ):
        with pytest.raises(TypeError, match="take its values"):
            cut()
    assert torch.equal(weight[64:].to(torch.float32), weight.to(torch.float32)[64:])
