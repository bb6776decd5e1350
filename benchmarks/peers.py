"""The training step of benchmarks/train_step.py in other libraries, timed by the same rules; prints one JSON line.

    python benchmarks/peers.py torchtune lora --batch-size 8 --recompute none
    python benchmarks/peers.py unsloth qlora --batch-size 1 --accumulate 8 --recompute none

Llama shapes, random bf16 weights, full rows, every token trained on, gradients clipped at norm 1, fused AdamW, LoRA of
rank 16 on all seven projections. peer_models.py sets each peer up.
"""

import sys

if "unsloth" in sys.argv[1:2]:  # it patches torch and transformers, and asks to be imported before them
    import unsloth  # noqa: F401

import argparse
import contextlib
import importlib.metadata
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peer_models import BUILDERS, NUM_KV_HEADS, RANK, SHAPES, VOCAB

from torchft.training.environment import device_name, pick_device, seconds_since_start
from torchft.training.metrics import flops_per_token, mfu, peak_flops, peak_memory_gib

PACKAGES = ("transformers", "accelerate", "peft", "liger-kernel", "torchtune", "torchao", "bitsandbytes", "unsloth")

RECOMPUTE = ("none", "full", "offload")
RECOMPUTE_HELP = "offload: full, with the blocks' inputs in host memory (torchtune, unsloth)"


def model_flops(shape: str, work: str, seq_len: int) -> float:
    """FLOPs per token, as benchmarks/train_step.py counts them for our model of this shape."""
    sizes = SHAPES[shape]
    d, ffn, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    kv = NUM_KV_HEADS * d // sizes["num_attention_heads"]
    projections = [(d, d), (d, kv), (d, kv), (d, d), (d, ffn), (d, ffn), (ffn, d)]
    base = layers * sum(i * o for i, o in projections) + VOCAB * d
    adapters = 0 if work == "full" else layers * sum(RANK * (i + o) for i, o in projections)
    return flops_per_token(
        num_matrix_params=base + adapters,
        num_trainable=base if work == "full" else adapters,
        num_layers=layers,
        attention_dim=d,
        seq_len=seq_len,
    )


def installed_versions() -> dict[str, str]:
    """Of the packages that a peer may use, those that are here."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=BUILDERS)
    parser.add_argument("work", choices=("lora", "qlora", "fp8-lora", "full"), help="fp8-lora: Unsloth only")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per row")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per backward pass")
    parser.add_argument("--accumulate", type=int, default=1, help="backward passes per optimizer step")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="none", help=RECOMPUTE_HELP)
    parser.add_argument("--keep-layers", type=int, default=0, help="layers exempt from --recompute")
    parser.add_argument("--steps", type=int, default=6, help="timed")
    parser.add_argument("--warm", type=int, default=3, help="steps before the timed ones")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path(tempfile.gettempdir(), "peer_checkpoints"))
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    if given.work == "fp8-lora" and given.peer != "unsloth":
        parser.error(f"{given.peer} has no LoRA on an fp8 base")
    if given.recompute == "offload" and given.peer.startswith("hf"):
        parser.error(f"{given.peer} can't keep block inputs in host memory")
    return given


def main() -> None:
    given = parse(sys.argv[1:])
    device = pick_device(given.device)
    torch.manual_seed(0)
    model, micro_step = BUILDERS[given.peer](given, device)
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=True)

    seconds: list[float] = []
    for step in range(given.warm + given.steps):
        if step == given.warm and device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)  # what loading and tuning kernels took does not count
        batches = torch.randint(0, 120000, (given.accumulate, given.batch_size, given.seq_len), device=device)
        began = time.perf_counter()
        for tokens in batches:
            loss = micro_step(tokens) / given.accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last_loss = loss.item() * given.accumulate  # waits for the device
        seconds.append(time.perf_counter() - began)
        if step == 0:
            since_start = seconds_since_start()

    speed = batches.numel() / statistics.median(seconds[given.warm :])
    flops = model_flops(given.shape, given.work, given.seq_len)
    result = vars(given) | {
        "checkpoint_dir": str(given.checkpoint_dir),
        "tokens_per_second": round(speed),
        "mfu": mfu(speed, flops, peak_flops(device_name(device))),
        "peak_memory_gib": round(peak_memory_gib(device), 2),
        "first_step_s": round(seconds[0], 1),
        "start_to_first_step_s": round(since_start, 1),
        "loss": round(last_loss, 3),
        "trainable_parameters": sum(p.numel() for p in params),
        "device": device_name(device),
        "torch": torch.__version__,
        "versions": installed_versions(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
