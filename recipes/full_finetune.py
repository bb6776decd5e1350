"""Fine-tuning of all weights of a Hub checkpoint, or training them from scratch.

    tune run full_finetune --config llama3_2/1B_full checkpoint_dir=Llama-3.2-1B-Instruct dataset.source=my.jsonl
    tune run full_finetune --config demo/pretrain              # makes the demo's base model
    python recipes/full_finetune.py --config my.yaml optimizer.lr=1e-5

To change it: `tune cp full_finetune my_recipe.py`, then `tune run my_recipe.py --config ...`.
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
from torchft.adapters.fp8_training import FP8TrainingConfig, apply_fp8_training
from torchft.adapters.tensor_parallel import split_blocks
from torchft.cli.run import start
from torchft.config import Component, Folder, Kind, Range, dump, plain
from torchft.data.conversations import conversations
from torchft.data.loader import Loader
from torchft.data.mixture import mix
from torchft.data.prefetch import Prefetch, one_epoch
from torchft.data.preview import masked_tokens
from torchft.data.samples import Samples
from torchft.data.stream import Stream, StreamConfig, gather
from torchft.data.stream_loader import open_loader
from torchft.data.summary import Summary, summarise
from torchft.generation.exact_match import Answer, ExactMatchConfig, answer_sharded, share_right, side_by_side
from torchft.losses.likelihood import nll_sum
from torchft.modules.decoder import Decoder, init_weights
from torchft.ranks import from_main, is_main, main_first, new_folder
from torchft.redact import redact_tree
from torchft.tokenizers.export import save_tokenizer
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.training import checkpoint, distributed, state
from torchft.training.console import Console, Steps, answers_table, first_panel, last_panel
from torchft.training.disk import check_space
from torchft.training.distributed import ParallelConfig, World, sum_gradients
from torchft.training.facts import run_facts
from torchft.training.guard import Guard, GuardConfig
from torchft.training.in_backward import InBackward
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
    from_scratch: bool = False  # random weights; of checkpoint_dir only config.json and the tokenizer are read
    output_dir: Annotated[Path, Folder(writable=True)]  # checkpoints, metrics, export/
    export_dtype: Literal["bf16", "fp32"] = "bf16"  # of the weights in export/

    # Data
    dataset: Dataset | None = None
    datasets: list[Dataset] = field(default_factory=list)  # or several, each with a weight and a stage if wanted
    streaming: StreamConfig | None = None  # read and tokenise while training, for large data; `streaming: {}`
    chat_format: str | None = None  # instead of the checkpoint's own template: llama2, llama3, qwen3 or a .jinja file
    dataset_eval: Dataset | None = None  # held out: its loss is measured every eval_every steps and at the end
    exact_match: ExactMatchConfig | None = None  # held-out questions, answered before and after training
    seq_len: Annotated[int, Range(min=2)] = 2048  # tokens per row; longer samples are cut
    packed: bool = False  # several samples per row: no padding, same gradients
    batch_size: Annotated[int, Range(min=1)] = 2  # rows per device and micro-step
    gradient_accumulation_steps: Annotated[int, Range(min=1)] = 1  # micro-steps per optimizer step
    epochs: Annotated[int, Range(min=1)] = 1
    max_steps: Annotated[int, Range(min=1)] | None = None  # optimizer steps, if fewer than the epochs have

    # Model
    dtype: Literal["bf16", "fp32"] = "bf16"  # of weights, gradients, optimizer states and computation
    device: str = "auto"  # auto takes the accelerator if there is one
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # how several processes share the work
    compile: bool = False  # torch.compile each block: faster steps, a slower first one
    fp8: FP8TrainingConfig | None = None  # matrix products in 8 bits on GPUs that have them, with compile; `fp8: {}`
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
    optimizer_in_backward: bool = False  # step each weight as its gradient comes, and free it: saves all gradients
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
        if self.eval_every and not self.dataset_eval and not self.exact_match:
            yield "eval_every: there is nothing to evaluate; give dataset_eval or exact_match"
        if self.optimizer_in_backward and self.gradient_accumulation_steps > 1:
            yield "optimizer_in_backward: gradients are freed at once, so set gradient_accumulation_steps: 1"
        if self.optimizer_in_backward and self.clip_grad_norm is not None:
            yield "optimizer_in_backward: the total norm comes too late for clipping, so set clip_grad_norm: null"
        if self.optimizer_in_backward and self.guard.not_finite == "skip":
            yield "guard.not_finite: with optimizer_in_backward a step is taken before it is known: only stop"


def build_model(config: Config, device: torch.device) -> Decoder:
    model = models.build(models.config_json(config.checkpoint_dir)).to(DTYPES[config.dtype])  # on meta: no memory yet
    if config.fp8:
        apply_fp8_training(model, config.fp8, device=device)
    return model.train()


def load_model(config: Config, model: Decoder, world: World) -> None:
    """Gives ``model`` memory and weights; of several ranks each gets a part of every tensor."""
    if world.mesh:
        for experts in split_experts(model, world.ep_mesh):
            fully_shard(experts, mesh=world.expert_mesh, mp_policy=world.sums)
        split_blocks(model, world.tp_mesh, world.tokens)
        for layer in model.layers:
            fully_shard(layer, mesh=world.mesh, mp_policy=world.sums)
        fully_shard(model, mesh=world.root_mesh, mp_policy=world.sums, reshard_after_forward=True)
        sum_gradients(model)
    model.to_empty(device=world.device)
    if config.from_scratch:
        init_weights(model)
    else:
        hub.load_weights(model, config.checkpoint_dir)


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


def save(config: Config, model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hub folder, which transformers and vLLM load."""
    with new_folder(folder) as new:
        hub.save(model, new, dtype=DTYPES[config.export_dtype])
        hub.save_side_files(config.checkpoint_dir, new, stop_ids=tokenizer.stop_ids)
        save_tokenizer(tokenizer, new)


def main(config: Config) -> None:
    with distributed.init(config.parallel, device=config.device, debug_dir=config.output_dir / "debug") as world:
        set_seed(config.seed)
        about = {"recipe": "full_finetune", "checkpoint_dir": config.checkpoint_dir, "device": str(world)}
        with open_run(config.output_dir, dump(config), resume=config.resume, **about) as run:
            train(config, run, world)


def train(config: Config, run: Run, world: World) -> None:
    tokenizer = tokenizers.load(config.checkpoint_dir, chat_format=config.chat_format)
    with main_first():  # the others find its tokens in the cache
        samples, held_out, summary = build_data(config, tokenizer)
    exam = config.exact_match
    questions = conversations(exam.source, max_rows=exam.max_rows) if exam else []

    saved = checkpoint.latest(run.path, run.id)
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
        in_backward=config.optimizer_in_backward,
        accumulation=config.gradient_accumulation_steps,
        shards=world.shards,
        reshard=world.reshard,
        keep=keep,
        **shape,
    )
    load_model(config, model, world)
    routing = Routing(model, config.routing, sum=world.sum)
    optimizer = config.optimizer.build(param_groups(model))
    state.check_savable(optimizer)
    plan = settle(model, found, by_head(model, nll_sum), keep=keep, **shape)

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
    params = list(model.parameters())
    facts = {"data": str(summary)}
    sizes = {"steps": total_steps, "rows": rows_per_step, "seq_len": config.seq_len, "step": step, "output": run.path}
    facts |= run_facts(model, plan, device=f"{world}, {config.dtype}", **sizes)
    console = Console(quiet=not is_main())
    first_panel(console, "Full fine-tuning", facts, masked_tokens(loader.samples[0], tokenizer))
    size = 3 * sum(p.nbytes for p in model.parameters())
    from_main(partial(check_space, run.path, size, copies=config.keep_last + 2))

    metrics = MetricsFile(run.path / "metrics.jsonl", resume_step=step)
    about = {"run_id": run.id, "output_dir": run.path, "config": redact_tree(plain(config))}
    trackers = Loggers(partial(node.build, **about) for node in config.metric_loggers if is_main())
    meter = Meter(world.device, flops_per_token=training_flops(model, seq_len=summary.tokens // summary.samples))
    if not rounds_stochastically(optimizer):
        warn_if_frozen(params, max(float(group["initial_lr"]) for group in optimizer.param_groups))
    fits = plan.gathers_once and config.parallel.ep == 1
    examine, before = partial(answer_sharded, tp=world.tokens.tp, fits=fits), list[Answer]()
    if exam and step == 0:
        before = examine(model, tokenizer, questions, exam)
        metrics.write({"step": 0, "exact_match": share_right(before)})
    after = before
    guard = Guard(config.guard)
    if saved:
        guard.load_state_dict(saved.read("guard"))
        load_rng_state(saved.read_own("rng"))  # last: what stands above draws random numbers

    in_backward = InBackward(optimizer, model) if config.optimizer_in_backward else None
    with (
        Steps(console, total_steps, start=step) as progress,
        closing(loader),
        out_of_memory_explained(plan),
        Interruptible() as stop,
        Saver(run.path, run.id, keep_last=config.keep_last, own=("rng",)) as saver,
        profiled(config.profile, run.path / "profile") as end_of_step,
    ):
        while step < total_steps:
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
            rows = [place for batch in window for place in batch.where]
            if in_backward:
                grad_norm = in_backward.finish(step + 1, loss=loss, rows=rows)
            else:
                grad_norm = clip_grad_norm(params, config.clip_grad_norm)
                if guard.allows(step + 1, loss=loss, grad_norm=grad_norm, model=model, rows=rows, own_loss=own_loss):
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            schedule.step()
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
                        row["eval_loss"] = evaluate(model, eval_loader, world)
                    if evaluates and exam:
                        after = examine(model, tokenizer, questions, exam)
                        row["exact_match"] = share_right(after)
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
    save(config, model, tokenizer, export)
    where = results(metrics.path, loss=f"{run.path / 'loss.png'}")
    where |= {"model": str(export)}
    if exam:
        after = after or examine(model, tokenizer, questions, exam)  # resumed after the last step
        first = next((r["exact_match"] for r in read_rows(metrics.path) if r["step"] == 0), None)  # of an earlier start
        was = "" if first is None else f"{first:.1%} before training, "
        where["exact match"] = f"{was}{share_right(after):.1%} after, on {len(after)} held-out questions"
        answers_table(console, side_by_side(before, after), "Held-out questions")
    question = questions[0][-2]["content"] if questions else "Hello!"
    last_panel(console, "Done", where, commands(model=export, question=question))


if __name__ == "__main__":
    start(main, Config, recipe="full_finetune")
