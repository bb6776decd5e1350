"""Speed and memory of every way to save activations; one JSON line for each, with the memory that was expected.

python benchmarks/recompute.py                                                  # Llama-3.2-1B, LoRA
python benchmarks/recompute.py --model llama3/Llama-3.1-8B --limit-gib 24       # what auto takes under a limit
python benchmarks/recompute.py --model llama3/Llama-3.1-8B --seq-len 32768 --batch-size 1 --settings 0.1+offload full
"""

import argparse
import json
import statistics
import time
from functools import partial

import torch
from torch import Tensor

from torchft import models
from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters
from torchft.adapters.nf4 import NF4Config, apply_nf4
from torchft.errors import UserError
from torchft.losses.likelihood import nll_sum
from torchft.modules.decoder import Decoder
from torchft.training.compile import compiled
from torchft.training.environment import device_name, pick_device
from torchft.training.memory import GIB
from torchft.training.metrics import peak_memory_gib
from torchft.training.optim import param_groups
from torchft.training.recompute import plans
from torchft.training.trial import settle

SETTINGS = ("none", "1.0", "0.5", "0.3", "0.1", "full", "full+offload", "0.3+offload", "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3/Llama-3.2-1B", help="a released size")
    parser.add_argument("--method", choices=("full", "lora", "qlora"), default="lora")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per row")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="values of recompute, +offload or not")
    parser.add_argument("--limit-gib", type=float, help="of the device's memory, for auto")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--steps", type=int, default=6, help="that are timed, after two that are not")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()

    device = pick_device(given.device)
    model = build(given.model, given.method, device)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-5, fused=True)
    limit = None if given.limit_gib is None else int(given.limit_gib * GIB)

    def micro_step(tokens: Tensor, labels: Tensor, positions: Tensor | None) -> Tensor:
        return model(tokens, positions, head=partial(nll_sum, labels=labels)) / labels.numel()

    for setting in given.settings:
        value, _, offload = setting.partition("+")
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        torch.compiler.reset()
        began = time.perf_counter()
        try:
            found = plans(
                model,
                recompute=value if value in ("none", "full", "auto") else float(value),
                offload=bool(offload),
                compiled=not given.no_compile,
                rows=given.batch_size,
                seq_len=given.seq_len,
                packed=False,
                device=device,
                limit=limit if value == "auto" else None,
            )
            looked = time.perf_counter()
            plan = settle(
                model, found, micro_step, seq_len=given.seq_len, packed=False, device=device,
                limit=limit if value == "auto" else None,
            )  # fmt: skip
        except UserError as e:
            print(json.dumps({"setting": setting, "error": str(e)}), flush=True)
            continue
        settled = time.perf_counter()
        seconds = []
        for i in range(2 + given.steps):
            if i == 2 and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            loss = torch.zeros((), device=device)
            for _ in range(given.batch_size // plan.rows):
                tokens = torch.randint(0, model.config.vocab_size, (plan.rows, given.seq_len), device=device)
                part = micro_step(tokens, tokens, None)
                part.backward()
                loss += part.detach()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()  # waits for the device
            seconds.append(time.perf_counter() - start)
        result = {
            "model": given.model,
            "method": given.method,
            "setting": setting,
            "tokens_per_second": round(given.batch_size * given.seq_len / statistics.median(seconds[2:])),
            "peak_memory_gib": round(peak_memory_gib(device), 2),
            "expected_gib": round(plan.memory.total / GIB, 2),
            "relative_time": round(plan.time, 3),
            "rows": plan.rows,
            "plan": plan.reason,
            "plan_s": round(looked - began, 1),
            "trial_s": round(settled - looked, 1),
            "compiled": str(compiled()),
            "device": device_name(device),
            "torch": torch.__version__,
        }
        print(json.dumps(result), flush=True)


def build(name: str, method: str, device: torch.device) -> Decoder:
    """Random weights."""
    torch.manual_seed(0)
    model = models.build(name).to(torch.bfloat16)
    if method == "qlora":
        apply_nf4(model, NF4Config())
    if method != "full":
        apply_lora(model, LoRAConfig())
    model.to_empty(device=device)
    with torch.no_grad():  # copied, as a quantised weight takes values in no other way
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, device=device, dtype=torch.bfloat16) * 0.02 + (p.ndim == 1))
    if method != "full":
        init_adapters(model)
    return model.train()


if __name__ == "__main__":
    main()
