"""Every way to save activations against plain autograd, on gradients; and what `auto` chooses."""

import json
from dataclasses import replace

import pytest
import torch
from oracles import distance, mean_nll
from processes import NEEDS_TWO_GPUS, run_ranks
from tiny import LLAMA3_ROPE, decoder, tokens
from torch import nn

from torchft.adapters.fp8 import FP8Config, apply_fp8
from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters
from torchft.adapters.nf4 import NF4Config, apply_nf4
from torchft.errors import UserError
from torchft.training import distributed, recompute
from torchft.training.block_cost import block_costs
from torchft.training.compile import compile_blocks
from torchft.training.distributed import ParallelConfig
from torchft.training.graphs import Replay
from torchft.training.memory import GIB, available_bytes
from torchft.training.offload import Offload
from torchft.training.recompute import CHEAP, apply_plan, choose, plans

CPU = torch.device("cpu")
NOISE = 1e-5  # relative; fp32 sums in another order


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("torchft.training.offload.SMALL", 0)
    yield
    torch.compiler.reset()
    torch._functorch.config.activation_memory_budget = 1.0


def model_of(kind, **changes):
    """Four layers, with the surgery that ``kind`` names."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "num_hidden_layers": 4}
    model = decoder(rope_parameters=LLAMA3_ROPE, **(sizes | changes))
    if "nf4" in kind:
        apply_nf4(model, NF4Config())
    if kind != "full":
        apply_lora(model, LoRAConfig(rank=4, dropout=0.3 if "dropout" in kind else 0.0))
        init_adapters(model, torch.Generator().manual_seed(1))
        for name, p in model.named_parameters():
            if "lora_b" in name:
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(2))
    return model.train()


def gradients(model, *, packed=False):
    batch, labels = tokens(2, 24), tokens(2, 24, seed=1)
    positions = torch.arange(24).remainder(16).expand(2, -1) if packed else None
    torch.manual_seed(7)  # of dropout
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = mean_nll(model, batch, labels, positions)
    return {"loss": loss.detach()} | dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))


def worst(got, want):
    return max(distance(got[name], want[name])[1] for name in want)


def settings(model, **changed):
    given = {"offload": False, "compiled": False, "rows": 2, "seq_len": 24, "packed": False, "device": CPU}
    return plans(model, **(given | changed))


def partitioned(model, *, budget):
    """Blocks through the compiler's partitioner, without the minutes that C++ takes."""
    compile_blocks(model, budget=budget, backend="aot_eager_decomp_partition")


@pytest.mark.parametrize("offload", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["full", "lora", "lora dropout", "nf4 lora", "lora packed"])
@pytest.mark.parametrize("value", ["none", "full", 0.5, 0.3, "auto"])
def test_eager_gradients(kind, value, offload):
    model, packed = model_of(kind), "packed" in kind
    plain = gradients(model, packed=packed)
    (plan,) = settings(model, recompute=value, offload=offload, packed=packed)
    apply_plan(model, plan)
    assert plan.budget is None and plan.share == {"none": 0, "full": 1, 0.5: 0.5, 0.3: 0.7, "auto": 0}[value]
    got = gradients(model, packed=packed)
    assert all(torch.equal(got[name], plain[name]) for name in plain)
    if offload:
        assert isinstance(model.activations, Offload)
        assert model.activations.kept > 0.8 * 4 * plan.block_bytes
        assert model.activations.offloaded / model.activations.kept == pytest.approx(offload, abs=0.05)


@pytest.mark.parametrize("kind", ["full", "lora", "lora dropout", "nf4 lora", "lora packed"])
@pytest.mark.parametrize("value", ["none", "full", 0.3, 1.0])
def test_compiled_gradients(kind, value, monkeypatch):
    model, packed = model_of(kind), "packed" in kind
    if "dropout" in kind:  # compiled code draws other numbers; that its gradients are right: below
        partitioned(model, budget=1.0)
    plain = gradients(model, packed=packed)
    monkeypatch.setattr(recompute, "compile_blocks", partitioned)
    got = []
    for offload in (0.0, 0.5, 1.0):
        (plan,) = settings(model, recompute=value, compiled=True, packed=packed, offload=offload)
        torch.compiler.reset()  # compiled while tensors are offloaded, too
        apply_plan(model, plan)
        got.append(gradients(model, packed=packed))
        assert worst(got[-1], plain) <= NOISE
    assert all(torch.equal(got[0][name], other[name]) for other in got[1:] for name in plain)


def test_dropout_is_never_left_to_the_compilers_partitioner():
    """Which draws it anew in backward: gradients wrong by more than their size, and no error."""
    model = model_of("lora dropout")
    partitioned(model, budget=CHEAP)
    plain = gradients(model)
    partitioned(model, budget=0.0)
    assert worst(gradients(model), plain) > 0.5
    (plan,) = settings(model, recompute="full", compiled=True)
    assert plan.budget == CHEAP and plan.share == 1.0
    (plan,) = settings(model_of("lora"), recompute="full", compiled=True)
    assert plan.budget == 0.0 and plan.share == 0.0


def test_dropout_of_compiled_blocks_has_the_gradient_of_its_loss():
    """The slope of the loss along a random direction, with the same random numbers."""
    model, slope = model_of("lora dropout"), {}
    partitioned(model, budget=CHEAP)
    generator = torch.Generator().manual_seed(5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    way = {name: torch.randn(p.shape, generator=generator) for name, p in trained.items()}
    want = sum((gradients(model)[name] * way[name]).sum() for name in way)
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            for name, p in trained.items():
                p += step * way[name]
        slope[step] = gradients(model)["loss"].double()
        with torch.no_grad():
            for name, p in trained.items():
                p -= step * way[name]
    assert abs((slope[1e-4] - slope[-1e-4]) / 2e-4 / want - 1) < 0.02


def test_shares_are_spread_evenly(monkeypatch):
    model, seen = model_of("lora", num_hidden_layers=8), []
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: seen.append(i))
    for share, again in [(0.0, []), (0.25, [7, 3]), (0.5, [7, 5, 3, 1]), (1.0, list(range(7, -1, -1)))]:
        seen.clear()
        model.recompute = share
        gradients(model)
        assert seen == [*range(8), *again]


def on_a_gpu(monkeypatch, model, *, limit, **changed):
    """Plans as on a GPU, with costs as on a CPU."""
    measure = recompute.block_costs
    monkeypatch.setattr(recompute, "block_costs", lambda *a, device, **more: measure(*a, device=CPU, **more))
    given = {"recompute": "auto", "rows": 8, "limit": limit, "device": torch.device("cuda")}
    return settings(model, **(given | changed))


@pytest.mark.parametrize("compiled", [False, True])
def test_auto_takes_the_fastest_that_fits(monkeypatch, compiled):
    model = model_of("lora", vocab_size=512)
    roomy = on_a_gpu(monkeypatch, model, limit=GIB, seq_len=256, compiled=compiled)
    assert not roomy[0].offload and roomy[0].rows == 8 and roomy[0].share == 0.0
    assert [p.memory.total for p in roomy] == sorted((p.memory.total for p in roomy), reverse=True)
    assert [p.time for p in roomy] == sorted(p.time for p in roomy)
    leanest = roomy[-1].memory.total
    last = roomy[0]
    for share in (0.8, 0.5, 0.2, 0.01):  # ever less memory: slower, never more than there is
        limit = int((leanest + share * (roomy[0].memory.total - leanest)) / recompute.FITS) + 1
        plan = on_a_gpu(monkeypatch, model, limit=limit, seq_len=256, compiled=compiled)[0]
        assert plan.memory.total <= recompute.FITS * limit and plan.time >= last.time
        assert "would be" in plan.reason and "GiB" in plan.reason
        last = plan
    with pytest.raises(UserError, match=r"does not fit.*GiB"):
        on_a_gpu(monkeypatch, model, limit=leanest // 2, seq_len=256, compiled=compiled)


def chosen_by_a_rank(limits, shards):
    """What this rank chooses, with so many bytes on the device of each."""
    with distributed.init(ParallelConfig(), device="cpu") as world, pytest.MonkeyPatch.context() as patch:
        model = model_of("lora", vocab_size=512)
        found = on_a_gpu(patch, model, limit=limits[world.rank], seq_len=256, shards=shards)
    return [(plan.setting, plan.memory.total, plan.gathers_once) for plan in found]


def test_ranks_choose_alike_by_the_fullest_device():
    """Also with a limit at which weights that stay whole would fit on the other rank alone."""
    roomy, *_ = chosen_by_a_rank([GIB], 2)
    tight = int(0.7 * roomy[1])
    one, other = run_ranks(chosen_by_a_rank, 2, [GIB, tight], 2)
    assert one == other == chosen_by_a_rank([tight], 2)
    assert one[0] != roomy and roomy[2] and not one[0][2]


def chosen_by_a_gpu():
    """What this rank chooses, where the second one's GPU is nearly full."""
    with distributed.init(ParallelConfig(), device="cuda") as world:
        free = torch.cuda.mem_get_info(world.device)[0]
        held = torch.empty((free - 4 * GIB) * world.rank, dtype=torch.uint8, device=world.device)
        model = model_of("lora", vocab_size=512, num_hidden_layers=24).to("meta")
        found = settings(model, recompute="auto", rows=8, seq_len=8192, shards=2, device=world.device)
        del held
    return [plan.setting for plan in found]


@pytest.mark.gpu
@NEEDS_TWO_GPUS
def test_two_gpus_choose_alike_by_the_fullest():
    one, other = run_ranks(chosen_by_a_gpu, 2)
    assert one == other and one[0] != {"budget": None, "share": 0.0, "offload": 0.0, "rows": 8}


def test_memory_of_a_rank_is_its_part_and_what_is_gathered(monkeypatch):
    """Of weights a part, two whole blocks, and whole what is in no block: what FSDP2 holds while a block runs."""
    model = model_of("full", vocab_size=512)
    blocks = [sum(p.nbytes for p in layer.parameters()) for layer in model.layers]
    every = sum(p.nbytes for p in model.parameters())
    for shards in (2, 4):
        memory = on_a_gpu(monkeypatch, model, limit=GIB, seq_len=256, shards=shards, reshard=True)[0].memory
        assert memory.weights == every // shards + 2 * blocks[0] + every - sum(blocks)
        assert (memory.gradients, memory.optimizer) == (every // shards, 2 * (every // shards))
        kept = on_a_gpu(monkeypatch, model, limit=GIB, seq_len=256, shards=shards, reshard=False)[0].memory
        assert kept.weights == every + every // shards and kept.total - memory.total == kept.weights - memory.weights


def test_adapters_leave_nothing_to_gather_of_a_base_that_stays_whole(monkeypatch):
    model = model_of("lora", vocab_size=512)
    trained, every = (sum(p.nbytes for p in model.parameters() if p.requires_grad or whole) for whole in (False, True))
    assert trained < 0.1 * every
    twice, never = (
        on_a_gpu(monkeypatch, model, limit=GIB, seq_len=256, shards=2, reshard=reshard)[0] for reshard in (True, False)
    )
    assert never.gathers_once and not twice.gathers_once and never.memory.weights == every
    assert twice.setting == never.setting and twice.time > never.time
    for limit, once in ((GIB, True), (int(never.memory.total / recompute.SURELY_FITS) - 1, False)):
        plan = on_a_gpu(monkeypatch, model, limit=limit, seq_len=256, shards=2, recompute="none")[0]
        assert plan.gathers_once == once


def test_auto_keeps_less_rather_than_gathers(monkeypatch):
    """Where whole weights leave no room to keep everything, and gathering takes longer than what that costs."""
    model = model_of("lora", vocab_size=512)
    most = on_a_gpu(monkeypatch, model, limit=GIB, seq_len=256, shards=2, reshard=False)[0].memory.total
    limit = int(0.97 * most / recompute.SURELY_FITS)
    chosen = {}
    for bandwidth in (1e9, 1e18):
        monkeypatch.setattr(recompute, "GATHER", bandwidth)
        chosen[bandwidth] = on_a_gpu(monkeypatch, model, limit=limit, seq_len=256, shards=2, in_backward=True)[0]
    assert chosen[1e9].gathers_once and chosen[1e9].share + chosen[1e9].offload > 0.0
    assert not chosen[1e18].gathers_once and chosen[1e18].share + chosen[1e18].offload == 0.0


def test_fewer_rows_come_before_recompute(monkeypatch):
    monkeypatch.setattr(recompute, "LAUNCH", 0.0)  # as for a model whose blocks take longer than their launch
    model = model_of("lora", hidden_size=256, intermediate_size=1024)
    first = on_a_gpu(monkeypatch, model, limit=GIB, seq_len=2048)[0]
    plan = on_a_gpu(monkeypatch, model, limit=int(0.5 * first.memory.total), seq_len=2048)[0]
    assert plan.share == 0.0 and plan.rows < 8
    monkeypatch.setattr(recompute, "LAUNCH", 1.0)
    slow_host = on_a_gpu(monkeypatch, model, limit=int(0.5 * first.memory.total), seq_len=2048)[0]
    assert slow_host.share > 0.0 and slow_host.rows > plan.rows


def test_choose_falls_to_leaner_plans():
    (one,) = settings(model_of("lora"), recompute="none")
    times_and_sizes = [(1, 30), (2, 10), (3, 9.8), (4, 5)]
    sized = [replace(one, time=t, memory=replace(one.memory, total=a * GIB)) for t, a in times_and_sizes]
    found = choose(sized, available=20 * GIB)
    assert [p.time for p in found] == [2, 4]
    assert "needs about 10.0 of 20.0 GiB" in found[0].reason and "100% faster and needs 30.0 GiB" in found[0].reason


def test_a_resumed_run_keeps_its_plan(monkeypatch):
    """With more memory than before, with less than it is thought to need, and with other settings."""
    model = model_of("lora", vocab_size=512)
    roomy = on_a_gpu(monkeypatch, model, limit=GIB, seq_len=256)
    lean = on_a_gpu(monkeypatch, model, limit=int(roomy[1].memory.total / recompute.FITS) + 1, seq_len=256)[0]
    assert lean.setting != roomy[0].setting
    saved = json.loads(json.dumps(lean.setting))
    more = on_a_gpu(monkeypatch, model, limit=GIB, seq_len=256, keep=saved)
    assert more[0].setting == saved and "as this run began" in more[0].reason
    settings_after = [plan.setting for plan in more[1:]]
    assert settings_after[0] == roomy[0].setting and saved not in settings_after  # what follows if it does not run
    less = on_a_gpu(monkeypatch, model, limit=1, seq_len=256, keep=saved)
    assert [plan.setting for plan in less] == [saved]
    other = on_a_gpu(monkeypatch, model, limit=GIB, seq_len=256, keep=saved | {"rows": 3})
    assert [plan.setting for plan in other] == [plan.setting for plan in roomy]


def test_gradients_that_outlive_their_micro_step_are_counted(monkeypatch):
    model = model_of("full")
    gradients = {
        rows: {p.gradients for p in on_a_gpu(monkeypatch, model, limit=GIB) if p.rows == rows} for rows in (8,)
    }
    assert gradients == {8: {"new"}}
    small = on_a_gpu(monkeypatch, model, limit=GIB, keep={"budget": None, "share": 0.0, "offload": False, "rows": 4})
    assert small[0].rows == 4 and small[0].gradients == "added"
    assert on_a_gpu(monkeypatch, model, limit=GIB, accumulation=2)[0].gradients == "added"
    freed = on_a_gpu(monkeypatch, model, limit=GIB, in_backward=True)
    assert {(p.gradients, p.rows) for p in freed} == {("freed", 8)}


def test_shared_prompts_are_in_no_graph(monkeypatch):
    """One recorded in the trial would hold memory that no batch ever uses: 47 of 79 GiB for pairs of an 8B model."""
    model = model_of("lora", vocab_size=512)
    made = {flag: on_a_gpu(monkeypatch, model, limit=GIB, compiled=True, branches=flag)[0] for flag in (False, True)}
    assert made[False].replays and not made[True].replays


def test_memory_of_a_plan_is_the_blocks(monkeypatch):
    """The estimate's activations against the bytes that autograd keeps."""
    model, kept = model_of("full"), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    (plan,) = settings(model, recompute="none")
    model.activations = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    loss = mean_nll(model, tokens(2, 24), tokens(2, 24))
    assert loss.requires_grad
    measured = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert abs(plan.memory.activations / measured - 1) < 0.03, (plan.memory.activations, measured)


def test_available_memory_counts_what_quantised_weights_take(monkeypatch):
    model = nn.Sequential(nn.Linear(256, 256, bias=False)).to(torch.bfloat16)
    apply_fp8(model, FP8Config(), device=torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    assert available_bytes(model, torch.device("cpu")) == 256 * 256 + 256 * 4


def test_the_cost_of_a_model_that_replays_is_that_of_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = decoder(num_hidden_layers=2)
    before = block_costs(model, [None], seq_len=32, packed=False, device=torch.device("cpu"))
    model.replay = Replay(model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert block_costs(model, [None], seq_len=32, packed=False, device=torch.device("cpu")) == before
