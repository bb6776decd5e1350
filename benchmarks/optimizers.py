"""One step of each optimizer over the bf16 weights of a 1B model: time, state, first step. Prints JSON lines.

    python benchmarks/optimizers.py
    python benchmarks/optimizers.py stochastic adamw --layers 32 --dim 4096 --ffn 14336     # 8B

Gradients are random and stay; nothing else runs, so a step that hides behind backward shows its whole cost. The floor
is bytes read and written over bandwidth: 14 bytes per weight with bf16 states.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8

from torchft.training.cpu_offload import AdamWOffloaded
from torchft.training.environment import device_name
from torchft.training.stochastic import AdamWStochastic

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-5, fused=True),
    "stochastic": lambda params: AdamWStochastic(params, lr=1e-5),
    "stochastic_fp32_states": lambda params: AdamWStochastic(params, lr=1e-5, state_dtype="fp32"),
    "offloaded": lambda params: AdamWOffloaded(params, lr=1e-5),
    "adamw8bit": lambda params: AdamW8bit(params, lr=1e-5, bf16_stochastic_round=True),
    "adamw4bit": lambda params: AdamW4bit(params, lr=1e-5, bf16_stochastic_round=True),
    "adamwfp8": lambda params: AdamWFp8(params, lr=1e-5, bf16_stochastic_round=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizers", nargs="*", default=list(OPTIMIZERS), help=", ".join(OPTIMIZERS))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--steps", type=int, default=10, help="timed, after 2")
    given = parser.parse_args()

    params = [nn.Parameter(0.02 * torch.randn(shape, device="cuda").bfloat16()) for shape in shapes(given)]
    for p in params:
        p.grad = torch.randn_like(p)
    total = sum(p.numel() for p in params)
    for name in given.optimizers:
        before = torch.cuda.memory_allocated()
        optimizer = OPTIMIZERS[name](params)
        first, seconds = timed(optimizer.step, given.steps)
        result = {
            "optimizer": name,
            "ms_per_step": round(1e3 * statistics.median(seconds), 2),
            "gb_per_s_of_14_bytes_per_weight": round(14e-9 * total / statistics.median(seconds)),
            "device_bytes_per_weight": round((torch.cuda.memory_allocated() - before) / total, 2),
            "host_bytes_per_weight": round(host_bytes(optimizer) / total, 2),
            "first_step_s": round(first, 1),
            "weights": total,
            "device": device_name(torch.device("cuda")),
            "torch": torch.__version__,
        }
        print(json.dumps(result), flush=True)
        del optimizer
        torch.cuda.empty_cache()


def shapes(given: argparse.Namespace) -> list[tuple[int, ...]]:
    """Of Llama 3: embedding, per layer q, k, v, o, gate, up, down and two norms, the last norm."""
    dim, ffn, kv_dim = given.dim, given.ffn, given.dim // 4
    layer = [(dim, dim), (kv_dim, dim), (kv_dim, dim), (dim, dim), (ffn, dim), (ffn, dim), (dim, ffn), (dim,), (dim,)]
    return [(given.vocab, dim), *layer * given.layers, (dim,)]


def timed(step: Callable[[], Any], num_steps: int) -> tuple[float, list[float]]:
    """Seconds of the first step and of ``num_steps`` from the third on, each awaited, as a check of the norm would."""
    seconds = []
    for _ in range(num_steps + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[0], seconds[2:]


def host_bytes(optimizer: Optimizer) -> int:
    states: Iterable[Any] = (value for state in optimizer.state.values() for value in state.values())
    return sum(v.nbytes for v in states if isinstance(v, Tensor) and v.device.type == "cpu")


if __name__ == "__main__":
    main()
