"""Speed and memory of a training step with random weights and full rows; prints one JSON line.

    python benchmarks/train_step.py llama3/Llama-3.1-8B --method lora --batch-size 8
    python benchmarks/train_step.py llama3/Llama-3.2-1B --method full --batch-size 8 --recompute none

The step is the recipes': the same model, surgery, head, clipping and fused AdamW; only reading data is left out.
"""

import argparse
import json
import statistics
import time
from functools import partial

import torch

from torchft import models
from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters, num_parameters
from torchft.adapters.nf4 import NF4Config, apply_nf4
from torchft.losses.likelihood import token_nll
from torchft.modules.decoder import init_weights
from torchft.training.environment import device_name, pick_device
from torchft.training.meter import training_flops
from torchft.training.metrics import mfu, peak_flops, peak_memory_gib
from torchft.training.optim import clip_grad_norm, param_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a released size, such as llama3/Llama-3.1-8B")
    parser.add_argument("--method", choices=("full", "lora", "qlora"), default="lora")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per row")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step")
    parser.add_argument("--recompute", choices=("none", "full"), default="full")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA, on all linear layers but lm_head")
    parser.add_argument("--steps", type=int, default=12, help="the first 4 are not counted")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()

    device = pick_device(given.device)
    torch.manual_seed(0)
    with_adapters = given.method != "full"
    model = models.build(given.model).to(torch.bfloat16)
    vocab = model.config.vocab_size
    if given.method == "qlora":
        apply_nf4(model, NF4Config(), device=device)
    if with_adapters:
        apply_lora(model, LoRAConfig(rank=given.rank, alpha=2 * given.rank))
    model.recompute = given.recompute == "full"
    if not given.no_compile:
        for layer in model.layers:
            layer.compile(fullgraph=True)
    model.to_empty(device=device)
    if given.method == "qlora":  # a quantised weight takes values by copy only
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, device=device, dtype=torch.bfloat16) * 0.02)
    else:
        init_weights(model)
    if with_adapters:
        init_adapters(model)
    model.train()
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-5, fused=True)
    params = [p for p in model.parameters() if p.requires_grad]

    shape = (given.batch_size, given.seq_len)
    seconds = []
    for _ in range(given.steps):
        tokens, labels = (torch.randint(0, vocab, shape, device=device) for _ in range(2))
        began = time.perf_counter()
        loss = model(tokens, head=partial(token_nll, labels=labels)).sum() / labels.numel()
        loss.backward()
        clip_grad_norm(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - began)

    speed = given.batch_size * given.seq_len / statistics.median(seconds[4:])
    flops = training_flops(model, seq_len=given.seq_len)
    result = vars(given) | {
        "tokens_per_second": round(speed),
        "mfu": mfu(speed, flops, peak_flops(device_name(device))),
        "peak_memory_gib": round(peak_memory_gib(device), 1),
        "first_step_s": round(seconds[0], 1),
        "trainable_parameters": num_parameters(model)[0],
        "device": device_name(device),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
