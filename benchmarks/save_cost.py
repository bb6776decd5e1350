"""What a checkpoint costs the training loop: written while training waits, and while it goes on.

    python benchmarks/save_cost.py --layers 6 --dim 512

A Llama of random weights (fp32 on a CPU, bf16 on a GPU), AdamW. Prints how long the loop stands still for a save, how
much slower the steps are that run while it is written, and what both come to.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from torchft import models
from torchft.losses.likelihood import nll_sum
from torchft.modules.decoder import init_weights
from torchft.training.environment import device_name, pick_device
from torchft.training.saver import Saver, save
from torchft.training.state import optimizer_tree, trainable

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=128, help="tokens of the one row of a step")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", help="where checkpoints are written; default: the system's temporary folder")
    given = parser.parse_args()
    device = pick_device("auto")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32_000, "hidden_size": given.dim,
        "intermediate_size": 4 * given.dim, "num_hidden_layers": given.layers, "rms_norm_eps": 1e-5,
        "num_attention_heads": given.dim // 64, "max_position_embeddings": 4096, "rope_theta": 10_000.0,
        "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    model = models.build(config).to(torch.float32 if device.type == "cpu" else torch.bfloat16).to_empty(device=device)
    init_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(config["vocab_size"], (1, given.seq_len), device=device)

    def step() -> float:
        """Seconds of one optimizer step."""
        began = time.perf_counter()
        head = partial(nll_sum, labels=tokens.roll(-1, 1), num_supervised=tokens.numel())
        (model(tokens, head=head) / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.accelerator.synchronize() if device.type != "cpu" else None
        return time.perf_counter() - began

    def parts() -> dict:
        return {"model": trainable(model), "optimizer": optimizer_tree(model, optimizer)}

    step()
    plain = statistics.median(step() for _ in range(5))
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        waits, stands, slower, times = [], [], [], []
        for number in range(given.saves):
            began = time.perf_counter()
            save(Path(folder), number, parts(), run_id="benchmark")
            waits.append(time.perf_counter() - began)
        with Saver(Path(folder), "benchmark", keep_last=1) as saver:
            for number in range(given.saves + 1):
                began = time.perf_counter()
                saver.save(number, parts())
                stands.append(time.perf_counter() - began)
                during = []
                while saver.is_writing():
                    during.append(step())
                times.append(time.perf_counter() - began)
                slower.append(sum(during) - plain * len(during))
    num_bytes = sum(p.nbytes for p in model.parameters()) * 3
    print(f"{device_name(device)}: {num_bytes / GIB:.2f} GiB a checkpoint, {plain:.3f} s a step")
    print(f"training waits:   {statistics.median(waits):.3f} s a save")
    print(
        f"training goes on: {statistics.median(stands[1:]):.3f} s for the copy, written within "
        f"{statistics.median(times[1:]):.3f} s, in which steps take {statistics.median(slower[1:]):.3f} s longer "
        f"(the first save, which makes the memory for copies: {stands[0]:.3f} s)"
    )


if __name__ == "__main__":
    main()
