"""Speed and memory of a training step with random weights; prints one JSON line.

    python benchmarks/train_step.py llama3/Llama-3.1-8B --method lora --batch-size 8 --recompute none
    python benchmarks/train_step.py llama3/Llama-3.1-8B --method fp8-lora --batch-size 8 --limit-gib 24
    python benchmarks/train_step.py llama3/Llama-3.2-1B --method full --batch-size 8 --recompute none
    python benchmarks/train_step.py llama3/Llama-3.1-8B --lengths instruct      # packed rows of real lengths
    torchrun --nproc-per-node 2 benchmarks/train_step.py llama3/Llama-3.1-8B    # FSDP2; or --tp 2, --cp 2, --ep 2

Of several processes, each has ``--batch-size`` rows (tp x cp processes share theirs), and tokens are those of all.

The step is the recipes': the same model, surgery, plan, head, clipping and optimizer; only reading data is left out.
Rows are full and every token is trained, or packed with documents of ``--lengths`` (tokens per second then count real
tokens, not the padding at the end of rows).
"""

import argparse
import contextlib
import json
import random
import statistics
import time
from functools import partial

import torch
from torch.distributed.fsdp import fully_shard

from torchft import models
from torchft.adapters.expert_parallel import split_experts
from torchft.adapters.fp8 import FP8Config, apply_fp8
from torchft.adapters.fp8_training import FP8TrainingConfig, apply_fp8_training
from torchft.adapters.fused import fuse_lora
from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters, num_parameters
from torchft.adapters.nf4 import NF4Config, apply_nf4
from torchft.adapters.tensor_parallel import split_blocks
from torchft.data.packing import pack
from torchft.documents import count_documents
from torchft.losses.likelihood import IGNORE, nll_sum
from torchft.models.shallow import build_shallow
from torchft.ranks import gather, is_main, local
from torchft.training.compile import compiled
from torchft.training.distributed import ParallelConfig, World, frozen_weights, init, sum_gradients
from torchft.training.environment import device_name, pick_device, seconds_since_start
from torchft.training.in_backward import InBackward
from torchft.training.meter import training_flops
from torchft.training.metrics import mfu, peak_flops, peak_memory_gib
from torchft.training.optim import clip_grad_norm, param_groups
from torchft.training.recompute import apply_plan, plans

WARM = 3  # steps that are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a released size, such as llama3/Llama-3.1-8B")
    parser.add_argument("--method", choices=("full", "fp8-full", "lora", "fp8-lora", "qlora"), default="lora")
    parser.add_argument("--layers", type=int, help="fewer than the model has, all else alike")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per row")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per micro-step")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-steps per step")
    parser.add_argument("--recompute", default="auto", help="none, auto, full or 0.0-1.0")
    parser.add_argument(
        "--offload", type=float, nargs="?", const=1.0, default=0.0, help="activations to the host, all or a share"
    )
    parser.add_argument("--limit-gib", type=float, help="memory that auto may plan with")
    parser.add_argument("--lengths", choices=("full", "instruct"), default="full", help="of the documents in a row")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel instead of replaying")
    parser.add_argument("--no-clip", action="store_true", help="no gradient norm")
    parser.add_argument("--in-backward", action="store_true", help="full: step each weight as its gradient comes")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--targets", help="of LoRA, by comma; else all linear layers but lm_head")
    parser.add_argument("--steps", type=int, default=10, help=f"timed, after {WARM}")
    parser.add_argument("--profile", action="store_true", help="also print where the GPU's time goes")
    parser.add_argument("--device", default="auto")
    for axis in ("replicate", "tp", "cp", "ep"):
        parser.add_argument(f"--{axis}", type=int, default=1, help="as in a recipe's `parallel`")
    parser.add_argument("--reshard", choices=("auto", "true", "false"), default="auto", help="free weights in between")
    given = parser.parse_args()
    if given.device == "auto" and pick_device("auto").type == "cpu":  # whose memory such a model fills
        parser.error("there is no GPU here; --device cpu measures this host")
    parallel = ParallelConfig(
        replicate=given.replicate,
        tp=given.tp,
        cp=given.cp,
        ep=given.ep,
        reshard_after_forward={"true": True, "false": False}.get(given.reshard),
    )
    with init(parallel, device=given.device) as world:
        measure(given, world)


def measure(given: argparse.Namespace, world: World) -> None:
    device, shards = world.device, world.tokens
    if given.limit_gib and device.type == "cuda":
        torch.cuda.memory.set_per_process_memory_fraction(given.limit_gib * 2**30 / torch.cuda.mem_get_info(device)[1])
    model = models.build(given.model)
    if given.layers:
        model = build_shallow(model.hub_format.config_json, given.layers)
    model = model.to(torch.bfloat16)
    if given.method == "qlora":
        apply_nf4(model, NF4Config())
    if given.method == "fp8-lora":
        apply_fp8(model, FP8Config(), device=device)
    if given.method == "fp8-full":
        apply_fp8_training(model, FP8TrainingConfig(), device=device)
    if not given.method.endswith("full"):
        targets = {"targets": given.targets.split(",")} if given.targets else {}
        apply_lora(model, LoRAConfig(rank=given.rank, alpha=2 * given.rank, **targets))
        fuse_lora(model)
    packed = given.lengths != "full"
    plan, *_ = plans(
        model,
        recompute=given.recompute,
        offload=given.offload,
        compiled=not given.no_compile,
        rows=given.batch_size,
        seq_len=shards.share(given.seq_len),
        packed=packed,
        shards=world.shards,
        reshard=world.reshard,
        device=device,
        in_backward=given.in_backward,
        accumulation=given.accumulate,
        limit=int(given.limit_gib * 2**30) if given.limit_gib else None,
    )
    if world.mesh:
        for experts in split_experts(model, world.ep_mesh):
            fully_shard(experts, mesh=world.expert_mesh, mp_policy=world.sums)
        split_blocks(model, world.tp_mesh, shards)
        left = frozen_weights(model) if plan.gathers_once else set()
        for layer in () if left else model.layers:  # adapters alone are gathered at one time
            fully_shard(layer, mesh=world.mesh, mp_policy=world.sums)
        fully_shard(model, mesh=world.root_mesh, mp_policy=world.sums, reshard_after_forward=True, ignored_params=left)
        sum_gradients(model)
    apply_plan(model, plan)
    model.to_empty(device=device)
    torch.manual_seed(0)
    fill(model, device)
    torch.manual_seed(world.data_rank)
    model.train()
    if given.no_graphs:
        model.replay = None
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-5, fused=True)
    params = [p for p in model.parameters() if p.requires_grad]
    in_backward = InBackward(optimizer, model) if given.in_backward else None

    seconds, real = [], []
    profiler = torch.profiler.profile() if given.profile else contextlib.nullcontext()
    for step in range(WARM + given.steps):
        window = [batch(given, model.config.vocab_size) for _ in range(given.accumulate)]
        parts = [tensors for whole in window for tensors in zip(*(t.split(plan.rows) for t in whole))]
        supervised = sum(gather(sum(int((labels != IGNORE).sum()) for _, labels, _ in parts))) // shards.count
        sent = []
        for tokens, labels, positions in parts:
            if shards.count > 1:
                tokens, labels = shards.own(tokens), shards.own(labels)
            counts = count_documents(positions) if packed else None
            sent.append((*(t.to(device) for t in (tokens, labels, positions)), counts, int((labels != IGNORE).sum())))
        torch.cuda.synchronize() if device.type == "cuda" else None
        if step == WARM and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if step == WARM + given.steps - 1:
            profiler.__enter__()
        began = time.perf_counter()
        for tokens, labels, positions, counts, count in sent:
            head = partial(nll_sum, labels=labels, num_supervised=count)
            loss = model(tokens, positions if packed else None, documents=counts, head=head) / supervised
            loss.backward()
        if in_backward:
            in_backward.finish(step + 1, loss=loss)
        else:
            clip_grad_norm(params, None if given.no_clip else 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        last_loss = world.sum(loss.detach()).item()  # waits for the devices
        seconds.append(time.perf_counter() - began)
        real.append(supervised)
        if step == 0:
            from_start = seconds_since_start()
    if given.profile:
        profiler.__exit__(None, None, None)
        print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))

    tokens_per_s = statistics.median(n / s for n, s in zip(real[WARM:], seconds[WARM:]))
    flops = training_flops(model, seq_len=given.seq_len)
    result = vars(given) | {
        "tokens_per_second": round(tokens_per_s),
        "mfu": mfu(tokens_per_s / world.size, flops, peak_flops(device_name(device))),
        "peak_memory_gib": round(max(gather(peak_memory_gib(device))), 2),
        "first_step_s": round(seconds[0], 1),
        "start_to_first_step_s": round(from_start, 1),
        "compiled": str(compiled()),
        "plan": plan.reason,
        "loss": round(last_loss * given.accumulate * given.batch_size / plan.rows, 3),
        "spread": round((max(seconds[WARM:]) - min(seconds[WARM:])) / statistics.median(seconds[WARM:]), 3),
        "trainable_parameters": num_parameters(model)[0],
        "device": str(world),
        "torch": torch.__version__,
    }
    if is_main():
        print(json.dumps(result, default=str))


@torch.no_grad()
def fill(model: torch.nn.Module, device: torch.device) -> None:
    """Random weights, by copy, which quantised ones take too."""
    for part in map(local, model.parameters()):
        dense = torch.randn(part.shape, device=device, dtype=torch.bfloat16) * 0.02
        part.copy_(dense if part.ndim > 1 else torch.ones_like(dense))
    init_adapters(model)


def batch(given: argparse.Namespace, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random tokens, labels and positions, each [b, s]."""
    shape = (given.batch_size, given.seq_len)
    tokens, labels = (torch.randint(0, vocab, shape) for _ in range(2))
    positions = torch.arange(given.seq_len).repeat(given.batch_size, 1)
    if given.lengths == "full":
        return tokens, labels, positions
    rng = random.Random(int(tokens[0, 0]))
    # Instruction data: lognormal, mean 300 tokens, one in a hundred over 1600.
    lengths = [min(given.seq_len, max(8, round(rng.lognormvariate(5.3, 0.9)))) for _ in range(64 * given.batch_size)]
    rows = pack(lengths, given.seq_len, generator=torch.Generator().manual_seed(0))[: given.batch_size]
    for r, row in enumerate(rows):
        ends = torch.tensor([lengths[i] for i in row]).cumsum(0)
        for start, end in zip([0, *ends], [*ends, given.seq_len]):
            positions[r, start:end] = torch.arange(end - start)
        labels[r, ends[-1] :] = IGNORE
    return tokens, labels, positions


if __name__ == "__main__":
    main()
