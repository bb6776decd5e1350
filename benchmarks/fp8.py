"""The fp8 base's products at the shapes of Llama 3.1 8B, and what transposing in backward costs; needs a GPU.

    python benchmarks/fp8.py                    # under a minute on an H200
    python benchmarks/fp8.py --tokens 2048

For each weight [out, in] and number of tokens: the products alone on ready codes, in bf16 and in fp8, then the whole
input gradient (scaling, quantising, product), compiled, with the transposed codes kept (a second copy of the weight)
and with the codes transposed as it goes (what the library does). Then each transpose alone, and what a compiled linear
layer keeps and needs. TFLOP/s count 2 x tokens x out x in; GB/s what must be read and written.
"""

import argparse
from functools import partial

import torch
from torch import Tensor, nn
from triton.testing import do_bench

from torchft.adapters.fp8 import FP8Config, apply_fp8, multiply, quantise_rows, transpose

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # q and o, k and v, gate and up, down: out, in
PER_BLOCK = (2, 2, 2, 1)  # of each shape
LAYERS = 32
BF16 = torch.bfloat16


def two_copies(grad: Tensor, scale: Tensor, transposed: Tensor) -> Tensor:
    codes, row_scale = quantise_rows(grad * scale.to(grad.dtype))
    ones = torch.ones(transposed.shape[0], device=grad.device)
    return multiply(codes, row_scale, transposed, ones, grad.dtype, fast=True)


def one_copy(grad: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    grad_codes, row_scale = quantise_rows(grad * scale.to(grad.dtype))
    ones = torch.ones(codes.shape[1], device=grad.device)
    return multiply(grad_codes, row_scale, transpose(codes, row_scale), ones, grad.dtype, fast=True)


def milliseconds(run) -> float:  # type: ignore[no-untyped-def]
    return do_bench(run, warmup=10, rep=50, return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16384])
    given = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    torch.manual_seed(0)
    weights = []
    for out, inner in SHAPES:
        codes, scale = quantise_rows(torch.randn(out, inner, device="cuda", dtype=BF16) / inner**0.5)
        weights.append((codes, codes.t().contiguous(), scale[:, 0]))

    for tokens in given.tokens:
        torch.compiler.reset()  # at most 8 shapes of one function are compiled
        total = {"two": 0.0, "one": 0.0}
        for (out, inner), (codes, transposed, scale), count in zip(SHAPES, weights, PER_BLOCK, strict=True):
            total_flops = 2 * tokens * out * inner
            x, grad = (torch.randn(tokens, n, device="cuda", dtype=BF16) for n in (inner, out))
            dense = torch.randn(out, inner, device="cuda", dtype=BF16)
            x_codes, x_scale = quantise_rows(x)
            compiled = [torch.compile(f, dynamic=False, fullgraph=True) for f in (two_copies, one_copy)]
            results = [f(grad, scale, w) for f, w in zip(compiled, (transposed, codes), strict=True)]
            apart = ((results[0] - results[1]).norm() / results[0].norm()).item()
            times = {
                "bf16 product": milliseconds(lambda a=x, b=dense: a @ b.t()),
                "fp8 product": milliseconds(
                    lambda a=x_codes, b=x_scale, c=codes, d=scale: multiply(a, b, c, d, BF16, fast=True)
                ),
                "input gradient, two copies": milliseconds(partial(compiled[0], grad, scale, transposed)),
                "input gradient, one copy": milliseconds(partial(compiled[1], grad, scale, codes)),
            }
            total["two"] += count * times["input gradient, two copies"]
            total["one"] += count * times["input gradient, one copy"]
            line = ", ".join(f"{name} {ms:.3f} ms {total_flops / ms / 1e9:.0f} TFLOP/s" for name, ms in times.items())
            print(f"{tokens} tokens, {out} x {inner}: {line}; apart {apart:.1e}", flush=True)
        more = total["one"] - total["two"]
        print(
            f"{tokens} tokens, a block's input gradients: two copies {total['two']:.2f} ms, one {total['one']:.2f}; in "
            f"{LAYERS} layers {LAYERS * more:.1f} ms more a micro-step"
        )

    compiled_transpose = torch.compile(transpose, dynamic=False, fullgraph=True)
    one = torch.ones(1, 1, device="cuda")
    for (out, inner), (codes, transposed, _) in zip(SHAPES, weights, strict=True):
        assert torch.equal(compiled_transpose(codes, one).view(torch.uint8), transposed.view(torch.uint8))
        plain = milliseconds(lambda c=codes: c.view(torch.uint8).t().contiguous())
        tiled = milliseconds(lambda c=codes: compiled_transpose(c, one))
        times = {"plain": plain, "compiled": tiled}
        rates = ", ".join(f"{name} {ms:.3f} ms {2 * codes.nbytes / ms / 1e6:.0f} GB/s" for name, ms in times.items())
        print(f"transposing {out} x {inner}: {rates}")

    kept_and_peak(max(given.tokens))


def kept_and_peak(tokens: int) -> None:
    """What one compiled layer keeps for backward beside its weight, and its peak beyond what lives before."""
    model = nn.Sequential(nn.Linear(4096, 14336, bias=False, device="cuda", dtype=BF16))
    apply_fp8(model, FP8Config(), device=torch.device("cuda"))
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    x = torch.randn(tokens, 4096, device="cuda", dtype=BF16, requires_grad=True)
    for _ in range(2):
        x.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = compiled(x)
        kept = torch.cuda.memory_allocated() - before - out.nbytes
        out.backward(out.detach())
    peak = torch.cuda.max_memory_allocated() - before
    weight = model[0].weight
    assert isinstance(weight, nn.Parameter)
    print(
        f"a layer of 14336 x 4096 at {tokens} tokens: {kept / 2**20:.1f} MiB kept for backward beside the weight's "
        f"{weight.numel() / 2**20:.0f}, peak {peak / 2**20:.0f} MiB with output {out.nbytes / 2**20:.0f} and gradient "
        f"{x.nbytes / 2**20:.0f}"
    )


if __name__ == "__main__":
    main()
