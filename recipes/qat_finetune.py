"""Fine-tuning for few bits: the model learns with the rounding that its quantised checkpoint will have; LoRA if wanted.

    python configs/demo/uneven.py out/demo_uneven              # the demo's model; offline, on two CPU cores
    tune run qat_finetune --config demo/qat checkpoint_dir=out/demo_uneven
    tune run qat_finetune --config llama3_2/1B_full_qat checkpoint_dir=Llama-3.2-1B-Instruct dataset.source=my.jsonl
    python recipes/qat_finetune.py --config my.yaml qat.format=int8_int4 qat.group_size=64

To change it: `tune cp qat_finetune my_recipe.py`, then `tune run my_recipe.py --config ...`.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch.distributed.fsdp import fully_shard

from torchft import hub, models, tokenizers
from torchft.adapters.expert_parallel import split_experts
from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters
from torchft.adapters.nf4 import check_shards
from torchft.adapters.qat import QATConfig, apply_qat, set_rounding
from torchft.adapters.tensor_parallel import split_blocks
from torchft.cli.run import start
from torchft.config import Component, Folder, Kind, Range, dump, plain
from torchft.data.loader import Loader
from torchft.data.mixture import mix
from torchft.data.prefetch import Prefetch, one_epoch
from torchft.data.preview import masked_tokens
from torchft.data.samples import Samples
from torchft.data.stream import Stream, StreamConfig, gather
from torchft.data.stream_loader import open_loader
from torchft.data.summary import Summary, summarise
from torchft.export import save_trained
from torchft.losses.likelihood import nll_sum
from torchft.modules.decoder import Decoder
from torchft.quantise import Quantisation, save_quantised
from torchft.ranks import from_main, is_main, main_first
from torchft.redact import redact_tree
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.training import checkpoint, distributed, state
from torchft.training.console import Console, Steps, first_panel, last_panel
from torchft.training.disk import check_space
from torchft.training.distributed import ParallelConfig, World, frozen_weights, sum_gradients
from torchft.training.facts import run_facts
from torchft.training.graphs import Replay
from torchft.training.guard import Guard, GuardConfig
from torchft.training.interrupt import Interruptible, Stopped
from torchft.training.loggers import Loggers
from torchft.training.meter import Meter, training_flops
from torchft.training.metrics import MetricsFile, Row, draw_loss, read_rows, results
from torchft.training.optim import clip_grad_norm, param_groups, warn_if_frozen
from torchft.training.optimizer_memory import optimizer_bytes
from torchft.training.profile import ProfileConfig, profiled
from torchft.training.recompute import plans
from torchft.training.routing import Routing, RoutingConfig
from torchft.training.run_folder import Run, open_run
from torchft.training.saver import Saver
from torchft.training.schedules import attach, is_due
from torchft.training.seed import load_rng_state, set_seed
from torchft.training.stochastic import rounds_stochastically
from torchft.training.trial import by_head, out_of_memory_explained, settle
from torchft.training.usage import commands

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Dataset = Annotated[Component, Kind("dataset", supplied=("tokenizer", "seq_len"), default="torchft.data.datasets.auto")]


@dataclass(frozen=True, kw_only=True)
class Config:
    # What is trained, and where it goes
    checkpoint_dir: Annotated[Path, Folder(exists=True)]  # a Hub folder: family, sizes, tokenizer and chat format
    output_dir: Annotated[Path, Folder(writable=True)]  # checkpoints, metrics, export/ and in it quantised/

    # Data
    dataset: Dataset | None = None
    datasets: list[Dataset] = field(default_factory=list)  # or several, each with a weight and a stage if wanted
    streaming: StreamConfig | None = None  # read and tokenise while training, for large data; `streaming: {}`
    chat_format: str | None = None  # instead of the checkpoint's own template: llama2, llama3, qwen3 or a .jinja file
    dataset_eval: Dataset | None = None  # held out: the rounded model's loss, at first, every eval_every steps, at last
    seq_len: Annotated[int, Range(min=2)] = 2048  # tokens per row; longer samples are cut
    packed: bool = False  # several samples per row: no padding, same gradients
    batch_size: Annotated[int, Range(min=1)] = 2  # rows per device and micro-step
    gradient_accumulation_steps: Annotated[int, Range(min=1)] = 1  # micro-steps per optimizer step
    epochs: Annotated[int, Range(min=1)] = 1
    max_steps: Annotated[int, Range(min=1)] | None = None  # optimizer steps, if fewer than the epochs have

    # Model
    qat: QATConfig = field(default_factory=QATConfig)  # to what weights, and inputs, are rounded
    lora: LoRAConfig | None = None  # null: all weights are trained; `lora: {}`: adapters, merged before each rounding
    dtype: Literal["bf16", "fp32"] = "bf16"  # of weights, computation and both exports; adapters are fp32
    device: str = "auto"  # auto takes the accelerator if there is one
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # how several processes share the work
    compile: bool = False  # torch.compile each block: faster steps, a slower first one
    recompute: Literal["none", "auto", "full"] | Annotated[float, Range(min=0, max=1)] = "auto"  # activations computed
    # again in backward instead of kept: a number is the share kept; auto measures and takes the fastest that fits
    offload_activations: bool | Annotated[float, Range(min=0, max=1)] = False  # wait in host memory for backward, all
    # that is kept or a share; auto does it if recomputing more would be slower

    # Optimisation
    optimizer: Annotated[Component, Kind("optimizer", supplied=("params",))] = Component(
        "torch.optim.AdamW", {"lr": 2e-5, "weight_decay": 0.0, "fused": True}
    )
    lr_schedule: Annotated[Component, Kind("lr_schedule", supplied=("total_steps",))] = Component(
        "torchft.training.schedules.cosine", {"warmup_share": 0.03}
    )
    routing: RoutingConfig = field(default_factory=RoutingConfig)  # of a mixture of experts: how even its load is kept
    clip_grad_norm: Annotated[float, Range(above=0)] | None = 1.0  # total 2-norm; null: no clipping
    guard: GuardConfig = field(default_factory=GuardConfig)  # what happens when a step is not finite or the loss leaps
    seed: Annotated[int, Range(min=0)] = 0

    # Reports and checkpoints
    log_every: Annotated[int, Range(min=1)] = 1  # steps
    eval_every: Annotated[int, Range(min=1)] | None = None  # steps; null: only at the end
    save_every: Annotated[int, Range(min=1)] | None = None  # steps; null: only at the end
    keep_last: Annotated[int, Range(min=1)] = 2  # step folders kept, besides the best by held-out loss
    resume: Literal["auto", "accept_changes", "never"] = "auto"  # auto: go on from this run's newest whole checkpoint
    profile: ProfileConfig | None = None  # what the devices do in a few steps, as files; `profile: {}`
    metric_loggers: list[Annotated[Component, Kind("metric_logger", supplied=("run_id", "output_dir", "config"))]] = (
        field(default_factory=list)
    )

    def conflicts(self) -> Iterator[str]:
        if bool(self.dataset) == bool(self.datasets):
            yield "dataset: give one data set here, or several in datasets"
        if self.streaming and not self.max_steps:
            yield "streaming: a stream has no end; say in max_steps after how many optimizer steps to stop"
        if self.qat.start_step and self.qat.format in ("mxfp4", "nvfp4"):
            yield f"qat.start_step: {self.qat.format} has no products in 16 bits to begin with; set it to 0"
        if self.parallel.tp > 1:
            yield "parallel.tp: it cuts groups of weights and rows of inputs, which are rounded whole; use shard"
        yield from self.routing.problems(frozen=self.lora is not None)
        if self.eval_every and not self.dataset_eval:
            yield "eval_every: there is nothing to evaluate; give dataset_eval"


def build_model(config: Config, device: torch.device) -> Decoder:
    model = models.build(models.config_json(config.checkpoint_dir)).to(DTYPES[config.dtype])  # on meta: no memory yet
    if config.lora:
        apply_lora(model, config.lora)
    apply_qat(model, config.qat, device=device, dtype=DTYPES[config.dtype])
    return model.train()


def load_base(config: Config, model: Decoder, world: World, *, whole: bool = False) -> None:
    """Gives ``model`` memory and weights; of several ranks each gets a part of all (``whole``: of trained) tensors."""
    if world.mesh:
        for experts in split_experts(model, world.ep_mesh):
            fully_shard(experts, mesh=world.expert_mesh, mp_policy=world.sums)
        split_blocks(model, world.tp_mesh, world.tokens)
        left = frozen_weights(model) if whole else set()
        check_shards(model, world.mesh.size(-1), left=left)
        for layer in () if left else model.layers:  # adapters alone are gathered at one time
            fully_shard(layer, mesh=world.mesh, mp_policy=world.sums)
        fully_shard(model, mesh=world.root_mesh, mp_policy=world.sums, reshard_after_forward=True, ignored_params=left)
        sum_gradients(model)
    model.to_empty(device=world.device)
    hub.load_weights(model, config.checkpoint_dir)
    init_adapters(model)  # the same on all ranks, of which each keeps a part
    if world.rank:
        set_seed(config.seed + world.rank)  # from here on ranks drop other values


def build_data(config: Config, tokenizer: Tokenizer) -> tuple[Samples | Stream, Samples | None, Summary]:
    """What to train on, what is held out, and what the training data holds. Refuses data that cannot train."""
    vocab_size = models.sizes(config.checkpoint_dir).vocab_size
    nodes = config.datasets or [node for node in (config.dataset,) if node]
    built = [node.build(tokenizer=tokenizer, seq_len=config.seq_len) for node in nodes]
    samples = gather(built, streaming=config.streaming)
    summary = summarise(samples)
    summary.check(vocab_size=vocab_size, batch_size=config.batch_size)
    if config.dataset_eval is None:
        return samples, None, summary
    held_out = mix([config.dataset_eval.build(tokenizer=tokenizer, seq_len=config.seq_len)])
    summarise(held_out).check(vocab_size=vocab_size, batch_size=1)
    return samples, held_out, summary


@torch.no_grad()
def evaluate(model: Decoder, loader: Loader, world: World) -> float:
    """Mean negative log-likelihood, nats per supervised token, over all of ``loader``, of all ranks."""
    model.eval()
    total, supervised = torch.zeros((), device=world.device, dtype=torch.float64), 0
    for batch in one_epoch(loader, world.device):
        head = partial(nll_sum, labels=batch.labels, num_supervised=batch.num_supervised)
        total += model(batch.tokens, batch.positions, documents=batch.documents, head=head)
        supervised += batch.all_supervised
    model.train()
    return world.sum(total).item() / supervised


def save(config: Config, model: Decoder, tokenizer: Tokenizer, folder: Path, world: World) -> None:
    """A Hub folder, adapters merged in; in its ``quantised/`` the same in few bits, in ``adapter/`` adapters alone."""
    dtype, source = DTYPES[config.dtype], {"checkpoint_dir": config.checkpoint_dir, "tokenizer": tokenizer}
    save_trained(model, folder, **source, dtype=dtype, adapter=config.lora is not None)
    qat = config.qat
    how = Quantisation(format=qat.format, group_size=qat.group_size, targets=qat.targets, section="qat.")
    from_main(partial(save_quantised, folder, folder / "quantised", how, tokenizer, device=world.device, dtype=dtype))


def main(config: Config) -> None:
    with distributed.init(config.parallel, device=config.device, debug_dir=config.output_dir / "debug") as world:
        set_seed(config.seed)
        about = {"recipe": "qat_finetune", "checkpoint_dir": config.checkpoint_dir, "device": str(world)}
        with open_run(config.output_dir, dump(config), resume=config.resume, **about) as run:
            train(config, run, world)


def train(config: Config, run: Run, world: World) -> None:
    tokenizer = tokenizers.load(config.checkpoint_dir, chat_format=config.chat_format)
    with main_first():  # the others find its tokens in the cache
        samples, held_out, summary = build_data(config, tokenizer)
    base = state.base_fingerprint(config.checkpoint_dir)
    saved = checkpoint.latest(run.path, run.id, base=base)
    keep = saved.read("plan") if saved else None
    model = build_model(config, world.device)
    shape = {"seq_len": world.tokens.share(config.seq_len), "packed": config.packed, "device": world.device}
    found = plans(
        model,
        recompute=config.recompute,
        offload=config.offload_activations,
        compiled=config.compile,
        rows=config.batch_size,
        optimizer_bytes=optimizer_bytes(config.optimizer.build, param_groups(model), device=world.device),
        accumulation=config.gradient_accumulation_steps,
        shards=world.shards,
        reshard=world.reshard,
        keep=keep,
        **shape,
    )
    load_base(config, model, world, whole=found[0].gathers_once)
    routing = Routing(model, config.routing, sum=world.sum)
    optimizer = config.optimizer.build(param_groups(model))
    state.check_savable(optimizer)
    plan = settle(model, found, by_head(model, nll_sum), keep=keep, **shape)
    recorded = True  # rounding, in the CUDA graphs of the trial

    how = {
        "batch_size": plan.rows,
        "seed": config.seed,
        "packed": config.packed,
        "one_shape": config.compile or config.parallel.ep > 1,
    }
    how |= {"rank": world.data_rank, "num_ranks": world.data_size, "shards": world.tokens}
    micro_steps = config.gradient_accumulation_steps * (config.batch_size // plan.rows)
    routing.begin(micro_steps=micro_steps)
    loader = Prefetch(open_loader(samples, **how), world.device, depth=2 * micro_steps)
    eval_loader = Loader(held_out, shuffle=False, **how) if held_out else None
    total_steps = loader.num_steps(micro_steps, epochs=config.epochs, max_steps=config.max_steps)
    step = 0
    if saved:
        step = saved.number
        state.load_parameters(saved.open("model"), state.trainable(model))
        state.load_optimizer(saved.open("optimizer"), model, optimizer, hyperparameters=not run.config_changed)
        loader.load_state_dict(saved.read("loader"))
    schedule = attach(optimizer, config.lr_schedule.build(total_steps=total_steps), step=step)

    rows_per_step = config.batch_size * config.gradient_accumulation_steps * world.data_size
    facts = {"rounding": f"{config.qat.format} from step {config.qat.start_step} on", "data": str(summary)}
    sizes = {"steps": total_steps, "rows": rows_per_step, "seq_len": config.seq_len, "step": step, "output": run.path}
    facts |= run_facts(model, plan, device=f"{world}, {config.dtype}", **sizes)
    console = Console(quiet=not is_main())
    first_panel(console, "Quantisation-aware fine-tuning", facts, masked_tokens(loader.samples[0], tokenizer))
    size = 3 * plan.memory.gradients * world.shards
    from_main(partial(check_space, run.path, size, copies=config.keep_last + 2))

    metrics = MetricsFile(run.path / "metrics.jsonl", resume_step=step)
    about = {"run_id": run.id, "output_dir": run.path, "config": redact_tree(plain(config))}
    trackers = Loggers(partial(node.build, **about) for node in config.metric_loggers if is_main())
    meter = Meter(world.device, flops_per_token=training_flops(model, seq_len=summary.tokens // summary.samples))
    params = [p for p in model.parameters() if p.requires_grad]
    if not rounds_stochastically(optimizer):
        warn_if_frozen(params, max(float(group["initial_lr"]) for group in optimizer.param_groups))
    if eval_loader and step == 0:
        set_rounding(model, True)
        metrics.write({"step": 0, "eval_loss": evaluate(model, eval_loader, world)})  # rounded without training
    guard = Guard(config.guard)
    if saved:
        guard.load_state_dict(saved.read("guard"))
        load_rng_state(saved.read_own("rng"))  # last: what stands above draws random numbers

    with (
        Steps(console, total_steps, start=step) as progress,
        closing(loader),
        out_of_memory_explained(plan),
        Interruptible() as stop,
        Saver(run.path, run.id, base=base, keep_last=config.keep_last, own=("rng",)) as saver,
        profiled(config.profile, run.path / "profile") as end_of_step,
    ):
        while step < total_steps:
            rounds = step >= config.qat.start_step
            set_rounding(model, rounds)
            if rounds != recorded and model.replay:
                model.replay = Replay(model)  # what was recorded before does the other thing
            recorded = rounds
            window = loader.take(micro_steps)  # fewer where an epoch ends
            supervised = sum(batch.all_supervised for batch in window)  # of all ranks
            world.begin_step(step)
            lr = float(optimizer.param_groups[0]["lr"])

            own_loss = torch.zeros((), device=world.device)
            for batch in window:
                head = partial(nll_sum, labels=batch.labels, num_supervised=batch.num_supervised)
                nll = model(batch.tokens, batch.positions, documents=batch.documents, head=head)
                micro_loss = nll / supervised  # of the whole window: accumulation does not change the gradient
                micro_loss.backward()
                own_loss += micro_loss.detach()
            loss, asked = world.sum(torch.stack([own_loss, torch.full_like(own_loss, stop.asked)]))
            grad_norm = clip_grad_norm(params, config.clip_grad_norm)
            rows = [place for batch in window for place in batch.where]
            if guard.allows(step + 1, loss=loss, grad_norm=grad_norm, model=model, rows=rows, own_loss=own_loss):
                optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            profile = end_of_step()
            routing.end_of_step()
            meter.add(loss, tokens=sum(batch.num_tokens for batch in window), supervised=supervised)
            row: Row = {}
            evaluates = is_due(step, config.eval_every, total_steps)
            stops = step < total_steps and bool(asked)  # all ranks alike
            saves = is_due(step, config.save_every, total_steps) or stops
            if evaluates or saves or is_due(step, config.log_every, total_steps):  # no row's mean spans a checkpoint
                row = meter.row(step, lr=lr, grad_norm=grad_norm) | routing.row() | profile
                row |= {"skipped_steps": guard.skipped} if guard.skipped else {}
                with meter.paused():
                    if evaluates and eval_loader:
                        set_rounding(model, True)  # what the quantised checkpoint would do, whatever is trained now
                        row["eval_loss"] = evaluate(model, eval_loader, world)
                metrics.write(row)
                trackers.log(step, row)
                progress.update(step, row)
            if saves:
                with meter.paused():
                    others = {"loader": loader.state_dict(), "guard": guard.state_dict(), "plan": plan.setting}
                    parts = state.everything(model, optimizer, **others)
                    saver.save(step, parts, score=row.get("eval_loss"))  # copies; training goes on while it writes
                    draw_loss(read_rows(metrics.path), run.path / "loss.png", title=run.path.name)
            if stops:
                saver.wait()
                ended = f"Stopped after step {step}; the same command goes on from there"
                last_panel(console, ended, {"output": str(run.path)}, {})
                raise Stopped
    metrics.close()
    trackers.close()

    export = run.path / "export"
    save(config, model, tokenizer, export, world)
    where = results(metrics.path, loss=f"{run.path / 'loss.png'}")
    where |= {"model": f"{export}", "quantised model": f"{export / 'quantised'}"}
    last_panel(console, "Done", where, commands(model=export / "quantised", question="Hello!"))


if __name__ == "__main__":
    start(main, Config, recipe="qat_finetune")
