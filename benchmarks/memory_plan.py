"""What training would need on each GPU, without one: a table of estimates for several numbers of ranks.

    python benchmarks/memory_plan.py llama3/Llama-3.1-70B --seq-len 8192
    python benchmarks/memory_plan.py llama3/Llama-3.1-70B --method full --recompute none --shards 16 32

Blocks are measured on tensors without memory (training/block_cost.py); AdamW keeps two states of the weights' dtype.
"""

import argparse

import torch

from torchft import models
from torchft.adapters.fused import fuse_lora
from torchft.adapters.lora import LoRAConfig, apply_lora
from torchft.training.memory import GIB
from torchft.training.recompute import plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a released size")
    parser.add_argument("--method", choices=("full", "lora"), default="lora")
    parser.add_argument("--shards", type=int, nargs="+", default=[8, 16, 32], help="ranks that share one copy")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per row")
    parser.add_argument("--rows", type=int, default=1, help="per rank and micro-step")
    parser.add_argument("--recompute", default="full", help="none, full or 0.0-1.0")
    given = parser.parse_args()
    print("| ranks | weights | gradients | optimizer | activations | working | total |\n|---|---|---|---|---|---|---|")
    for shards in given.shards:
        model = models.build(given.model).to(torch.bfloat16)
        if given.method == "lora":
            apply_lora(model, LoRAConfig())
            fuse_lora(model)
        (plan,) = plans(
            model.train(),
            recompute=given.recompute,
            offload=False,
            compiled=False,
            rows=given.rows,
            seq_len=given.seq_len,
            packed=True,
            device=torch.device("cpu"),
            shards=shards,
        )
        sizes = " | ".join(f"{size / GIB:.1f}" for size in vars(plan.memory).values())
        print(f"| {shards} | {sizes} |")


if __name__ == "__main__":
    main()
