"""Bandwidth of dequantising NF4, in GB/s of what must be read (0.517 bytes a weight) and written (2); needs a GPU.

python benchmarks/nf4.py            # the kernel as the library runs it, beside a copy
python benchmarks/nf4.py --sweep    # other settings of the kernel
"""

import argparse

import torch
from torch import Tensor
from triton.testing import do_bench

from torchft.kernels.nf4 import GROUP, GROUP_BYTES, dequantise, dequantise_triton, quantise_

SHAPES = ((1024, 4096), (4096, 4096), (14336, 4096), (28672, 8192))
SETTINGS = ((128, 4), (256, 4), (256, 8), (512, 4), (512, 8), (1024, 4), (1024, 8), (2048, 8))  # words, warps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    sweep = parser.parse_args().sweep
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for rows, columns in SHAPES:
        weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        packed = torch.empty(weight.numel() // GROUP, GROUP_BYTES, dtype=torch.uint8, device="cuda")
        quantise_(packed, weight)
        out = torch.empty_like(weight)
        num_bytes = packed.nbytes + out.nbytes
        print(f"{rows} x {columns}")
        if sweep:
            for words, warps in SETTINGS:
                report(f"{words} words, {warps} warps", num_bytes, kernel_ms(packed, out, words, warps))
            continue
        report("copy of bf16", 2 * weight.nbytes, do_bench(lambda o=out, w=weight: o.copy_(w), return_mode="median"))
        report("kernel", num_bytes, kernel_ms(packed, out))
        operator = lambda p=packed, c=columns: dequantise([p], c, torch.bfloat16, 0)  # noqa: E731
        report("operator", num_bytes, do_bench(operator, return_mode="median"))
        quantising = do_bench(lambda p=packed, w=weight: quantise_(p, w), return_mode="median")
        print(f"  quantise: {quantising:.2f} ms, {8e9 / weight.numel() * quantising / 1000:.1f} s for 8B weights")


def kernel_ms(packed: Tensor, out: Tensor, words: int = 512, num_warps: int = 4) -> float:
    milliseconds = do_bench(
        lambda: dequantise_triton(packed, out, words=words, num_warps=num_warps), return_mode="median"
    )
    assert isinstance(milliseconds, float)
    return milliseconds


def report(name: str, num_bytes: int, milliseconds: float) -> None:
    print(f"  {name}: {1000 * milliseconds:.1f} us, {num_bytes / milliseconds / 1e6:.0f} GB/s")


if __name__ == "__main__":
    main()
