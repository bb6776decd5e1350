"""Time, TFLOP/s and peak memory of the loss on the last hidden states: chunked, and plain on all logits.

    python benchmarks/cross_entropy.py
    python benchmarks/cross_entropy.py --dim 2048 --chunks 4096 8192
    python benchmarks/cross_entropy.py --block 8192 16384 32768

Forward and backward from bf16 hidden states to the gradient of these and, of a trained head, of its weight. TFLOP/s
count the products that must be: 2 x t x d x v each for logits, grad hidden and grad weight. Peak memory is what a line
needs beyond inputs and weight. ``rows`` is the kernel alone, on the first of ``--chunks``.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.kernels import nll
from torchft.losses.likelihood import nll_sum, token_nll


def plain(hidden: Tensor, project: nn.Linear, *, labels: Tensor) -> Tensor:
    return F.cross_entropy(project(hidden).float().flatten(0, 1), labels.flatten(), reduction="sum")


def compiled(hidden: Tensor, project: nn.Linear, *, labels: Tensor) -> Tensor:
    return COMPILED(hidden, project, labels=labels)


COMPILED = torch.compile(plain)  # one compilation serves all rows of the table that use it


def measure(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median milliseconds and peak GiB beyond what lives before, after three calls to warm up."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**30


def step(loss: Callable[..., Tensor], hidden: Tensor, head: nn.Linear, labels: Tensor) -> None:
    (loss(hidden, head, labels=labels).sum() / labels.numel()).backward()
    hidden.grad = head.weight.grad = None


def time_rows(t: int, v: int, blocks: list[int], repeats: int) -> None:
    """The kernel alone on ``t`` rows; leaves the last of ``blocks`` in force."""
    logits = torch.randn(t, v, device="cuda", dtype=torch.bfloat16)
    labels, ones = torch.randint(v, (t,), device="cuda"), torch.ones(t, device="cuda")
    print("rows  block  chunk       ms     GB/s (one read, one write)")
    for block in blocks:
        nll.BLOCK = block
        ms, _ = measure(partial(nll.row_logps, logits, labels, grad_logp=ones), repeats)
        print(f"     {block:6} {t:6} {ms:8.3f} {4 * t * v / ms / 1e6:8.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens at a time")
    parser.add_argument("--block", type=int, nargs="+", default=[nll.BLOCK], help="logits a program holds, 2^n")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled plain loss")
    given = parser.parse_args()
    t, d, v = given.tokens, given.dim, given.vocab

    torch.manual_seed(0)
    hidden = torch.randn(1, t, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(v, (1, t), device="cuda")
    head = nn.Linear(d, v, bias=False, device="cuda", dtype=torch.bfloat16)
    nn.init.normal_(head.weight, std=0.02)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {t} tokens x {d} x {v}, bf16")

    time_rows(given.chunks[0], v, given.block, given.repeats)

    print("head     loss       chunk       ms  TFLOP/s  peak GiB")
    for trained in (False, True):
        head.weight.requires_grad_(trained)
        flops = 2 * t * d * v * (3 if trained else 2)
        rows: list[tuple[str, object, Callable[..., Tensor]]] = []
        rows += [("nll_sum", chunk, partial(nll_sum, chunk=chunk)) for chunk in given.chunks]
        rows += [("token_nll", chunk, partial(token_nll, chunk=chunk)) for chunk in given.chunks]
        rows += [("plain", "all", plain)] + ([] if given.no_compile else [("compiled", "all", compiled)])
        for name, chunk, loss in rows:
            ms, peak = measure(partial(step, loss, hidden, head, labels), given.repeats)
            speed = flops / ms / 1e9
            print(f"{'trained' if trained else 'frozen':8} {name:10} {chunk:>5} {ms:8.1f} {speed:8.0f} {peak:9.2f}")


if __name__ == "__main__":
    main()
