"""SwiGLU between experts' layers with LoRA, and the gradients of their narrow matrices, against plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchft.kernels.expert_swiglu import expert_swiglu, expert_swiglu_backward
from torchft.kernels.narrow_outer import narrow_outer

COUNTS = [0, 5, 1, 0, 9]  # rows of each expert


def inputs(
    counts: list[int], f: int, r: int, *, dtype: torch.dtype = torch.float64, device: str = "cpu", spare: int = 0
) -> list[Tensor]:
    n, e = sum(counts) + spare, len(counts)
    shapes = [(n, 2 * f), (n, r), (e, 2 * f, r), (e, r, f), (n, 1)]
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]
    offsets = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    return [*(x.requires_grad_() for x in made), offsets]


def reference(
    gate_up: Tensor, inner: Tensor, b: Tensor, a: Tensor, scale: Tensor, offsets: Tensor
) -> tuple[Tensor, ...]:
    """The formula, a row at a time in effect, differentiated by autograd."""
    experts = torch.searchsorted(offsets, torch.arange(len(gate_up), device=offsets.device), right=True)
    gate, up = (gate_up + torch.einsum("nr,nfr->nf", inner, b[experts])).chunk(2, dim=1)
    h = scale * F.silu(gate) * up
    return h, torch.einsum("nf,nrf->nr", h, a[experts])


def run(f, xs: list[Tensor]) -> list[Tensor]:
    out = f(*xs)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in out]
    return [*out, *torch.autograd.grad(out, xs[:-1], grads)]


def compare(given: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    for i, (mine, theirs) in enumerate(zip(given, wanted, strict=True)):
        error = (mine.double().cpu() - theirs.double().cpu()).norm() / theirs.double().cpu().norm()
        assert error < limit, (i, error)


def test_values_and_every_gradient_follow_the_formula_in_fp64() -> None:
    xs = inputs(COUNTS, 24, 3)
    compare(run(expert_swiglu, xs), run(reference, xs), 1e-12)


def test_torch_agrees_that_the_operators_are_well_formed() -> None:
    xs = inputs(COUNTS, 16, 2, dtype=torch.float32)
    torch.library.opcheck(expert_swiglu, xs)
    grads = torch.randn(len(xs[0]), 16).t().contiguous().t(), torch.randn(len(xs[0]), 2)  # as a product may leave it
    torch.library.opcheck(expert_swiglu_backward, (*grads, *(x.detach() for x in xs)))
    torch.library.opcheck(narrow_outer, (xs[0].detach(), xs[1].detach(), xs[-1]))


def test_compiled_it_is_one_graph_with_the_same_numbers() -> None:
    xs = inputs(COUNTS, 32, 4, dtype=torch.float32)
    compiled = torch.compile(expert_swiglu, fullgraph=True, backend="aot_eager")
    compare(run(compiled, xs), run(expert_swiglu, xs), 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("counts", "f", "r"),
    [
        (COUNTS, 40, 5),
        ([0, 0, 300, 31, 0, 64, 1, 700], 768, 16),
        ([*range(1, 128), 0], 768, 16),
        ([257] * 3, 1376, 64),
        ([0, 1], 1024, 8),
    ],
    ids=["few", "gaps", "many", "wide", "one"],
)
def test_the_kernels_agree_with_the_formula(counts: list[int], f: int, r: int) -> None:
    xs = inputs(counts, f, r, dtype=torch.bfloat16, device="cuda")
    wide = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in xs]
    compare(run(expert_swiglu, xs), run(reference, wide), 1e-2)


@pytest.mark.gpu
def test_the_kernels_leave_rows_behind_the_last_expert_alone() -> None:
    xs = inputs(COUNTS, 40, 8, dtype=torch.bfloat16, device="cuda", spare=100)
    short = [x.detach()[: sum(COUNTS)] if len(x) == len(xs[0]) else x.detach() for x in xs]
    h, inner = expert_swiglu(*(x.detach() for x in xs))
    want_h, want_inner = expert_swiglu(*short)
    assert torch.equal(h[: len(want_h)], want_h) and torch.equal(inner[: len(want_h)], want_inner)


@pytest.mark.gpu
def test_a_graph_replays_other_loads() -> None:
    """Nothing of how many rows an expert has is fixed when kernels are launched."""
    xs = [x.detach() for x in inputs([4, 2, 10], 64, 16, dtype=torch.bfloat16, device="cuda")]
    expert_swiglu(*xs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = expert_swiglu(*xs)
    xs[-1].copy_(torch.tensor([9, 9, 16], dtype=torch.int32))
    graph.replay()
    torch.cuda.synchronize()
    wanted = expert_swiglu(*xs)
    assert torch.equal(out[0], wanted[0]) and torch.equal(out[1], wanted[1])
