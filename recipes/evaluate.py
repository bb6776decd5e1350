"""How good a model is: perplexity, exact match and multiple choice on your files, and tasks of the lm-eval harness.

    tune run evaluate checkpoint_dir=out/my_run/export perplexity.source=held_out.jsonl exact_match.source=exam.jsonl
    tune run --nproc-per-node 4 evaluate checkpoint_dir=... perplexity.source=held_out.jsonl     # rows shared out
    tune run evaluate checkpoint_dir=Llama-3.2-1B multiple_choice.source=questions.jsonl "tasks=[hellaswag, arc_easy]"
    python recipes/evaluate.py --config my.yaml

To change it: `tune cp evaluate my_recipe.py`, then `tune run my_recipe.py --config ...`.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch

from torchft.adapters.fp8 import FP8Config
from torchft.adapters.nf4 import NF4Config
from torchft.cli.run import start
from torchft.config import Component, Folder, Kind, Range
from torchft.data.conversations import conversations
from torchft.data.loader import Loader
from torchft.data.mixture import mix
from torchft.data.prefetch import one_epoch
from torchft.data.prompts import prompts
from torchft.errors import UserError
from torchft.files import atomic_write
from torchft.generation.compiled import Compile
from torchft.generation.exact_match import ExactMatchConfig, answer_among_ranks, share_right
from torchft.generation.loaded import load
from torchft.generation.multiple_choice import MultipleChoiceConfig, continuation_logps, pick, right_choice
from torchft.losses.likelihood import nll_sum
from torchft.modules.decoder import Decoder
from torchft.ranks import gather, is_main
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.training import distributed
from torchft.training.console import Console, last_panel
from torchft.training.distributed import ParallelConfig, World

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Dataset = Annotated[Component, Kind("dataset", supplied=("tokenizer", "seq_len"), default="torchft.data.datasets.auto")]


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint_dir: Annotated[Path, Folder(exists=True)]  # a Hub folder: family, sizes, tokenizer and chat format
    adapter: Annotated[Path, Folder(exists=True)] | None = None  # a PEFT folder
    output: Path | None = None  # a .json file for the results; null: only the screen
    chat_format: str | None = None  # instead of the checkpoint's own template: llama2, llama3, or a .jinja file

    # What is measured
    perplexity: Dataset | None = None  # of the tokens that training would learn from
    exact_match: ExactMatchConfig | None = None  # held-out conversations whose last answer is decoded and compared
    multiple_choice: MultipleChoiceConfig | None = None  # which of the written answers is the likeliest
    tasks: list[str] = field(default_factory=list)  # of EleutherAI's harness (extra `eval`), by its own names
    num_fewshot: Annotated[int, Range(min=0)] | None = None  # examples before each question of a task
    limit: Annotated[int, Range(min=1)] | None = None  # questions of a task

    # How
    seq_len: Annotated[int, Range(min=2)] = 2048  # tokens
    batch_size: Annotated[int, Range(min=1)] = 8  # rows computed together
    num_slots: Annotated[int, Range(min=1)] = 64  # answers of tasks that are decoded together
    compile: Compile = "auto"  # torch.compile the decoding of tasks: a slower start, faster answers; auto: on a GPU
    nf4: NF4Config | None = None  # weights in 4 bits; `nf4: {}`
    fp8: FP8Config | None = None  # or in 8, on GPUs that have them; `fp8: {}`
    dtype: Literal["bf16", "fp32"] = "bf16"
    device: str = "auto"  # auto takes the accelerator if there is one
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # tp ranks split a model; others have one each

    def conflicts(self) -> Iterator[str]:
        if self.nf4 and self.fp8:
            yield "nf4, fp8: the weights have one format; leave one of the sections out"
        if not (self.perplexity or self.exact_match or self.multiple_choice or self.tasks):
            yield "nothing is measured: give perplexity, exact_match, multiple_choice or tasks"
        if self.parallel.cp * self.parallel.ep > 1:
            yield "parallel: cp and ep are for training; tp splits a model that is too large for a device"


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


def choices(config: MultipleChoiceConfig, model: Decoder, tokenizer: Tokenizer, world: World) -> float:
    """The share of questions whose right answer is the likeliest, 0 to 1; each rank asks a part of them."""
    pairs, questions = [], []
    for prompt in prompts(config.source, max_rows=config.max_rows)[world.data_rank :: world.data_size]:
        texts = prompt.values.get("choices")
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"{prompt.where}: 'choices' must list at least two answers, text")
        context = tokenizer.render(prompt.messages, add_generation_prompt=True).tokens
        answers = [tokenizer.encode(text, control=False) for text in texts]
        pairs += [(context, answer) for answer in answers]
        questions.append((texts, [len(a) for a in answers], right_choice(prompt.values["answer"], texts, prompt.where)))
    logps = iter([logp for logp, _ in continuation_logps(model, pairs, batch_size=config.batch_size)])
    right = 0
    for texts, lengths, answer in questions:
        right += pick([next(logps) for _ in texts], texts, lengths, config.normalise) == answer
    of_ranks = gather((right, len(questions)))
    return sum(right for right, _ in of_ranks) / sum(number for _, number in of_ranks)


def main(config: Config) -> None:
    with distributed.init(config.parallel, device=config.device) as world:
        if world.size > 1 and config.tasks:
            raise UserError("tasks: the harness runs in one process; start them without torchrun", is_shared=True)
        model, tokenizer = load(
            config.checkpoint_dir,
            adapter=config.adapter,
            chat_format=config.chat_format,
            nf4=config.nf4,
            fp8=config.fp8,
            dtype=DTYPES[config.dtype],
            device=world.device,
            tp_mesh=world.tp_mesh,
            tokens=world.tokens,
        )
        found: dict[str, float] = {}
        if config.perplexity:
            samples = mix([config.perplexity.build(tokenizer=tokenizer, seq_len=config.seq_len)])
            how = {"batch_size": config.batch_size, "rank": world.data_rank, "num_ranks": world.data_size}
            how |= {"shards": world.tokens}
            nll = evaluate(model, Loader(samples, seed=0, shuffle=False, **how), world)
            found |= {"nll": nll, "perplexity": math.exp(min(nll, 700.0)), "tokens": float(sum(samples.lengths()))}
        model.eval()
        if config.exact_match:
            questions = conversations(config.exact_match.source, max_rows=config.exact_match.max_rows)
            said = answer_among_ranks(model, tokenizer, questions, config.exact_match, tp=world.tokens.tp)
            found["exact_match"] = share_right(said)
        if config.multiple_choice:
            found["multiple_choice"] = choices(config.multiple_choice, model, tokenizer, world)
        if config.tasks:
            try:
                from torchft.generation.lm_eval_model import EngineLM, run_tasks
            except ImportError as e:
                raise UserError(f"tasks: they need {e.name}: pip install 'torchft-recipes[eval]'") from None
            how = {"max_len": config.seq_len, "batch_size": config.batch_size, "num_slots": config.num_slots}
            how |= {"compile": config.compile}
            lm = EngineLM(model, tokenizer, **how)
            found |= run_tasks(lm, config.tasks, num_fewshot=config.num_fewshot, limit=config.limit)
        last_panel(
            Console(quiet=not is_main()), "Evaluation", {name: f"{value:.4f}" for name, value in found.items()}, {}
        )
        if config.output and is_main():
            atomic_write(config.output, json.dumps({"checkpoint_dir": str(config.checkpoint_dir), **found}, indent=1))


if __name__ == "__main__":
    start(main, Config, recipe="evaluate")
