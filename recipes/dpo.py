"""Training on preferences, pairs of answers or single ones: DPO, IPO, SimPO, ORPO, KTO and more, with LoRA if wanted.

    tune run dpo --config demo/dpo                                  # the demo: offline, on two CPU cores
    tune run dpo --config llama3_2/1B_lora_dpo checkpoint_dir=Llama-3.2-1B-Instruct dataset.source=my_pairs.jsonl
    python recipes/dpo.py --config my.yaml loss._component_=torchft.losses.preference.simpo loss.beta=2 loss.gamma=1

To change it: `tune cp dpo my_recipe.py`, then `tune run my_recipe.py --config ...`.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
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
from torchft.adapters.tensor_parallel import split_blocks
from torchft.cli.run import start
from torchft.config import Component, Folder, Kind, Range, dump, plain
from torchft.data.batch import Batch
from torchft.data.loader import Loader
from torchft.data.mixture import mix
from torchft.data.preferences import check_kind
from torchft.data.prefetch import Prefetch, one_epoch
from torchft.data.preview import masked_tokens
from torchft.data.samples import Samples
from torchft.data.stream import Stream, StreamConfig, gather
from torchft.data.stream_loader import open_loader
from torchft.data.summary import Summary, summarise
from torchft.export import save_trained
from torchft.losses.answers import ARGUMENTS, Judged, answer_logps, judge_pairs, judge_singles
from torchft.losses.likelihood import token_logps
from torchft.modules.decoder import Decoder
from torchft.ranks import from_main, is_main, main_first
from torchft.redact import redact_tree
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.training import checkpoint, distributed, state
from torchft.training.compile import compile_blocks
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
from torchft.training.reference import Reference, kl_estimate
from torchft.training.rewards import Rewards
from torchft.training.routing import Routing, RoutingConfig
from torchft.training.run_folder import Run, open_run
from torchft.training.saver import Saver
from torchft.training.schedules import attach, is_due
from torchft.training.seed import load_rng_state, set_seed
from torchft.training.sharing import Sharing, share_pairs
from torchft.training.trial import by_head, out_of_memory_explained, settle
from torchft.training.usage import commands

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Dataset = Annotated[
    Component, Kind("preferences", supplied=("tokenizer", "seq_len"), default="torchft.data.preferences.auto")
]


@dataclass(frozen=True, kw_only=True)
class Config:
    # What is trained, and where it goes
    checkpoint_dir: Annotated[Path, Folder(exists=True)]  # a Hub folder: family, sizes, tokenizer and chat format
    output_dir: Annotated[Path, Folder(writable=True)]  # checkpoints, metrics, export/
    export: list[Literal["adapter", "merged"]] = field(default_factory=lambda: ["adapter", "merged"])
    export_dtype: Literal["bf16", "fp32"] = "bf16"  # of the weights in export/

    # Method
    loss: Annotated[Component, Kind("preference_loss", offered=ARGUMENTS)] = Component(
        "torchft.losses.preference.dpo", {"beta": 0.1}
    )
    reference_dir: Annotated[Path, Folder(exists=True)] | None = None  # null: checkpoint_dir, with LoRA for free
    precompute_reference: bool = False  # its log-probabilities before training, kept for later runs
    rpo_alpha: Annotated[float, Range(min=0)] = 0.0  # weight of the chosen answers' NLL per token, added to the loss
    ld_alpha: Annotated[float, Range(min=0, max=1)] | None = None  # weight of tokens beyond the other answer's length
    wpo: bool = False  # weight pairs by how likely the policy itself would write them

    # Data
    dataset: Dataset | None = None
    datasets: list[Dataset] = field(default_factory=list)  # or several, each with a weight and a stage if wanted
    streaming: StreamConfig | None = None  # read and tokenise while training, for large data; `streaming: {}`
    chat_format: str | None = None  # instead of the checkpoint's own template: llama2, llama3, or a .jinja file
    dataset_eval: Dataset | None = None  # held out: measured every eval_every steps and at the end
    seq_len: Annotated[int, Range(min=2)] = 2048  # tokens per row; a pair, with its prompt twice, fits or is left out
    packed: bool = False  # several pairs per row: no padding, same gradients
    share_prompts: Sharing = "auto"  # a pair's prompt is computed once; auto: in packed rows, if it saves a sixth
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
        "torch.optim.AdamW", {"lr": 5e-6, "weight_decay": 0.0, "fused": True}
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
        if self.streaming and (self.loss.takes("kl") or not self.max_steps):
            yield "streaming: a stream has no end; say in max_steps when to stop, and take a loss without a KL estimate"
        if (self.nf4 or self.fp8) and (not self.lora or (self.nf4 and self.fp8)):
            yield "nf4, fp8: the base has one format, which is frozen; leave one of the sections out, and add lora"
        yield from self.routing.problems(frozen=self.lora is not None)
        if self.eval_every and not self.dataset_eval:
            yield "eval_every: there is nothing to evaluate; give dataset_eval"
        if not self.export:
            yield "export: nothing would be left of the run; name adapter, merged or both"
        if self.loss.takes("is_desirable") and (self.rpo_alpha or self.ld_alpha is not None or self.wpo):
            yield "rpo_alpha, ld_alpha, wpo: they are for pairs, and this loss is for single answers"
        if self.rpo_alpha and self.ld_alpha is not None:
            yield "rpo_alpha: the likelihood of a whole answer, which ld_alpha does not give; leave one of them out"
        if self.precompute_reference and (self.streaming or self.loss.takes("kl")):
            yield "precompute_reference: what streams or KL estimates ask is not known before training; leave it out"
        if not self.has_reference and (self.reference_dir or self.precompute_reference):
            yield "reference_dir, precompute_reference: this loss has no reference; leave them out"

    @property
    def has_reference(self) -> bool:
        return self.loss.takes("reference_logps") or self.loss.takes("reference_chosen_logps")


def build_model(config: Config, device: torch.device) -> Decoder:
    model = models.build(models.config_json(config.checkpoint_dir)).to(DTYPES[config.dtype])  # on meta: no memory yet
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


def judge(config: Config, model: Decoder, reference: Reference, batch: Batch, kl: Tensor | None) -> Judged:
    """The loss of each sample, and the rewards of its answers."""
    known = reference.logps(batch)
    how = {"shards": batch.shards, "ld_alpha": config.ld_alpha, "collisions": config.wpo}
    head = partial(answer_logps, **batch.answers, **how)
    policy = model(batch.tokens, batch.positions, documents=batch.documents, head=head)
    if batch.is_good is not None:
        return judge_singles(config.loss.call, policy, known, is_desirable=batch.is_good[:, 0], kl=kl)
    return judge_pairs(config.loss.call, policy, known, **batch.answers, rpo_alpha=config.rpo_alpha)


@torch.no_grad()
def evaluate_answers(config: Config, model: Decoder, reference: Reference, loader: Loader, world: World) -> Row:
    """Loss, rewards and wins over all of ``loader``, of all ranks."""
    model.eval()
    rewards, kto = Rewards(world), {"samples": loader.samples, "world": world, "packed": config.packed}
    for batch in one_epoch(loader, world.device):
        kl = kl_estimate(model, reference, [batch], **kto) if config.loss.takes("kl") else None
        rewards.add(*judge(config, model, reference, batch, kl), batch.is_good)
    model.train()
    return rewards.row(prefix="eval_", with_loss=True)


def main(config: Config) -> None:
    with distributed.init(config.parallel, device=config.device, debug_dir=config.output_dir / "debug") as world:
        set_seed(config.seed)
        about = {"recipe": "dpo", "checkpoint_dir": config.checkpoint_dir, "device": str(world)}
        with open_run(config.output_dir, dump(config), resume=config.resume, **about) as run:
            train(config, run, world)


def train(config: Config, run: Run, world: World) -> None:
    tokenizer = tokenizers.load(config.checkpoint_dir, chat_format=config.chat_format)
    with main_first():  # the others find its tokens in the cache
        samples, held_out, summary = build_data(config, tokenizer)
    check_kind(samples, pairs=not config.loss.takes("is_desirable"), why=config.loss.name)

    base = state.base_fingerprint(config.checkpoint_dir)
    saved = checkpoint.latest(run.path, run.id, base=base)
    keep = saved.read("plan") if saved else None
    other = None  # a second model, where the first cannot be its own reference
    if config.has_reference and (config.reference_dir or not (config.lora or config.precompute_reference)):
        frozen = replace(config, checkpoint_dir=config.reference_dir or config.checkpoint_dir, lora=None)
        other = build_model(frozen, world.device).requires_grad_(False)
        load_base(frozen, other, world)
    model = build_model(config, world.device)
    about = {"packed": config.packed, "cp": config.parallel.cp}
    shares_prompts, prompts = share_pairs(config.share_prompts, model, config.routing, samples, **about)
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
        branches=shares_prompts,
        keep=keep,
        **shape,
    )
    load_base(config, model, world, whole=found[0].gathers_once)
    routing = Routing(model, config.routing, sum=world.sum)
    optimizer = config.optimizer.build(param_groups(model))
    state.check_savable(optimizer)
    plan = settle(model, found, by_head(model, token_logps), keep=keep, **shape)
    if other is not None and plan.budget is not None:
        compile_blocks(other, budget=plan.budget)

    how = {"batch_size": plan.rows, "seed": config.seed, "packed": config.packed, "shares_prompts": shares_prompts}
    how |= {"rank": world.data_rank, "num_ranks": world.data_size, "shards": world.tokens}
    how |= {"one_shape": config.compile or config.parallel.ep > 1}
    micro_steps = config.gradient_accumulation_steps * (config.batch_size // plan.rows)
    routing.begin(micro_steps=micro_steps)
    loader = Prefetch(open_loader(samples, **how), world.device, depth=2 * micro_steps)
    eval_loader = Loader(held_out, shuffle=False, **how) if held_out else None
    total_steps = loader.num_steps(micro_steps, epochs=config.epochs, max_steps=config.max_steps)
    reference = eval_reference = Reference(other or model if config.has_reference else None, ld_alpha=config.ld_alpha)
    if config.precompute_reference:
        key = {"base": base, "dtype": config.dtype, "nf4": plain(config.nf4), "fp8": plain(config.fp8)}
        key |= {"base": state.base_fingerprint(config.reference_dir)} if config.reference_dir else {}
        eval_reference = reference.precompute(eval_loader, world, key=key) if eval_loader else reference
        reference, other = reference.precompute(Loader(loader.samples, shuffle=False, **how), world, key=key), None
    step = saved.number if saved else 0
    if saved:
        state.load_parameters(saved.open("model"), state.trainable(model))
        state.load_optimizer(saved.open("optimizer"), model, optimizer, hyperparameters=not run.config_changed)
        loader.load_state_dict(saved.read("loader"))
    schedule = attach(optimizer, config.lr_schedule.build(total_steps=total_steps), step=step)

    rows_per_step = config.batch_size * config.gradient_accumulation_steps * world.data_size
    sizes = {"steps": total_steps, "rows": rows_per_step, "seq_len": config.seq_len, "step": step, "output": run.path}
    facts = {"loss": f"{config.loss.name.rpartition('.')[2]} {config.loss.args}", "data": str(summary)}
    facts |= {"prompts": prompts} | run_facts(model, plan, device=f"{world}, {config.dtype}", **sizes)
    console = Console(quiet=not is_main())
    first_panel(console, "Preference training", facts, masked_tokens(loader.samples[0], tokenizer))
    from_main(partial(check_space, run.path, 3 * plan.memory.gradients * world.shards, copies=config.keep_last + 2))

    metrics = MetricsFile(run.path / "metrics.jsonl", resume_step=step)
    about = {"run_id": run.id, "output_dir": run.path, "config": redact_tree(plain(config))}
    trackers = Loggers(partial(node.build, **about) for node in config.metric_loggers if is_main())
    meter = Meter(world.device, flops_per_token=training_flops(model, seq_len=summary.tokens // summary.samples))
    rewards, kto = Rewards(world), {"samples": loader.samples, "world": world, "packed": config.packed}
    params, guard = [p for p in model.parameters() if p.requires_grad], Guard(config.guard)
    if eval_loader and step == 0:
        metrics.write({"step": 0, **evaluate_answers(config, model, eval_reference, eval_loader, world)})
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
            num_samples = sum(batch.all_samples for batch in window)  # of all ranks
            world.begin_step(step)
            lr = float(optimizer.param_groups[0]["lr"])

            kl = kl_estimate(model, reference, window, **kto) if config.loss.takes("kl") else None
            own_loss = torch.zeros((), device=world.device)
            for batch in window:
                judged = judge(config, model, reference, batch, kl)
                micro_loss = judged.losses.sum() / num_samples  # of the whole window: accumulation changes nothing
                micro_loss.backward()
                own_loss += micro_loss.detach()
                rewards.add(*judged, batch.is_good)
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
            meter.add(loss, tokens=sum(b.num_tokens for b in window), supervised=sum(b.all_supervised for b in window))
            row: Row = {}
            evaluates = is_due(step, config.eval_every, total_steps)
            stops = step < total_steps and bool(asked)  # all ranks alike
            saves = is_due(step, config.save_every, total_steps) or stops
            if evaluates or saves or is_due(step, config.log_every, total_steps):  # no row's mean spans a checkpoint
                row = meter.row(step, lr=lr, grad_norm=grad_norm) | routing.row() | profile | rewards.row()
                row |= {"skipped_steps": guard.skipped} if guard.skipped else {}
                with meter.paused():
                    if evaluates and eval_loader:
                        row |= evaluate_answers(config, model, eval_reference, eval_loader, world)
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
    export, source = run.path / "export", {"checkpoint_dir": config.checkpoint_dir, "tokenizer": tokenizer}
    whole, adapter = "merged" in config.export or not config.lora, bool("adapter" in config.export and config.lora)
    save_trained(model, export, **source, dtype=DTYPES[config.export_dtype], whole=whole, adapter=adapter)
    where = results(metrics.path, export=f"{export}")
    folders = {"model": export if whole else None, "adapter": export / "adapter" if adapter else None}
    last_panel(console, "Done", where, commands(**folders, base=config.checkpoint_dir, question="Hello!"))


if __name__ == "__main__":
    start(main, Config, recipe="dpo")
