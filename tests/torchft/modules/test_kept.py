"""What is marked is kept for backward, and what it came from is not computed again."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.flop_counter import FlopCounterMode

from torchft.adapters.fused import fuse_lora
from torchft.adapters.lora import LoRAConfig, apply_lora
from torchft.modules.kept import UNCOUNTED, kept
from torchft.modules.moe import Experts, MoE
from torchft.modules.routers import SoftmaxRouter as Router
from torchft.training.compile import compiler_settings


class Block(nn.Module):
    """Two products of one size, of which one takes more FLOPs; what is made of either wants both for its gradient."""

    def __init__(self, mark):
        super().__init__()
        torch.manual_seed(0)
        self.cheap, self.dear = nn.Linear(2, 64, bias=False), nn.Linear(4, 64, bias=False)
        self.mark = mark

    def forward(self, x):
        return self.mark(self.cheap(x[:, :2])).sin() * self.dear(x).sin()


def backward_graph(module, budget, *inputs):
    """What backward computes, as the compiler cuts it, once it has run."""
    found = []

    def compiler(graph, _):
        found.append(graph.graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    with compiler_settings(budget):
        backend = aot_autograd(
            fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition
        )
        compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=False)
        compiled(*inputs).square().sum().backward()
    torch._dynamo.reset()
    return found[1]


def again(mark, budget):
    """Widths of the products that backward computes again, and a gradient."""
    block = Block(mark)
    graph = backward_graph(block, budget, torch.linspace(-1, 1, 512 * 4).view(512, 4))
    products = [node.args for node in graph.nodes if node.target is torch.ops.aten.mm.default]
    widths = {b.meta["val"].shape[0] for _, b in products if b.meta["val"].shape[1] == 64}
    return widths, block.cheap.weight.grad


@pytest.mark.parametrize(("budget", "plain", "marked"), [(0.0, {2, 4}, {2, 4}), (0.6, {2}, {4}), (1.0, set(), set())])
def test_what_is_marked_comes_before_what_is_dear(budget, plain, marked):
    """Where one of the two fits; with budget 0 nothing is kept, with 1 everything."""
    (without, grad), (with_mark, same) = again(lambda x: x, budget), again(kept, budget)
    assert (without, with_mark) == (plain, marked)
    assert torch.equal(grad, same)


@pytest.mark.parametrize(
    ("sizes", "budget", "counts"),
    [
        ((8, 32), 0.0, {"expert_swiglu": 1, "expert_spread": 2, "grouped_mm": 3}),
        ((8, 32), 0.1, {"expert_spread": 2, "grouped_mm": 3}),
        ((64, 8), 0.7, {"expert_spread": 1, "grouped_mm": 2}),  # rows are too wide to be kept, and nobody wants them
        ((8, 32), 1.0, {"expert_spread": 1, "grouped_mm": 2}),
    ],
)
def test_experts_with_adapters_do_nothing_again_but_what_the_first_product_takes(sizes, budget, counts):
    """The gradients take one spreading and two products; what is between the products is part of their own operator."""
    torch.manual_seed(0)
    model = nn.Sequential(MoE(Router(sizes[0], 4, 2), Experts(4, *sizes))).train()
    apply_lora(model, LoRAConfig(rank=2, targets=["gate_up_proj", "down_proj"]))
    assert fuse_lora(model) == ["0.experts"]
    graph = backward_graph(model, budget, torch.randn(2, 512, sizes[0], requires_grad=True))
    found = Counter(str(node.target).split(".")[1] for node in graph.nodes if "torchft." in str(node.target))
    assert {name: found[name] for name in found if name in ("expert_swiglu", "expert_spread", "grouped_mm")} == counts


def test_it_is_the_identity_and_takes_no_time():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(kept(x), x) and torch.autograd.gradcheck(kept, x)
    torch.library.opcheck(torch.ops.torchft.kept.default, (x,))
    with torch.no_grad():
        assert kept(x) is x  # no copies while a model answers
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        kept(x)
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_keeps_its_kind(dtype):
    x = torch.randn(4, 6, dtype=dtype)[:, ::2]
    assert kept(x).dtype == dtype and kept(x).stride() == torch.empty_like(x).stride()
