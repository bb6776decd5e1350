"""Reinforcement learning from verifiable rewards: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE++; LoRA if wanted.

    tune run grpo --config demo/grpo                                # the demo: offline, on two CPU cores
    tune run grpo --config my.yaml checkpoint_dir=Qwen2.5-1.5B-Instruct prompts.source=gsm8k.jsonl method=dapo
    python recipes/grpo.py --config my.yaml rollout.group_size=16 rollout.sampling.max_new_tokens=1024

To change it: `tune cp grpo my_recipe.py`, then `tune run my_recipe.py --config ...`.
"""

import math
import time
from collections.abc import Iterator
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
from torchft.adapters.lora import LoRAConfig, adapters_off, apply_lora, init_adapters
from torchft.adapters.nf4 import NF4Config, apply_nf4, check_shards
from torchft.adapters.tensor_parallel import split_blocks
from torchft.cli.run import start
from torchft.config import Component, Folder, Kind, Range, dump, plain
from torchft.export import save_trained
from torchft.losses.likelihood import token_logps
from torchft.losses.policy import METHODS, grpo, kl, overlong_penalty, token_weights, truncated_weights
from torchft.modules.decoder import Decoder
from torchft.ranks import from_main, is_main
from torchft.redact import redact_tree
from torchft.rl.batch import Rows, advantages, count_totals, countable, micro_batches, rows
from torchft.rl.collect import RolloutConfig, Rollouts
from torchft.rl.curves import Curves, cut_samples, rollout_row, write_samples
from torchft.rl.shared_row import chosen_logps, filled, saved_by_sharing, shared_rows
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
from torchft.training.metrics import MetricsFile, Row, draw_loss, measures, read_rows, results
from torchft.training.optim import clip_grad_norm, param_groups
from torchft.training.optimizer_memory import optimizer_bytes
from torchft.training.profile import ProfileConfig, profiled
from torchft.training.recompute import plans
from torchft.training.routing import Routing, RoutingConfig
from torchft.training.run_folder import Run, open_run
from torchft.training.saver import Saver
from torchft.training.schedules import attach, is_due
from torchft.training.seed import load_rng_state, set_seed
from torchft.training.sharing import Sharing, check_shareable, pays
from torchft.training.trial import by_head, out_of_memory_explained, settle
from torchft.training.usage import commands

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Prompts = Annotated[Component, Kind("prompts", default="torchft.data.prompts.prompts")]


@dataclass(frozen=True, kw_only=True)
class Config:
    # What is trained, and where it goes
    checkpoint_dir: Annotated[Path, Folder(exists=True)]  # a Hub folder: family, sizes, tokenizer and chat format
    output_dir: Annotated[Path, Folder(writable=True)]  # checkpoints, metrics, samples.jsonl, export/
    export: list[Literal["adapter", "merged"]] = field(default_factory=lambda: ["adapter", "merged"])
    export_dtype: Literal["bf16", "fp32"] = "bf16"  # of the weights in export/

    # Method
    method: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = (
        "grpo"  # how rewards become advantages, what is clipped, what divides the loss: losses/policy.py
    )
    clip_low: Annotated[float, Range(above=0)] | None = None  # a ratio's distance below 1; null: the method's
    clip_high: Annotated[float, Range(above=0)] | None = None  # and above
    kl_coef: Annotated[float, Range(min=0)] = 0.0  # weight of KL(policy || reference); with LoRA the reference is free
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    importance_cap: Annotated[float, Range(above=0)] | None = 2.0  # of a token's weight, trainer / engine probability;
    # null: their mismatch is only reported
    passes: Annotated[int, Range(min=1)] = 1  # over the answers of a step
    mini_batches: Annotated[int, Range(min=1)] = 1  # optimizer steps in a pass
    overlong_buffer: Annotated[int, Range(min=1)] | None = None  # tokens before the limit of all turns: the reward
    # falls by 1 there
    skip_truncated: bool = False  # answers that were cut at the limit teach nothing

    # Prompts, answers, rewards
    prompts: Prompts
    prompts_eval: Prompts | None = None  # held out: answered greedily before and after, and every eval_every steps
    rollout: RolloutConfig
    chat_format: str | None = None  # instead of the checkpoint's own template: llama2, llama3, or a .jinja file
    seq_len: Annotated[int, Range(min=2)] = 2048  # tokens of prompt and answer together
    batch_size: Annotated[int, Range(min=1)] = 8  # answers per device and micro-step
    share_prompts: Sharing = "auto"  # a group's prompt is computed once; auto: in steps where it saves a sixth
    epochs: Annotated[int, Range(min=1)] = 1
    max_steps: Annotated[int, Range(min=1)] | None = None  # rollouts with their updates, if fewer than the epochs have

    # Model
    lora: LoRAConfig | None = None  # null: all weights are trained; `lora: {}` trains adapters
    fp8: FP8Config | None = None  # the frozen base in 8 bits, much faster on GPUs that have them; `fp8: {}`
    nf4: NF4Config | None = None  # QLoRA: the frozen base in 4 bits; `nf4: {}` is all it needs
    dtype: Literal["bf16", "fp32"] = "bf16"  # of weights and computation; adapters are fp32
    device: str = "auto"  # auto takes the accelerator if there is one
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # how several processes share the work
    routing: RoutingConfig = field(default_factory=RoutingConfig)  # of a mixture of experts: how even its load is kept
    compile: bool = False  # torch.compile each block: faster updates, a slower first one
    recompute: Literal["none", "auto", "full"] | Annotated[float, Range(min=0, max=1)] = "auto"  # activations computed
    # again in backward instead of kept: a number is the share kept; auto measures and takes the fastest that fits
    offload_activations: bool | Annotated[float, Range(min=0, max=1)] = False  # wait in host memory for backward, all
    # that is kept or a share; auto does it if recomputing more would be slower

    # Optimisation
    optimizer: Annotated[Component, Kind("optimizer", supplied=("params",))] = Component(
        "torch.optim.AdamW", {"lr": 1e-6, "weight_decay": 0.0, "fused": True}
    )
    lr_schedule: Annotated[Component, Kind("lr_schedule", supplied=("total_steps",))] = Component(
        "torchft.training.schedules.constant", {}
    )
    clip_grad_norm: Annotated[float, Range(above=0)] | None = 1.0  # total 2-norm; null: no clipping
    guard: GuardConfig = field(default_factory=GuardConfig)  # what happens when a step is not finite or the loss leaps
    seed: Annotated[int, Range(min=0, max=2**30)] = 0

    # Reports and checkpoints
    log_every: Annotated[int, Range(min=1)] = 1  # steps
    eval_every: Annotated[int, Range(min=1)] | None = None  # steps; null: only at the end
    save_every: Annotated[int, Range(min=1)] | None = None  # steps; null: only at the end
    keep_last: Annotated[int, Range(min=1)] = 2  # step folders kept, besides the best by held-out reward
    resume: Literal["auto", "accept_changes", "never"] = "auto"  # auto: go on from this run's newest whole checkpoint
    profile: ProfileConfig | None = None  # what the devices do in a few steps, as files; `profile: {}`
    metric_loggers: list[Annotated[Component, Kind("metric_logger", supplied=("run_id", "output_dir", "config"))]] = (
        field(default_factory=list)
    )

    def conflicts(self) -> Iterator[str]:
        if self.nf4 and self.fp8:
            yield "nf4, fp8: the base has one format; leave one of the sections out"
        if (self.nf4 or self.fp8) and not self.lora:
            yield "nf4, fp8: a base in 4 or 8 bits is frozen; add a lora section to train"
        if self.lora and self.lora.dropout:
            yield "lora.dropout: answers are drawn without it, and ratios of probabilities would be noise; leave it 0"
        yield from self.rollout.problems(self.seq_len)
        if self.parallel.ep > 1:
            yield "parallel.ep: answers are generated by models with all experts; use shard, replicate, tp or cp"
        if self.rollout.group_size < 2 and self.method != "reinforce_pp":
            yield "rollout.group_size: an answer is judged against others to its prompt, so at least 2"
        if self.overlong_buffer and self.overlong_buffer > self.rollout.max_tokens:
            yield "overlong_buffer: more than an answer's tokens, so that every answer would be penalised"
        if self.rollout.episodes_per_step % self.mini_batches:
            yield "mini_batches: they do not divide rollout.prompts_per_step x group_size"
        yield from self.routing.problems(frozen=self.lora is not None)
        if self.eval_every and not self.prompts_eval:
            yield "eval_every: there is nothing to evaluate; give prompts_eval"


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


@torch.no_grad()
def known_logps(model: Decoder, batches: list[list[Rows]], temperature: float) -> list[list[Tensor]]:
    """Log-probabilities [b, s] of what was chosen in each micro-batch."""
    return [[chosen_logps(model, batch, temperature=temperature)[0] for batch in own] for own in batches]


def main(config: Config) -> None:
    with distributed.init(config.parallel, device=config.device, debug_dir=config.output_dir / "debug") as world:
        set_seed(config.seed)
        about = {"recipe": "grpo", "checkpoint_dir": config.checkpoint_dir, "device": str(world)}
        with open_run(config.output_dir, dump(config), resume=config.resume, **about) as run:
            train(config, run, world)


def train(config: Config, run: Run, world: World) -> None:
    tokenizer = tokenizers.load(config.checkpoint_dir, chat_format=config.chat_format)
    prompts = config.prompts.build()
    questions = config.prompts_eval.build() if config.prompts_eval else []
    method, sampling = METHODS[config.method], config.rollout.sampling
    bounds = {"clip_low": config.clip_low or method.clip_low, "clip_high": config.clip_high or method.clip_high}
    method = replace(method, **bounds)

    base = state.base_fingerprint(config.checkpoint_dir)
    saved = checkpoint.latest(run.path, run.id, base=base)
    keep = saved.read("plan") if saved else None
    other = None  # a second model, where the first cannot be its own reference
    if config.kl_coef and not config.lora:
        other = build_model(config, world.device).requires_grad_(False)
        load_base(config, other, world)
    model = build_model(config, world.device)
    shape = {"seq_len": world.tokens.share(config.seq_len), "packed": False, "device": world.device}
    rows_per_update = config.rollout.episodes_per_step // (world.data_size * config.mini_batches)
    found = plans(
        model,
        recompute=config.recompute,
        offload=config.offload_activations,
        compiled=config.compile,
        rows=min(config.batch_size, rows_per_update),
        optimizer_bytes=optimizer_bytes(config.optimizer.build, param_groups(model), device=world.device),
        accumulation=math.ceil(rows_per_update / config.batch_size),
        shards=world.shards,
        reshard=world.reshard,
        keep=keep,
        **shape,
    )
    can_share = check_shareable(config.share_prompts, model, config.routing, cp=world.tokens.cp)
    load_base(config, model, world, whole=found[0].gathers_once)
    routing = Routing(model, config.routing, sum=world.sum)
    optimizer = config.optimizer.build(param_groups(model))
    state.check_savable(optimizer)
    plan = settle(model, found, by_head(model, token_logps), keep=keep, **shape)
    if other is not None and plan.budget is not None:
        compile_blocks(other, budget=plan.budget)

    routing.begin(micro_steps=math.ceil(rows_per_update / plan.rows))
    source = {"checkpoint_dir": config.checkpoint_dir, "tokenizer": tokenizer}
    publish = partial(save_trained, model, run.path / "server", **source, dtype=DTYPES[config.dtype])
    sizes = {"seq_len": config.seq_len, "seed": config.seed, "world": world}
    rollouts = Rollouts(config.rollout, model, tokenizer, prompts, **sizes, publish=publish)
    total_steps = rollouts.num_steps(epochs=config.epochs, max_steps=config.max_steps)
    updates = config.passes * config.mini_batches  # of a step
    step = 0
    if saved:
        step = saved.number
        state.load_parameters(saved.open("model"), state.trainable(model))
        state.load_optimizer(saved.open("optimizer"), model, optimizer, hyperparameters=not run.config_changed)
        rollouts.loader.load_state_dict(saved.read("loader"))
    schedule = attach(optimizer, config.lr_schedule.build(total_steps=total_steps * updates), step=step * updates)

    answers = config.rollout.episodes_per_step
    sizes = {"steps": total_steps, "rows": answers, "seq_len": config.seq_len, "step": step, "output": run.path}
    facts = {"prompts": f"{len(prompts):,}, {len(questions):,} held out", "method": f"{config.method}: {method}"}
    facts |= run_facts(model, plan, device=f"{world}, {config.dtype}", **sizes)
    console = Console(quiet=not is_main())
    first_panel(console, "Reinforcement learning", facts, ())
    from_main(partial(check_space, run.path, 3 * plan.memory.gradients * world.shards, copies=config.keep_last + 2))

    metrics = MetricsFile(run.path / "metrics.jsonl", resume_step=step)
    cut_samples(run.path / "samples.jsonl", resume_step=step)
    about = {"run_id": run.id, "output_dir": run.path, "config": redact_tree(plain(config))}
    trackers = Loggers(partial(node.build, **about) for node in config.metric_loggers if is_main())
    meter = Meter(world.device, flops_per_token=training_flops(model, seq_len=config.seq_len))
    params, guard = [p for p in model.parameters() if p.requires_grad], Guard(config.guard)
    groups = {"group_size": config.rollout.group_size, "copies": world.tokens.count}  # ranks that have the same rows
    row: Row = {}
    if step == 0 and questions:
        row = rollouts.held_out(questions)
        metrics.write({"step": 0, **row})
        console.print(f"held out, before: {measures(row)}")
    if saved:
        guard.load_state_dict(saved.read("guard"))
        load_rng_state(saved.read_own("rng"))  # last: what stands above draws random numbers

    with (
        Steps(console, total_steps, start=step) as progress,
        out_of_memory_explained(plan),
        Interruptible() as stop,
        Saver(run.path, run.id, base=base, keep_last=config.keep_last, own=("rng",)) as saver,
        profiled(config.profile, run.path / "profile") as end_of_step,
    ):
        while step < total_steps:
            world.begin_step(step)
            began = time.perf_counter()
            episodes, scores = rollouts.next()
            rollout_s = time.perf_counter() - began
            rewards, lengths = scores.total, torch.tensor([episode.num_chosen for episode in episodes])
            if config.overlong_buffer:
                limit = {"max_tokens": config.rollout.max_tokens, "buffer": config.overlong_buffer}
                rewards = rewards + overlong_penalty(lengths, **limit)
            group_size = config.rollout.group_size
            judged = advantages(rewards, group_size=group_size, baseline=method.advantages, world=world)
            counts = countable(episodes, rewards, skip_truncated=config.skip_truncated)
            saved_tokens = saved_by_sharing(episodes, counts, group_size=group_size, world=world)
            shares = can_share and pays(config.share_prompts, saved_tokens)
            parts = micro_batches(
                len(episodes),
                mini_batches=config.mini_batches,
                batch_size=plan.rows,
                lengths=None if shares else [len(e.tokens) * counted for e, counted in zip(episodes, counts)],
            )
            how = {"pad_id": tokenizer.pad_id, "length": config.seq_len if config.compile else None}
            if shares and config.compile:  # as many answers as rows of one shape hold
                how["room"] = plan.rows * config.seq_len
                parts = filled(parts, episodes, counts, room=how["room"])
            make = partial(shared_rows if shares else rows, episodes, scores=judged, counts=counts, **how)
            batches = [[make(numbers).to(world.device) for numbers in part] for part in parts]
            reference = old = None
            if config.kl_coef:
                with adapters_off(other or model):
                    reference = known_logps(other or model, batches, sampling.temperature)
            if updates > 1:
                old = known_logps(model, batches, sampling.temperature)

            curves = Curves(world, importance_cap=config.importance_cap)
            for update in range(updates):
                k = update % config.mini_batches
                totals = count_totals(batches[k], max_tokens=config.rollout.max_tokens, world=world)
                lr = float(optimizer.param_groups[0]["lr"])
                own_loss = torch.zeros((), device=world.device)
                for i, batch in enumerate(batches[k]):
                    logps, entropy = chosen_logps(model, batch, temperature=sampling.temperature)
                    before = old[k][i] if old else logps.detach()  # of the weights that generated
                    losses, clipped = grpo(logps, before, batch.scores, batch.mask, method=method)
                    if cap := config.importance_cap:
                        losses = losses * truncated_weights(before, batch.sampler_logps, batch.mask, cap=cap)
                    known = reference[k][i] if reference else None
                    if known is not None:
                        losses = losses + config.kl_coef * kl(logps, known, config.kl_estimator)
                    micro_loss = (token_weights(batch.mask, method.normalizer, totals) * losses).sum()
                    micro_loss.backward()
                    own_loss += micro_loss.detach()
                    how_far = {"clipped": clipped, "before": before, "reference": known}
                    curves.add(batch, logps.detach(), entropy=entropy.detach(), **how_far)
                loss, asked = world.sum(torch.stack([own_loss, torch.full_like(own_loss, stop.asked)]))
                grad_norm = clip_grad_norm(params, config.clip_grad_norm)
                places = [place for batch in batches[k] for place in batch.where]
                if guard.allows(step + 1, loss=loss, grad_norm=grad_norm, model=model, rows=places, own_loss=own_loss):
                    optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                routing.end_of_step()
                computed = sum(b.num_computed for b in batches[k]) // world.tokens.count
                meter.add(loss, tokens=computed, supervised=totals.tokens // world.tokens.count)
            step += 1

            profile = end_of_step()
            evaluates = bool(questions) and is_due(step, config.eval_every, total_steps)
            stops = step < total_steps and bool(asked)  # all ranks alike
            saves = is_due(step, config.save_every, total_steps) or stops
            row = {}
            if evaluates or saves or is_due(step, config.log_every, total_steps):  # no row's mean spans a checkpoint
                row = meter.row(step, lr=lr, grad_norm=grad_norm) | routing.row() | curves.row() | rollouts.row()
                row |= profile | {"rollout_s": rollout_s} | rollout_row(episodes, scores, **groups)
                row |= {"shared_tokens": saved_tokens} if shares else {}
                row |= {"skipped_steps": guard.skipped} if guard.skipped else {}
                write_samples(run.path / "samples.jsonl", step, episodes, scores)
                if evaluates:
                    with meter.paused():
                        row |= rollouts.held_out(questions)
                metrics.write(row)
                trackers.log(step, row)
                progress.update(step, row)
            if saves:
                with meter.paused():
                    others = {"loader": rollouts.loader.state_dict(), "guard": guard.state_dict()}
                    parts = state.everything(model, optimizer, **others, plan=plan.setting)
                    saver.save(step, parts, score=-row["eval_reward"] if "eval_reward" in row else None)
                    draw_loss(read_rows(metrics.path), run.path / "loss.png", title=run.path.name)
            if stops:
                saver.wait()
                ended = f"Stopped after step {step}; the same command goes on from there"
                last_panel(console, ended, {"output": str(run.path)}, {})
                raise Stopped
    metrics.close()
    trackers.close()

    export, adapter = run.path / "export", "adapter" in config.export and config.lora is not None
    whole = "merged" in config.export or not config.lora
    save_trained(model, export, **source, dtype=DTYPES[config.export_dtype], whole=whole, adapter=adapter)
    where = results(metrics.path, export=f"{export}", samples=f"{run.path / 'samples.jsonl'}")
    folders = {"model": export if whole else None, "adapter": export / "adapter" if adapter else None}
    question = questions[0].messages[-1]["content"] if questions else "Hello!"
    last_panel(console, "Done", where, commands(**folders, base=config.checkpoint_dir, question=question))


if __name__ == "__main__":
    start(main, Config, recipe="grpo")
