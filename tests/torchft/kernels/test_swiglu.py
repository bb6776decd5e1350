import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchft.kernels.swiglu import lora_swiglu


def inputs(t: int, f: int, r: int, *, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    shapes = [(t, f), (t, f), (t, r), (t, r), (f, r), (f, r), (r, f)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def reference(
    gate: Tensor, up: Tensor, gi: Tensor, ui: Tensor, gb: Tensor, ub: Tensor, a: Tensor
) -> tuple[Tensor, ...]:
    """The formula, differentiated by autograd."""
    h = F.silu(gate + gi @ gb.t()) * (up + ui @ ub.t())
    return h, h @ a.t()


def compare(given: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    for i, (mine, theirs) in enumerate(zip(given, wanted, strict=True)):
        error = (mine.double().cpu() - theirs.double().cpu()).norm() / theirs.double().cpu().norm()
        assert error < limit, (i, error)


def run(f, xs: list[Tensor], seed: int = 1) -> list[Tensor]:
    out = f(*xs)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in out]
    return [*out, *torch.autograd.grad(out, xs, grads)]


def test_values_and_every_gradient_follow_the_formula_in_fp64() -> None:
    xs = inputs(5, 24, 3, dtype=torch.float64)
    compare(run(lora_swiglu, xs), run(reference, xs), 1e-12)


def test_torch_agrees_that_the_operator_is_well_formed() -> None:
    torch.library.opcheck(lora_swiglu, inputs(4, 16, 2, dtype=torch.float32))


def test_compiled_it_is_one_graph_with_the_same_numbers() -> None:
    xs = inputs(6, 32, 4, dtype=torch.float32)
    compiled = torch.compile(lora_swiglu, fullgraph=True, backend="aot_eager")
    compare(run(compiled, xs), run(lora_swiglu, xs), 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("t", "f", "r"), [(1, 1024, 8), (257, 1376, 16), (2048, 14336, 16), (64, 8192, 64), (33, 2050, 5)]
)
def test_the_kernel_agrees_with_the_formula(t: int, f: int, r: int) -> None:
    xs = inputs(t, f, r, dtype=torch.bfloat16, device="cuda")
    wide = [x.detach().double().requires_grad_() for x in xs]
    compare(run(lora_swiglu, xs), run(reference, wide), 1e-2)
