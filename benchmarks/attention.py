"""Speed of every attention kernel on this GPU, and the table that ``attend`` chooses by. Takes under a minute.

    python benchmarks/attention.py            # prints
    python benchmarks/attention.py --write    # also rewrites torchft/modules/attention_table.py

Shapes are Llama 3.1 8B's: bf16, 32 heads, 8 key/value heads. TFLOP/s count what is visible: half of the square of each
document, times 4 heads * head_dim forward, times 2.5 more backward.
"""

import argparse
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl

from torchft.modules import attention_table
from torchft.modules.attend import attend
from torchft.modules.masks import Sight, Visible, block_mask, visible

HEADS, KV_HEADS, TOKENS = 32, 8, 32768
LENGTHS = (2048, 4096, 8192, 16384, 32768)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the table")
    parser.add_argument("--flash", choices=("FA3", "FA4"), help="an installed FlashAttention to put under 'flash'")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this measures GPU kernels; no CUDA device is visible")
    if given.flash:
        activate_flash_attention_impl(given.flash)
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; TFLOP/s forward / backward")

    fastest: dict[int, list[tuple[int, str]]] = {}
    for c in (64, 128):
        for s in LENGTHS:
            shapes = rows(TOKENS // s, s, c)
            work = 4 * HEADS * c * TOKENS * s / 2
            seconds = {
                "cudnn": measure(lambda q, k, v: attend(q, k, v, Visible("cudnn")), *shapes),
                "flash": measure(lambda q, k, v: attend(q, k, v, Visible("flash")), *shapes),
                "sdpa": measure(torch_sdpa, *shapes),
            }
            show(f"causal, head_dim {c}, {TOKENS // s} x {s}", work, seconds)
            best = min(("cudnn", "flash"), key=lambda kernel: sum(seconds[kernel]))
            fastest.setdefault(c, []).append((s, best))

    for s in (2048, 16384):
        for name, lengths in (("documents", documents(s)), ("one document", [[s]] * (16384 // s))):
            packed(name, s, lengths)

    major, minor = torch.cuda.get_device_capability()
    table = attention_table.KERNELS | {f"{major}.{minor}": {c: merged(found) for c, found in fastest.items()}}
    text = "KERNELS = {\n" + "".join(
        f'    "{gpu}": {{\n'
        + "".join(f"        {c}: {entry},\n".replace("'", '"') for c, entry in of.items())
        + "    },\n"
        for gpu, of in table.items()
    )
    print(text + "}")
    if given.write:
        path = Path(attention_table.__file__)
        path.write_text(re.sub(r"KERNELS = \{.*", lambda _: text + "}\n", path.read_text(), flags=re.DOTALL))
        print(f"wrote {path}")


def packed(name: str, s: int, lengths: Sequence[Sequence[int]]) -> None:
    """Rows of s tokens of head_dim 128 that hold these documents."""
    q, k, v, grad = rows(len(lengths), s, 128)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).cuda()
    known = sum(map(len, lengths)), max(map(max, lengths))
    x = q.flatten(2)
    began = time.perf_counter()
    for _ in range(10):
        seen = visible(x, 128, Sight(), positions, known)
    torch.cuda.synchronize()
    build = (time.perf_counter() - began) / 10
    ids = (positions == 0).flatten().cumsum(0).view(positions.shape)
    blocks = Visible("flex", blocks=block_mask(ids, None))
    mask = Visible(mask=((ids[:, :, None] == ids[:, None, :]).tril())[:, None])
    seconds = {
        "flash by documents": measure(lambda q, k, v: attend(q, k, v, seen), q, k, v, grad),
        "flex": measure(lambda q, k, v: attend(q, k, v, blocks), q, k, v, grad),
        "dense mask": measure(lambda q, k, v: attend(q, k, v, mask), q, k, v, grad, repeats=3),
        "cudnn, no documents": measure(lambda q, k, v: attend(q, k, v, Visible("cudnn")), q, k, v, grad),
    }
    work = 4 * HEADS * 128 * sum(n * n / 2 for row in lengths for n in row)
    show(
        f"packed, {len(lengths)} x {s}, {name}: {known[0]}, longest {known[1]}; seen in {build * 1e3:.2f} ms",
        work,
        seconds,
    )


def rows(b: int, s: int, c: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as the projections leave them, [b, s, heads, c], and the gradient of the output."""
    make = [torch.randn(b, s, h, c, device="cuda", dtype=torch.bfloat16) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return tuple(x.requires_grad_(i < 3) for i, x in enumerate(make))  # type: ignore[return-value]


def documents(s: int) -> list[list[int]]:
    """16,384 tokens in rows of s: lengths log-normal, mean 300, at most 2048, as instruction data has them."""
    draw, out = random.Random(0), []
    for _ in range(16384 // s):
        row: list[int] = []
        while (left := s - sum(row)) > 0:
            row.append(min(left, 2048, max(8, round(draw.lognormvariate(5.2, 1.0)))))
        out.append(row)
    return out


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What torch chooses by itself."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def measure(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor,
    *, repeats: int = 8,
) -> tuple[float, float]:  # fmt: skip
    """Seconds of forward and backward, the medians."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats + 2):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda._sleep(5_000_000)  # some ms, in which the host runs ahead: launches are not measured
        marks[0].record()
        out = function(q, k, v)
        marks[1].record()
        torch.autograd.grad(out, (q, k, v), grad)
        marks[2].record()
        torch.cuda.synchronize()
        if i >= 2:
            for part, a, b in zip(times, marks, marks[1:], strict=False):
                part.append(a.elapsed_time(b) / 1e3)
    forward, backward = (sorted(part)[len(part) // 2] for part in times)
    return forward, backward


def show(title: str, work: float, seconds: dict[str, tuple[float, float]]) -> None:
    """``work``: FLOP forward."""
    print(title)
    for name, (forward, backward) in seconds.items():
        speeds = f"{work / forward / 1e12:6.0f} / {2.5 * work / backward / 1e12:4.0f}"
        print(f"    {name:20} {speeds}   {forward * 1e3:7.3f} + {backward * 1e3:7.3f} ms", flush=True)


def merged(found: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Neighbouring lengths with the same kernel as one entry."""
    return [pair for i, pair in enumerate(found) if i + 1 == len(found) or found[i + 1][1] != pair[1]]


if __name__ == "__main__":
    main()
