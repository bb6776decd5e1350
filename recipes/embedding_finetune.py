"""Embeddings by contrast: a query's own text against those of all others and hard negatives; with LoRA if wanted.

    tune run embedding_finetune --config my.yaml dataset.source=my_pairs.jsonl
    tune run embedding_finetune --config my.yaml gradient_accumulation_steps=16   # 16 times the negatives, same memory

Of decoders (last token, mean) and of BERT's kind (cls, mean). All rows of a step, of all micro-steps and ranks, are
each other's negatives. What it leaves is a folder of sentence-transformers.
To change it: `tune cp embedding_finetune my_recipe.py`, then `tune run my_recipe.py --config ...`.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from torchft import hub, models, tokenizers
from torchft.adapters.expert_parallel import split_experts
from torchft.adapters.fp8 import FP8Config, apply_fp8
from torchft.adapters.fused import fuse_lora
from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters
from torchft.adapters.nf4 import NF4Config, apply_nf4, check_shards
from torchft.adapters.tensor_parallel import split_blocks
from torchft.cli.run import start
from torchft.config import Component, Folder, Kind, Range, dump, plain
from torchft.data.batch import Batch
from torchft.data.loader import Loader
from torchft.data.mixture import mix
from torchft.data.prefetch import Prefetch, one_epoch
from torchft.data.preview import judged_tokens
from torchft.data.samples import Samples
from torchft.data.summary import Summary, summarise
from torchft.data.texts import check_lengths
from torchft.errors import UserError
from torchft.export import save_trained
from torchft.losses.contrastive import contrastive, document_keys, pooled, ranks_of_own, repeated
from torchft.modules.decoder import Decoder
from torchft.modules.encoder import Encoder
from torchft.ranks import from_main, is_main, main_first
from torchft.redact import redact_tree
from torchft.sentence_transformers import Embedder, read_embedder, save_modules
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.training import checkpoint, distributed, state
from torchft.training.console import Console, Steps, first_panel, last_panel
from torchft.training.disk import check_space
from torchft.training.distributed import ParallelConfig, World, frozen_weights, sum_gradients
from torchft.training.facts import run_facts
from torchft.training.gather import all_rows
from torchft.training.grad_cache import backward_together
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
Dataset = Annotated[Component, Kind("texts", supplied=("tokenizer", "seq_len"), default="torchft.data.texts.texts")]


@dataclass(frozen=True, kw_only=True)
class Config:
    # What is trained, and where it goes
    checkpoint_dir: Annotated[Path, Folder(exists=True)]  # a Hub folder: family, sizes, tokenizer
    output_dir: Annotated[Path, Folder(writable=True)]  # checkpoints, metrics, export/
    export_dtype: Literal["bf16", "fp32"] = "bf16"  # of the weights in export/

    # Method
    pooling: Literal["cls", "mean", "last"] | None = None  # of hidden states; null: what a sentence-transformers folder
    # says, else the mean of an encoder and a decoder's last token
    similarity: Literal["cosine", "dot"] | None = None  # null: what a sentence-transformers folder says, else cosine
    temperature: Annotated[float, Range(above=0)] = 0.05  # similarities are divided by it
    symmetric: bool = False  # documents look for their query too
    matryoshka_dims: list[int] = field(default_factory=list)  # widths whose first channels are embeddings too

    # Data
    dataset: Dataset | None = None
    datasets: list[Dataset] = field(default_factory=list)  # or several, each with a weight and a stage if wanted
    dataset_eval: Dataset | None = None  # held out: measured every eval_every steps and at the end
    seq_len: Annotated[int, Range(min=2)] = 2048  # tokens per row: of a query and its texts together, or
    packed: bool = False  # of several of them: no padding, same gradients
    batch_size: Annotated[int, Range(min=1)] = 2  # rows per device and micro-step
    gradient_accumulation_steps: Annotated[int, Range(min=1)] = 1  # micro-steps per optimizer step. More than one: each
    # row is embedded twice, all are negatives of each other, and the memory is that of one micro-step
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
        if (self.nf4 or self.fp8) and (not self.lora or (self.nf4 and self.fp8)):
            yield "nf4, fp8: the base has one format, which is frozen; leave one of the sections out, and add lora"
        yield from self.routing.problems(frozen=self.lora is not None)
        if self.eval_every and not self.dataset_eval:
            yield "eval_every: there is nothing to evaluate; give dataset_eval"


def build_model(config: Config, device: torch.device) -> Decoder:
    model = models.build(models.config_json(config.checkpoint_dir, encoders=True)).to(DTYPES[config.dtype])
    if model.lm_head is not None:
        model.lm_head.requires_grad_(False)  # no word is predicted
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


def build_texts(
    config: Config, tokenizer: Tokenizer, settings: dict[str, Any]
) -> tuple[Samples, Samples | None, Summary]:
    """What to train on, what is held out, and what the training data holds. Refuses data that cannot train.

    ``settings``: of texts, where the config says nothing.
    """
    sizes = models.sizes(config.checkpoint_dir)
    samples, held_out = (
        [node.with_defaults(settings).build(tokenizer=tokenizer, seq_len=config.seq_len) for node in nodes if node]
        for nodes in (config.datasets or [config.dataset], [config.dataset_eval])
    )
    samples = mix(samples)
    summary = summarise(samples)
    summary.check(vocab_size=sizes.vocab_size, batch_size=config.batch_size)
    if bad := [dim for dim in config.matryoshka_dims if not 0 < dim <= sizes.dim]:
        raise UserError(f"matryoshka_dims: {bad[0]} is no width of an embedding of {sizes.dim}")
    check_lengths(samples, sizes.max_seq_len)
    return samples, mix(held_out) if held_out else None, summary


def embed(model: Decoder, pooling: str | None, batch: Batch) -> Tensor:
    """[samples, n, d] fp32: of each sample's query, its document and its hard negatives."""
    head = partial(pooled, pooling=pooling, **batch.places, shards=batch.shards)
    return model(batch.tokens, batch.positions, documents=batch.documents, head=head)


def mean_loss(
    config: Config, embedded: Tensor, batches: Sequence[Batch], count: int, by_angle: bool, tally: Tally, world: World
) -> Tensor:
    """This rank's part of the mean over ``count`` samples, those of all ranks, which are each other's negatives.

    ``embedded``: of ``batches``. Texts that are the same, on whatever rank, are no negatives.
    """
    among = {"alone": world.mesh is None, "copies": world.tokens.count}
    everywhere, first = all_rows(embedded, **among)
    own_keys = [document_keys(b.shards.whole(b.tokens), **b.places) for b in batches]
    keys, _ = all_rows(torch.cat(own_keys), **among)
    how = {"temperature": config.temperature, "symmetric": config.symmetric, "dims": config.matryoshka_dims}
    losses = contrastive(embedded, everywhere, first, keys=keys, by_angle=by_angle, **how)
    same = repeated(keys[:, :2], first, len(embedded))
    own = ranks_of_own(embedded[:, 0], everywhere[:, 1], first, left_out=same, by_angle=by_angle)
    tally.add(loss=losses, recall_at_1=own == 1, mrr=1 / own)
    return losses.sum() / count


@torch.no_grad()
def evaluate_search(
    config: Config, model: Decoder, embedder: Embedder, loader: Loader, tally: Tally, world: World
) -> Row:
    """Of each held-out query, how it finds its own among the documents of all; of all ranks."""
    model.eval()
    batches = list(one_epoch(loader, world.device))
    embedded = torch.cat([embed(model, embedder.pooling, batch) for batch in batches])
    model.train()
    mean_loss(config, embedded, batches, 1, embedder.by_angle, tally, world)
    return tally.row(prefix="eval_")


def main(config: Config) -> None:
    with distributed.init(config.parallel, device=config.device, debug_dir=config.output_dir / "debug") as world:
        set_seed(config.seed)
        about = {"recipe": "embedding_finetune", "checkpoint_dir": config.checkpoint_dir, "device": str(world)}
        with open_run(config.output_dir, dump(config), resume=config.resume, **about) as run:
            train(config, run, world)


def train(config: Config, run: Run, world: World) -> None:
    tokenizer = tokenizers.load(config.checkpoint_dir)
    embedder = read_embedder(config.checkpoint_dir).choose(pooling=config.pooling, similarity=config.similarity)
    with main_first():  # the others find its tokens in the cache
        samples, held_out, summary = build_texts(config, tokenizer, embedder.settings_of_texts())

    base = state.base_fingerprint(config.checkpoint_dir)
    saved = checkpoint.latest(run.path, run.id, base=base)
    keep = saved.read("plan") if saved else None
    model = build_model(config, world.device)
    embedder = embedder.choose(pooling=embedder.pooling or ("mean" if isinstance(model, Encoder) else "last"))
    trial_head = lambda hidden, _: hidden.float().square()  # noqa: E731  the loss is nothing beside the model
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
    optimizer = config.optimizer.build(param_groups(model))
    state.check_savable(optimizer)
    plan = settle(
        model, found, lambda tokens, _, positions: model(tokens, positions, trial_head).sum(), keep=keep, **shape
    )
    one_shape = config.compile or config.parallel.ep > 1
    how = {"batch_size": plan.rows, "seed": config.seed, "packed": config.packed, "one_shape": one_shape}
    how |= {"rank": world.data_rank, "num_ranks": world.data_size, "shards": world.tokens}
    micro_steps = config.gradient_accumulation_steps * (config.batch_size // plan.rows)
    routing.begin(micro_steps=micro_steps)
    loader = Prefetch(Loader(samples, **how), world.device, depth=2 * micro_steps)
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
    facts = {"pooling": embedder.pooling, "data": str(summary)}
    facts |= run_facts(model, plan, device=f"{world}, {config.dtype}", **sizes)
    console = Console(quiet=not is_main())
    first_panel(console, "Embeddings", facts, judged_tokens(loader.samples[0], tokenizer), what="end a text")
    from_main(partial(check_space, run.path, 3 * plan.memory.gradients * world.shards, copies=config.keep_last + 2))

    metrics = MetricsFile(run.path / "metrics.jsonl", resume_step=step)
    about = {"run_id": run.id, "output_dir": run.path, "config": redact_tree(plain(config))}
    trackers = Loggers(partial(node.build, **about) for node in config.metric_loggers if is_main())
    meter = Meter(world.device, flops_per_token=training_flops(model, seq_len=summary.tokens // summary.samples))
    tally, eval_tally = Tally(world, ("recall_at_1",)), Tally(world, ("loss", "recall_at_1", "mrr"))
    params = [p for p in model.parameters() if p.requires_grad]
    guard = Guard(config.guard)
    if eval_loader and step == 0:
        metrics.write({"step": 0, **evaluate_search(config, model, embedder, eval_loader, eval_tally, world)})
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
            count = sum(batch.all_samples for batch in window)  # of all ranks
            world.begin_step(step)
            lr = float(optimizer.param_groups[0]["lr"])

            how_many = {"batches": window, "count": count, "by_angle": embedder.by_angle}
            of_all = partial(mean_loss, config, **how_many, tally=tally, world=world)
            own_loss = backward_together(window, partial(embed, model, embedder.pooling), of_all)
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
                        row |= evaluate_search(config, model, embedder, eval_loader, eval_tally, world)
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
    texts = (config.dataset or config.datasets[0]).with_defaults(embedder.settings_of_texts()).args
    prompts = {name: str(texts.get(f"{name}_prompt", "")) for name in ("query", "document")}
    trained = replace(embedder, prompts=embedder.prompts | prompts, max_seq_len=int(texts.get("text_len", 128)))
    save_modules(export, trained, dim=model.config.dim, pad_token=tokenizer.decode([tokenizer.pad_id]))
    where = results(metrics.path, export=f"{export}")
    last_panel(console, "Done", where, {})


if __name__ == "__main__":
    start(main, Config, recipe="embedding_finetune")
