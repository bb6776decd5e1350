"""Models that score texts, decoders and encoders: rewards, classes, rerankers; with LoRA if wanted.

    tune run reward_modeling --config my.yaml dataset.source=my_pairs.jsonl
    tune run reward_modeling --config bert/base_classify dataset.source=my_texts.jsonl dataset.labels=[no,yes]
    tune run reward_modeling --config xlm_roberta/bge_reranker dataset.source=my_queries.jsonl

What it leaves loads as transformers' *ForSequenceClassification (of steps: *ForTokenClassification) with equal outputs.
To change it: `tune cp reward_modeling my_recipe.py`, then `tune run my_recipe.py --config ...`.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from torchft import hub, models, tokenizers
from torchft.adapters.expert_parallel import split_experts
from torchft.adapters.fp8 import FP8Config, apply_fp8
from torchft.adapters.fused import fuse_lora
from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters
from torchft.adapters.nf4 import NF4Config, apply_nf4, check_shards
from torchft.adapters.score import apply_score_head, init_score_head
from torchft.adapters.tensor_parallel import split_blocks
from torchft.cli.run import start
from torchft.config import Component, Folder, Kind, Range, dump, plain
from torchft.data.batch import Batch
from torchft.data.judged import read_at_ends, safe_pad_id
from torchft.data.labelled import label_names
from torchft.data.loader import Loader
from torchft.data.mixture import mix
from torchft.data.preferences import check_judged
from torchft.data.prefetch import Prefetch, one_epoch
from torchft.data.preview import judged_tokens
from torchft.data.samples import Samples
from torchft.data.stream import Stream, StreamConfig, gather
from torchft.data.stream_loader import open_loader
from torchft.data.summary import Summary, summarise
from torchft.data.texts import check_lengths
from torchft.export import save_trained
from torchft.losses.likelihood import IGNORE
from torchft.losses.reward import ARGUMENTS, KINDS, document_scores, scores_at
from torchft.modules.decoder import Decoder
from torchft.modules.encoder import Encoder
from torchft.ranks import from_main, is_main, main_first
from torchft.redact import redact_tree
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.training import checkpoint, distributed, state
from torchft.training.console import Console, Steps, first_panel, last_panel
from torchft.training.disk import check_space
from torchft.training.distributed import ParallelConfig, World, frozen_weights, sum_gradients
from torchft.training.facts import run_facts
from torchft.training.guard import Guard, GuardConfig
from torchft.training.interrupt import Interruptible, Stopped
from torchft.training.loggers import Loggers
from torchft.training.meter import Meter, training_flops
from torchft.training.metrics import MetricsFile, Row, draw_loss, read_rows, results
from torchft.training.optim import clip_grad_norm, param_groups
from torchft.training.optimizer_memory import optimizer_bytes
from torchft.training.profile import ProfileConfig, profiled
from torchft.training.recompute import plans
from torchft.training.routing import Routing, RoutingConfig
from torchft.training.run_folder import Run, open_run
from torchft.training.saver import Saver
from torchft.training.schedules import attach, is_due
from torchft.training.seed import load_rng_state, set_seed
from torchft.training.tally import Tally
from torchft.training.trial import out_of_memory_explained, settle

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Dataset = Annotated[
    Component, Kind("preferences", supplied=("tokenizer", "seq_len"), default="torchft.data.preferences.pairs")
]


@dataclass(frozen=True, kw_only=True)
class Config:
    # What is trained, and where it goes
    checkpoint_dir: Annotated[Path, Folder(exists=True)]  # a Hub folder: family, sizes, tokenizer and chat format
    output_dir: Annotated[Path, Folder(writable=True)]  # checkpoints, metrics, export/
    export_dtype: Literal["bf16", "fp32"] = "bf16"  # of the weights in export/

    # Method
    loss: Annotated[Component, Kind("reward_loss", offered=ARGUMENTS)] = Component(
        "torchft.losses.reward.bradley_terry", {"centering": 0.01}
    )

    # Data
    dataset: Dataset | None = None
    datasets: list[Dataset] = field(default_factory=list)  # or several, each with a weight and a stage if wanted
    streaming: StreamConfig | None = None  # not here: the whole data says how many scores there are
    chat_format: str | None = None  # instead of the checkpoint's own template: llama2, llama3, or a .jinja file
    dataset_eval: Dataset | None = None  # held out: measured every eval_every steps and at the end
    seq_len: Annotated[int, Range(min=2)] = 2048  # tokens per row; a pair, with its prompt twice, fits or is left out
    packed: bool = False  # several pairs per row: no padding, same gradients
    batch_size: Annotated[int, Range(min=1)] = 2  # rows per device and micro-step
    gradient_accumulation_steps: Annotated[int, Range(min=1)] = 1  # micro-steps per optimizer step
    epochs: Annotated[int, Range(min=1)] = 1
    max_steps: Annotated[int, Range(min=1)] | None = None  # optimizer steps, if fewer than the epochs have

    # Model
    lora: LoRAConfig | None = None  # null: all weights are trained; `lora: {}` trains adapters
    fp8: FP8Config | None = None  # the frozen base in 8 bits, much faster on GPUs that have them; `fp8: {}`
    nf4: NF4Config | None = None  # QLoRA: the frozen base in 4 bits; `nf4: {}` is all it needs
    dtype: Literal["bf16", "fp32"] = "bf16"  # of weights and computation; adapters are fp32
    device: str = "auto"  # auto takes the accelerator if there is one
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # how several processes share the work
    routing: RoutingConfig = field(default_factory=RoutingConfig)  # of a mixture of experts: how even its load is kept
    compile: bool = False  # torch.compile each block: faster steps, a slower first one
    recompute: Literal["none", "auto", "full"] | Annotated[float, Range(min=0, max=1)] = "auto"  # activations computed
    # again in backward instead of kept: a number is the share kept; auto measures and takes the fastest that fits
    offload_activations: bool | Annotated[float, Range(min=0, max=1)] = False  # wait in host memory for backward, all
    # that is kept or a share; auto does it if recomputing more would be slower

    # Optimisation
    optimizer: Annotated[Component, Kind("optimizer", supplied=("params",))] = Component(
        "torch.optim.AdamW", {"lr": 1e-5, "weight_decay": 0.0, "fused": True}
    )
    lr_schedule: Annotated[Component, Kind("lr_schedule", supplied=("total_steps",))] = Component(
        "torchft.training.schedules.cosine", {"warmup_share": 0.1}
    )
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
        if self.streaming:
            yield "streaming: how many scores a model gives is known from all the data; leave it out"
        if (self.nf4 or self.fp8) and (not self.lora or (self.nf4 and self.fp8)):
            yield "nf4, fp8: the base has one format, which is frozen; leave one of the sections out, and add lora"
        yield from self.routing.problems(frozen=self.lora is not None)
        if self.eval_every and not self.dataset_eval:
            yield "eval_every: there is nothing to evaluate; give dataset_eval"


def build_model(config: Config, tokenizer: Tokenizer, device: torch.device) -> Decoder:
    json = models.config_json(config.checkpoint_dir, encoders=True, separator=tokenizer.separator_id)
    model = models.build(json).to(DTYPES[config.dtype])  # on meta: no memory yet
    if config.nf4:
        apply_nf4(model, config.nf4)
    if config.fp8:
        apply_fp8(model, config.fp8, device=device)
    if config.lora:
        apply_lora(model, config.lora)
        fuse_lora(model)
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


def score_batch(config: Config, model: Decoder, kind: str, batch: Batch) -> dict[str, Tensor]:
    """What the metrics report of each judged sample or step; ``loss``, which takes ``kind``, is what is trained."""
    assert model.lm_head is not None
    if kind == "step_scores":
        head = partial(scores_at, score=model.lm_head, labels=batch.labels, count=batch.num_supervised)
    else:
        pooling = model.config.pooling if isinstance(model, Encoder) else "last"
        head = partial(document_scores, score=model.lm_head, pooling=pooling, **batch.places, shards=batch.shards)
    scores = model(batch.tokens, batch.positions, documents=batch.documents, head=head)  # [samples, documents, k]
    call, targets = config.loss.call, batch.targets
    match kind:
        case "step_scores":  # [steps, k]
            labels = batch.labels[batch.labels != IGNORE]
            return {"loss": call(step_scores=scores, labels=labels), "accuracy": scores.argmax(1) == labels}
        case "chosen_scores":
            chosen, rejected = scores[..., 0].unbind(1)
            margins = None if targets is None else targets[:, 0]
            losses = call(chosen_scores=chosen, rejected_scores=rejected, margins=margins)
            return {"loss": losses, "accuracy": chosen > rejected, "margin": chosen - rejected, "score": scores}
        case "candidate_scores":  # the right one first
            better = (scores[:, 1:, 0] > scores[:, :1, 0]).sum(1)
            losses = call(candidate_scores=scores[..., 0])
            return {"loss": losses, "accuracy": better == 0, "mrr": 1 / (1 + better)}
    scores = scores[:, 0]  # [samples, k]
    found = {"loss": call(**{kind: scores}, targets=targets), "score": scores}
    if kind == "class_scores":
        found["accuracy"] = scores.argmax(1) == targets.argmax(1)
    if kind == "yes_scores":
        found["accuracy"] = (scores > 0) == (targets > 0.5)
    return found


@torch.no_grad()
def evaluate_scores(config: Config, model: Decoder, kind: str, loader: Loader, tally: Tally, world: World) -> Row:
    """Means over all of ``loader``, of all ranks."""
    model.eval()
    for batch in one_epoch(loader, world.device):
        tally.add(**score_batch(config, model, kind, batch))
    model.train()
    return tally.row(prefix="eval_")


def main(config: Config) -> None:
    with distributed.init(config.parallel, device=config.device, debug_dir=config.output_dir / "debug") as world:
        set_seed(config.seed)
        about = {"recipe": "reward_modeling", "checkpoint_dir": config.checkpoint_dir, "device": str(world)}
        with open_run(config.output_dir, dump(config), resume=config.resume, **about) as run:
            train(config, run, world)


def train(config: Config, run: Run, world: World) -> None:
    tokenizer = tokenizers.load(config.checkpoint_dir, chat_format=config.chat_format)
    with main_first():  # the others find its tokens in the cache
        samples, held_out, summary = build_data(config, tokenizer)
    kind = next((name for name in KINDS if config.loss.takes(name)), "scores")
    wanted, reports, problem = KINDS[kind]
    check_judged(samples, wanted, why=config.loss.name)
    if not (per_token := kind == "step_scores"):
        samples, held_out = read_at_ends(samples), read_at_ends(held_out) if held_out else None

    base = state.base_fingerprint(config.checkpoint_dir)
    saved = checkpoint.latest(run.path, run.id, base=base)
    keep = saved.read("plan") if saved else None
    nodes = [node.args for node in (config.dataset, *config.datasets, config.dataset_eval) if node]
    is_one = kind in ("chosen_scores", "candidate_scores")  # of a document, to compare it with others
    names = label_names(nodes, num_scores=1 if is_one else samples.num_targets)
    model = build_model(config, tokenizer, world.device)
    about = {"per_token": per_token, "pad_id": safe_pad_id(samples), "problem": problem}
    apply_score_head(model, ["wrong", "right"] if per_token else names, **about)
    for data in (samples, held_out) if isinstance(model, Encoder) else ():
        check_lengths(data, model.config.max_seq_len)
    shape = {"seq_len": world.tokens.share(config.seq_len), "packed": True, "device": world.device}
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
    init_score_head(model, config.seed, lacking=hub.lacking(model, config.checkpoint_dir))
    optimizer = config.optimizer.build(param_groups(model))
    state.check_savable(optimizer)
    plan = settle(model, found, lambda tokens, _, positions: model(tokens, positions).sum(), keep=keep, **shape)
    one_shape = config.compile or config.parallel.ep > 1
    how = {"batch_size": plan.rows, "seed": config.seed, "packed": config.packed, "one_shape": one_shape}
    how |= {"rank": world.data_rank, "num_ranks": world.data_size, "shards": world.tokens}
    how |= {"padding_apart": not per_token}
    micro_steps = config.gradient_accumulation_steps * (config.batch_size // plan.rows)
    routing.begin(micro_steps=micro_steps)
    loader = Prefetch(open_loader(samples, **how), world.device, depth=2 * micro_steps)
    eval_loader = Loader(held_out, shuffle=False, **how) if held_out else None
    total_steps = loader.num_steps(micro_steps, epochs=config.epochs, max_steps=config.max_steps)
    step = saved.number if saved else 0
    if saved:
        state.load_parameters(saved.open("model"), state.trainable(model))
        state.load_optimizer(saved.open("optimizer"), model, optimizer, hyperparameters=not run.config_changed)
        loader.load_state_dict(saved.read("loader"))
    schedule = attach(optimizer, config.lr_schedule.build(total_steps=total_steps), step=step)

    rows_per_step = config.batch_size * config.gradient_accumulation_steps * world.data_size
    sizes = {"steps": total_steps, "rows": rows_per_step, "seq_len": config.seq_len, "step": step, "output": run.path}
    facts = {"loss": f"{config.loss.name.rpartition('.')[2]} {config.loss.args}", "data": str(summary)}
    facts |= run_facts(model, plan, device=f"{world}, {config.dtype}", **sizes)
    console = Console(quiet=not is_main())
    first_panel(console, "Reward modelling", facts, judged_tokens(loader.samples[0], tokenizer), what="are judged")
    from_main(partial(check_space, run.path, 3 * plan.memory.gradients * world.shards, copies=config.keep_last + 2))

    metrics = MetricsFile(run.path / "metrics.jsonl", resume_step=step)
    about = {"run_id": run.id, "output_dir": run.path, "config": redact_tree(plain(config))}
    trackers = Loggers(partial(node.build, **about) for node in config.metric_loggers if is_main())
    meter = Meter(world.device, flops_per_token=training_flops(model, seq_len=summary.tokens // summary.samples))
    tally, eval_tally = Tally(world, reports[1:]), Tally(world, reports)
    params = [p for p in model.parameters() if p.requires_grad]
    guard = Guard(config.guard)
    if eval_loader and step == 0:
        metrics.write({"step": 0, **evaluate_scores(config, model, kind, eval_loader, eval_tally, world)})
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
            window = loader.take(micro_steps)  # fewer where an epoch ends
            num_judged = sum(
                batch.all_supervised if per_token else batch.all_samples for batch in window
            )  # of all ranks
            world.begin_step(step)
            lr = float(optimizer.param_groups[0]["lr"])

            own_loss = torch.zeros((), device=world.device)
            for batch in window:
                judged = score_batch(config, model, kind, batch)
                micro_loss = judged["loss"].sum() / num_judged  # of the whole window: accumulation changes nothing
                micro_loss.backward()
                own_loss += micro_loss.detach()
                tally.add(**judged)
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
            supervised = sum(batch.all_supervised for batch in window)
            meter.add(loss, tokens=sum(batch.num_tokens for batch in window), supervised=supervised)
            row: Row = {}
            evaluates = is_due(step, config.eval_every, total_steps)
            stops = step < total_steps and bool(asked)  # all ranks alike
            saves = is_due(step, config.save_every, total_steps) or stops
            if evaluates or saves or is_due(step, config.log_every, total_steps):  # no row's mean spans a checkpoint
                row = meter.row(step, lr=lr, grad_norm=grad_norm) | routing.row() | profile | tally.row()
                row |= {"skipped_steps": guard.skipped} if guard.skipped else {}
                with meter.paused():
                    if evaluates and eval_loader:
                        row |= evaluate_scores(config, model, kind, eval_loader, eval_tally, world)
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
    dtype = DTYPES[config.export_dtype]
    save_trained(model, export, checkpoint_dir=config.checkpoint_dir, tokenizer=tokenizer, dtype=dtype)
    where = results(metrics.path, export=f"{export}")
    last_panel(console, "Done", where, {})


if __name__ == "__main__":
    start(main, Config, recipe="reward_modeling")
