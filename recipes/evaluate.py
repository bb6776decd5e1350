"""How good a model is: perplexity, exact match and multiple choice on your files, and tasks of the lm-eval harness.

    tune run evaluate checkpoint_dir=out/my_run/export perplexity.source=held_out.jsonl exact_match.source=exam.jsonl
    tune run --nproc-per-node 4 evaluate checkpoint_dir=... perplexity.source=held_out.jsonl     # rows shared out
    tune run evaluate checkpoint_dir=Llama-3.2-1B multiple_choice.source=questions.jsonl "tasks=[hellaswag, arc_easy]"
    python recipes/evaluate.py --config my.yaml

To change it: `tune cp evaluate my_recipe.py`, then `tune run my_recipe.py --config ...`.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from torchft.adapters.fp8 import FP8Config
from torchft.adapters.nf4 import NF4Config
from torchft.cli.run import start
from torchft.config import Component, Folder, Kind, Range
from torchft.data.builder import Dataset as DataOfConfig
from torchft.data.collect import make
from torchft.data.loader import Loader
from torchft.data.mixture import mix
from torchft.data.prefetch import one_epoch
from torchft.data.prompts import prompts
from torchft.data.summary import summarise
from torchft.errors import UserError, collecting
from torchft.files import atomic_write
from torchft.generation.compiled import Compile
from torchft.generation.exact_match import ExamConfig, answer_among_ranks, share_right
from torchft.generation.loaded import load
from torchft.generation.multiple_choice import (
    MultipleChoiceConfig,
    Question,
    continuation_logps,
    pick,
    question,
    raise_some,
)
from torchft.losses.likelihood import nll_sum
from torchft.modules.decoder import Decoder
from torchft.ranks import from_main, gather, is_main
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.training import distributed
from torchft.training.console import Console, last_panel
from torchft.training.distributed import ParallelConfig, World

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CUT_ANYWHERE = ("torchft.data.datasets.auto", "torchft.data.datasets.tokenized")  # unless too_long says otherwise
Found = tuple[dict[str, float], list[str]]  # numbers by name, and what they are of
Dataset = Annotated[Component, Kind("dataset", supplied=("tokenizer", "seq_len"), default="torchft.data.datasets.auto")]


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint_dir: Annotated[Path, Folder(exists=True)]  # a Hub folder: family, sizes, tokenizer and chat format
    adapter: Annotated[Path, Folder(exists=True)] | None = None  # a PEFT folder
    output: Path | None = None  # a .json file for the results; null: only the screen
    chat_format: str | None = None  # instead of the checkpoint's own template: llama2, llama3, or a .jinja file

    # What is measured
    perplexity: Dataset | None = None  # of the tokens that training would learn from
    exact_match: ExamConfig | None = None  # held-out conversations whose last answer is decoded and compared
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
        if self.output and (problem := Folder(writable=True).problem(self.output.parent)):
            yield f"output: {self.output.parent} {problem}"
        if self.output and self.output.is_dir():
            yield f"output: {self.output} is a folder; name a .json file"


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


def perplexity(config: Config, data: Component, model: Decoder, tokenizer: Tokenizer, world: World) -> Found:
    """Of all tokens that training would learn from: rows that are too long for ``seq_len`` are cut into windows."""
    offered = {"too_long": "split"} if data.name in CUT_ANYWHERE else {}
    dataset = data.with_defaults(offered).build(tokenizer=tokenizer, seq_len=config.seq_len)
    samples = mix([dataset])
    summary = summarise(samples)
    summary.check(vocab_size=model.config.vocab_size, batch_size=1)
    loader = Loader(
        samples,
        batch_size=config.batch_size,
        seed=0,
        shuffle=False,
        rank=world.data_rank,
        num_ranks=world.data_size,
        shards=world.tokens,
    )
    nll = evaluate(model, loader, world)
    dropped = sum(summary.dropped.values())
    lost = tokens_lost(dataset) if summary.truncated or summary.dropped.get("too long") else 0
    far, told = beyond([(n, samples.where(i)) for i, n in enumerate(samples.lengths())], model)
    said = [f"{summary.rows - dropped:,} of {summary.rows:,} rows, {summary.supervised:,} tokens counted"]
    said += [*summary.warnings(), *([f"{lost:,} tokens of too long rows left out"] if lost else []), *told]
    return {
        "nll": nll,
        "perplexity": math.exp(min(nll, 700.0)),
        "tokens": summary.tokens,
        "perplexity_rows": summary.rows - dropped,
        "perplexity_dropped_rows": dropped,
        "perplexity_truncated_rows": summary.truncated,
        "perplexity_split_rows": summary.split,
        "perplexity_lost_tokens": lost,
        "perplexity_beyond_context": far,
    }, said


def tokens_lost(dataset: DataOfConfig) -> int:
    """Tokens of rows longer than ``seq_len`` that are in none of the samples."""
    encode, limits = dataset.encoder(dataset.example()), dataset.limits
    if limits.too_long == "split":  # all that is trained is in one of its pieces
        return 0
    rows = (make(row.values, encode, limits) for row in dataset.rows())
    return sum(row.length - sum(len(s.tokens) for s in row.samples) for row in rows if row.length > limits.seq_len)


def exact_match(config: ExamConfig, model: Decoder, tokenizer: Tokenizer, world: World) -> Found:
    asked = prompts(config.source, max_rows=config.max_rows)
    rule = "the last two messages must be a question and its answer, text"
    is_text = [p.answer.strip() and isinstance(p.messages[-1].get("content"), str) for p in asked]
    raise_some([f"{p.where}: {rule}" for p, fits in zip(asked, is_text) if not fits])
    whole = [[*p.messages, {"role": "assistant", "content": p.answer}] for p in asked]
    said = answer_among_ranks(model, tokenizer, whole, config, tp=world.tokens.tp)
    cut = sum(answer.is_cut for answer in said)
    far, told = beyond([(answer.num_tokens, p.where) for answer, p in zip(said, asked)], model)
    notes = [f"{cut:,} answers cut at max_new_tokens {config.max_new_tokens}"] if cut else []
    counts = {"exact_match_rows": len(said), "exact_match_cut_answers": cut, "exact_match_beyond_context": far}
    return {"exact_match": share_right(said), **counts}, [rows_used(len(said), config.max_rows), *notes, *told]


def multiple_choice(config: MultipleChoiceConfig, model: Decoder, tokenizer: Tokenizer, world: World) -> Found:
    """The share of questions whose right answer is the likeliest, 0 to 1; each rank asks a part of them."""
    questions: list[Question] = []
    problems: list[str] = []
    for p in prompts(config.source, max_rows=config.max_rows):
        with collecting(problems):
            questions.append(question(p.messages, p.values, where=p.where, tokenizer=tokenizer))
    raise_some(problems)
    own = questions[world.data_rank :: world.data_size]
    pairs = [(q.context, answer) for q in own for answer in q.answers]
    logps = iter([logp for logp, _ in continuation_logps(model, pairs, batch_size=config.batch_size)])
    right = 0
    for q in own:
        found, lengths = [next(logps) for _ in q.choices], [len(answer) for answer in q.answers]
        right += pick(found, q.choices, lengths, config.normalise) == q.right
    all_right = sum(gather(right)[:: world.tokens.tp])
    far, told = beyond([(q.num_tokens, q.where) for q in questions], model)
    counts = {"multiple_choice_rows": len(questions), "multiple_choice_beyond_context": far}
    share = all_right / len(questions)
    return {"multiple_choice": share, **counts}, [rows_used(len(questions), config.max_rows), *told]


def known_tasks(config: Config, world: World) -> Any:
    """The harness's tasks, as it keeps them. UserError if it is not installed, or knows one of ``tasks`` not."""
    if world.size > 1:
        raise UserError("tasks: the harness runs in one process; start them without torchrun", is_shared=True)
    try:
        from torchft.generation.lm_eval_model import find_tasks
    except ImportError as e:
        raise UserError(f"tasks: they need {e.name}: pip install 'torchft-recipes[eval]'") from None
    return find_tasks(config.tasks)


def harness(config: Config, tasks: Any, model: Decoder, tokenizer: Tokenizer) -> Found:
    from torchft.generation.lm_eval_model import EngineLM, run_tasks

    how = {"max_len": config.seq_len, "batch_size": config.batch_size, "num_slots": config.num_slots}
    lm = EngineLM(model, tokenizer, **how, compile=config.compile)
    found = run_tasks(lm, config.tasks, tasks, num_fewshot=config.num_fewshot, limit=config.limit)
    notes = [f"{lm.num_cut:,} contexts lost their beginning at seq_len {config.seq_len}"] if lm.num_cut else []
    limited = f"the first {config.limit:,} questions of each (limit)" if config.limit else "all questions"
    return {**found, "tasks_cut_contexts": lm.num_cut}, [limited, *notes]


def rows_used(count: int, max_rows: int | None) -> str:
    return f"the first {count:,} rows (max_rows)" if count == max_rows else f"all {count:,} rows"


def beyond(lengths: Sequence[tuple[int, str]], model: Decoder) -> tuple[int, list[str]]:
    """How many of (tokens, file:line) are longer than what ``model`` was trained for, and what to say of them."""
    context = model.config.max_seq_len
    far = [(length, where) for length, where in lengths if length > context]
    if not far:
        return 0, []
    length, where = far[0]
    first = f"the first: {where}, {length:,} tokens"
    return len(far), [f"{len(far):,} longer than the model's context of {context:,} tokens, measured anyway ({first})"]


def main(config: Config) -> None:
    with distributed.init(config.parallel, device=config.device) as world:
        tasks = known_tasks(config, world) if config.tasks else None  # before the work
        if config.output:
            from_main(partial(config.output.parent.mkdir, parents=True, exist_ok=True))
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
        parts: dict[str, Found] = {}
        if config.perplexity:
            parts["perplexity"] = perplexity(config, config.perplexity, model, tokenizer, world)
        model.eval()
        if config.exact_match:
            parts["exact match"] = exact_match(config.exact_match, model, tokenizer, world)
        if config.multiple_choice:
            parts["multiple choice"] = multiple_choice(config.multiple_choice, model, tokenizer, world)
        if tasks is not None:
            parts["tasks"] = harness(config, tasks, model, tokenizer)
        found = {name: value for values, _ in parts.values() for name, value in values.items()}
        said = {f"{part}: measured": "; ".join(notes) for part, (_, notes) in parts.items()}
        shown = {name: f"{value:.4f}" for name, value in found.items() if isinstance(value, float)}
        last_panel(Console(quiet=not is_main()), "Evaluation", shown | said, {})
        if config.output and is_main():
            atomic_write(config.output, json.dumps({"checkpoint_dir": str(config.checkpoint_dir), **found}, indent=1))


if __name__ == "__main__":
    start(main, Config, recipe="evaluate")
