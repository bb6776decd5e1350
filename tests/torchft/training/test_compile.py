"""Compiled blocks: one graph for all of them, none more after warm-up, none at all in a second run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import mean_nll
from tiny import decoder, tokens

from torchft.adapters.lora import LoRAConfig, apply_lora
from torchft.training.compile import compile_blocks, compiled, compiler_settings

EAGER = "aot_eager_decomp_partition"  # the compiler without C++


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not set for the tests that follow
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()
    torch._functorch.config.activation_memory_budget = 1.0


def steps(model, packings):
    """One training and one evaluation step for each packing of two rows of 48 tokens."""
    for i, lengths in enumerate(packings):
        batch, labels = tokens(2, 48, seed=i), tokens(2, 48, seed=i + 1)
        positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 48)
        mean_nll(model.train(), batch, labels, positions).backward()
        with torch.no_grad():
            mean_nll(model.eval(), batch, labels, positions)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_nothing_is_compiled_after_warm_up(share):
    model = decoder(num_hidden_layers=4)
    apply_lora(model, LoRAConfig(rank=4))
    model.recompute = share
    compile_blocks(model, budget=0.8, backend=EAGER)
    steps(model, [(48, 48)])
    warm = compiled()
    assert warm.graphs == 2  # training and evaluation, not one per block
    assert warm.seconds > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        steps(model, [(20, 28, 48), (5, 6, 7, 30, 40, 8), (48, 1, 47), (48, 48)])
    assert compiled().graphs == warm.graphs


def test_another_shape_would_be_noticed():
    model = decoder()
    compile_blocks(model, backend=EAGER)
    mean_nll(model, tokens(2, 48), tokens(2, 48))
    before = compiled().graphs
    mean_nll(model, tokens(2, 32), tokens(2, 32))
    assert compiled().graphs > before


def test_a_run_may_need_more_graphs_than_torch_allows():
    model = decoder()
    compile_blocks(model, backend="eager")
    lengths = range(8, 28, 2)
    for s in lengths:
        mean_nll(model, tokens(2, s), tokens(2, s))
    assert compiled().graphs == len(lengths)


def test_another_budget_compiles_anew():
    model = decoder()
    for budget in (0.8, 0.0):
        compile_blocks(model, budget=budget, backend=EAGER)
        assert torch._functorch.config.activation_memory_budget == budget
        kept = {}

        def keep(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t
            return t

        model.activations = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        loss = mean_nll(model, tokens(2, 48), tokens(2, 48))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = [t for address, t in kept.items() if address not in weights and t.shape[-1] == 64]
        assert (len(saved) == 2) == (budget == 0.0), [t.shape for t in saved]  # the input of each of two blocks
        assert loss.requires_grad


RUN = """
import json, sys, torch
from dataclasses import asdict
sys.path[:0] = sys.argv[1:]
from oracles import mean_nll
from tiny import decoder, tokens
from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters
from torchft.adapters.nf4 import NF4Config, apply_nf4
from torchft.training.compile import compile_blocks, compiled

model = decoder(hidden_size=128, intermediate_size=128, num_key_value_heads=4)
apply_nf4(model, NF4Config())
apply_lora(model, LoRAConfig(rank=4))
init_adapters(model)
compile_blocks(model, budget=0.8)
mean_nll(model, tokens(2, 16), tokens(2, 16)).backward()
print(json.dumps(asdict(compiled()) | {"says": str(compiled())}))
"""


def test_a_second_run_compiles_nothing(tmp_path, monkeypatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name)
    tests = str(Path(__file__).parents[2])

    def run():
        command = [sys.executable, "-c", RUN, tests]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=Path(tests).parent)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    cold, warm = run(), run()
    assert (cold["misses"], cold["hits"], cold["bypassed"]) == (1, 0, 0) and cold["says"].endswith("cold")
    assert (warm["misses"], warm["hits"], warm["bypassed"]) == (0, 1, 0) and warm["says"].endswith("from the cache")
    assert warm["seconds"] < cold["seconds"] / 2
    assert list((tmp_path / "torchft" / "compiled").iterdir())


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


def test_autograd_functions_of_our_own_do_not_bypass_the_cache():
    with compiler_settings(0.8):
        torch.compile(lambda x: 2 * Sine.apply(x), fullgraph=True)(torch.randn(8, requires_grad=True)).sum().backward()
    assert compiled().bypassed == 0 and compiled().misses == 1
