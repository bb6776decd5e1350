"""Loss curves in fp8 beside bf16: the same weights, data, order and seed; exits with 1 if they end over 1% apart.

    python benchmarks/fp8_parity.py             # a 100M Llama, 200 steps of 8,192 tokens; a minute or two on an H200
    python benchmarks/fp8_parity.py --tiny      # on a CPU, where fp8 is emulated

A base is first trained in bf16 on the source code of Python's standard library, byte by byte. From it, on prose (the
docstrings of that library and this repository's docs): LoRA over the base in bf16 and in fp8, and training of all
weights in bf16 and with torchao's fp8. What is compared is the mean loss of the last 50 steps, in nats per byte.
"""

import argparse
import re
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from torchft import models
from torchft.adapters.fp8 import FP8Config, apply_fp8
from torchft.adapters.fp8_training import FP8TrainingConfig, apply_fp8_training
from torchft.adapters.fused import fuse_lora
from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters
from torchft.losses.likelihood import nll_sum
from torchft.modules.decoder import Decoder, init_weights
from torchft.training.compile import compile_blocks
from torchft.training.environment import device_name, pick_device
from torchft.training.optim import clip_grad_norm, param_groups

WINDOW = 50  # steps
LIMIT = 0.01  # of the loss
WARMUP = 20  # steps
REPOSITORY = Path(__file__).parent.parent
LEARNING_RATE = {"base": 6e-4, "lora": 1e-3, "full": 2e-4}


def config_json(tiny: bool) -> dict[str, object]:
    dim, layers = (128, 2) if tiny else (1024, 8)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": dim,
        "intermediate_size": 4 * dim,
        "num_hidden_layers": layers,
        "num_attention_heads": dim // 64,
        "num_key_value_heads": dim // 128,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def texts() -> tuple[Tensor, Tensor]:
    """Code and prose, each one long row of bytes; the same on every machine with the same Python."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(library.rglob("*.py")) if not {"test", "tests", "site-packages"} & set(f.parts)]
    code, prose = [], [f.read_text() for f in sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])]
    for file in files:
        text = file.read_text(errors="replace")
        docs = re.findall(r'"""(.+?)"""', text, re.DOTALL)
        prose += [doc for doc in docs if len(doc) > 200]
        code.append(text)
    code_bytes, prose_bytes = ("\n".join(parts).encode() for parts in (code, prose))
    return tuple(torch.frombuffer(bytearray(b), dtype=torch.uint8) for b in (code_bytes, prose_bytes))  # type: ignore[return-value]


def batches(text: Tensor, rows: int, seq_len: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows from random places: tokens and the byte that follows each, [rows, seq_len]. The same for one ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        begins = torch.randint(len(text) - seq_len - 1, (rows,), generator=generator)
        window = torch.stack([text[i : i + seq_len + 1] for i in begins.tolist()]).long()
        yield window[:, :-1], window[:, 1:]


def build(kind: str, given: argparse.Namespace, device: torch.device, base: dict[str, Tensor] | None) -> Decoder:
    """A model as the recipes build it, from ``base`` or, without one, with random weights."""
    torch.manual_seed(0)
    model = models.build(config_json(given.tiny)).to(torch.bfloat16)
    if kind == "lora fp8":
        apply_fp8(model, FP8Config(), device=device)
    if kind == "full fp8":
        apply_fp8_training(model, FP8TrainingConfig(recipe=given.recipe), device=device)
    if kind.startswith("lora"):
        apply_lora(model, LoRAConfig(rank=16, alpha=32))
        fuse_lora(model)
    model.to_empty(device=device)
    if base is None:
        init_weights(model)
    else:
        with torch.no_grad():
            for name, weight in base.items():
                model.get_parameter(name).copy_(weight)
        init_adapters(model, torch.Generator(device).manual_seed(0))
    if not given.eager:
        torch.compiler.reset()
        compile_blocks(model)
    return model.train()


def train(model: Decoder, text: Tensor, steps: int, lr: float, given: argparse.Namespace) -> list[float]:
    """Loss of each step, nats per byte."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(param_groups(model), lr=lr, betas=(0.9, 0.95), fused=True)
    params = [p for p in model.parameters() if p.requires_grad]
    data = batches(text, given.batch_size, given.seq_len, seed=1)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP)
        tokens, labels = (t.to(device) for t in next(data))
        loss = model(tokens, head=partial(nll_sum, labels=labels)) / labels.numel()
        loss.backward()
        clip_grad_norm(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="2 layers of 128, eager, 1,024 tokens a step")
    parser.add_argument("--steps", type=int, default=200, help="of each run that is compared")
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16, help="rows")
    parser.add_argument("--seq-len", type=int, default=512, help="bytes")
    parser.add_argument("--recipe", choices=("tensorwise", "rowwise"), default="rowwise", help="of torchao")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    if given.tiny:
        given.eager, given.batch_size, given.seq_len = True, 8, 128
    device = pick_device(given.device)
    code, prose = texts()
    print(f"{device_name(device)}, torch {torch.__version__}, {len(code):,} bytes of code, {len(prose):,} of prose")

    model = build("base", given, device, None)
    began = time.perf_counter()
    losses = train(model, code, given.base_steps, LEARNING_RATE["base"], given)
    print(f"base: {losses[0]:.3f} -> {mean(losses[-WINDOW:]):.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    del model

    apart = {}
    for method in ("lora", "full"):
        ends = []
        for kind in (f"{method} bf16", f"{method} fp8"):
            began = time.perf_counter()
            losses = train(build(kind, given, device, base), prose, given.steps, LEARNING_RATE[method], given)
            windows = " ".join(f"{mean(losses[i : i + WINDOW]):.4f}" for i in range(0, given.steps, WINDOW))
            seconds = time.perf_counter() - began
            print(f"{kind}: first {losses[0]:.4f}, by {WINDOW} steps {windows}, {seconds:.0f} s", flush=True)
            ends.append(mean(losses[-WINDOW:]))
        apart[method] = ends[1] / ends[0] - 1
        print(f"{method}: fp8 ends {apart[method]:+.2%} from bf16")
    if max(abs(a) for a in apart.values()) > LIMIT:
        raise SystemExit(1)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
