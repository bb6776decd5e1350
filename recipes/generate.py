"""Answers to a file of prompts, as .jsonl, by as many GPUs as there are; a run that was ended goes on.

    tune run generate checkpoint_dir=Llama-3.2-1B-Instruct prompts.source=questions.jsonl output=answers.jsonl
    tune run generate_distributed --config my.yaml num_samples=8 sampling.temperature=1.0
    python recipes/generate.py --config my.yaml adapter=out/my_run/export/adapter

For a few prompts or a chat there is `tune generate`. To change it: `tune cp generate my_recipe.py`.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from torchft.adapters.fp8 import FP8Config
from torchft.adapters.nf4 import NF4Config
from torchft.cli.run import start
from torchft.config import Component, Folder, Kind, Range, plain
from torchft.data.prompts import Prompt
from torchft.errors import UserError
from torchft.files import atomic_write, read_json
from torchft.generation.batch import Reply, answers
from torchft.generation.compiled import Compile
from torchft.generation.loaded import engine, load
from torchft.generation.sampling import Sampling
from torchft.ranks import from_main, gather, is_main
from torchft.training import distributed
from torchft.training.console import Console, Steps, last_panel
from torchft.training.distributed import ParallelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FREE = ("output", "device", "parallel", "compile", "num_slots", "save_every")  # what no answer depends on
HASHED = ("prompts", "checkpoint_dir", "adapter", "chat_format")  # of what they depend on, by content or by files
MODEL_FILES = ("*.safetensors", "*config.json", "tokenizer*", "*.model", "chat_template*", "*.jinja")  # of a folder


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint_dir: Annotated[Path, Folder(exists=True)]  # a Hub folder: family, sizes, tokenizer and chat format
    adapter: Annotated[Path, Folder(exists=True)] | None = None  # a PEFT folder
    output: Path  # a .jsonl file, of chat rows with "finish" and, if wanted, the log-probabilities
    prompts: Annotated[Component, Kind("prompts", default="torchft.data.prompts.prompts")]
    chat_format: str | None = None  # instead of the checkpoint's own template: llama2, llama3, or a .jinja file
    sampling: Sampling = field(default_factory=Sampling)
    num_samples: Annotated[int, Range(min=1)] = 1  # answers to each prompt
    logps: bool = False  # also write every token's id and log-probability, nats
    seq_len: Annotated[int, Range(min=2)] = 2048  # tokens of prompt and answer together
    num_slots: Annotated[int, Range(min=1)] = 64  # answers that a device computes together
    save_every: Annotated[int, Range(min=1)] = 512  # prompts after which answers are written
    compile: Compile = "auto"  # torch.compile the step of a token: a slower start, faster answers; auto: on a GPU
    nf4: NF4Config | None = None  # weights in 4 bits; `nf4: {}`
    fp8: FP8Config | None = None  # or in 8, on GPUs that have them; `fp8: {}`
    dtype: Literal["bf16", "fp32"] = "bf16"
    device: str = "auto"  # auto takes the accelerator if there is one
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # tp ranks split a model; others have one each
    seed: Annotated[int, Range(min=0, max=2**30)] = 0

    def conflicts(self) -> Iterator[str]:
        if self.nf4 and self.fp8:
            yield "nf4, fp8: the weights have one format; leave one of the sections out"
        if self.output.suffix != ".jsonl":
            yield "output: the name must end in .jsonl"
        if self.output.is_dir():
            yield f"output: {self.output} is a folder; name a .jsonl file"
        if problem := Folder(writable=True).problem(self.output.parent):
            yield f"output: {self.output.parent} {problem}"
        if self.parallel.cp * self.parallel.ep > 1:
            yield "parallel: cp and ep are for training; tp splits a model that is too large for a device"


def main(config: Config) -> None:
    with distributed.init(config.parallel, device=config.device) as world:
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
        prompts: list[Prompt] = config.prompts.build()
        sizes = {"num_slots": config.num_slots, "max_len": config.seq_len}
        slots = engine(model, tokenizer, **sizes, compile=config.compile)
        partial = config.output.with_suffix(".jsonl.partial")
        done = from_main(lambda: finished(partial, config, made_of(config, prompts)))  # prompts
        with Steps(Console(quiet=not is_main()), len(prompts), start=done) as progress:
            while done < len(prompts):
                chunk = prompts[done : done + config.save_every]
                own = chunk[world.data_rank :: world.data_size]
                tokens = [tokenizer.render(prompt.messages, add_generation_prompt=True).tokens for prompt in own]
                numbers = range(done + world.data_rank, done + len(chunk), world.data_size)  # all that draws depend on
                found = answers(
                    slots,
                    tokenizer,
                    tokens,
                    sampling=config.sampling,
                    num_samples=config.num_samples,
                    seed=config.seed,
                    numbers=numbers,
                )
                theirs = gather([[row(config, p, reply) for reply in replies] for p, replies in zip(own, found)])
                if is_main():
                    with open(partial, "a", encoding="utf-8") as f:
                        for i in range(len(chunk)):
                            who, place = i % world.data_size * world.tokens.tp, i // world.data_size
                            f.writelines(f"{line}\n" for line in theirs[who][place])
                done += len(chunk)
                progress.update(done, dict(slots.num_finished))
        if is_main():
            os.replace(partial, config.output)
            mark_of(partial).unlink(missing_ok=True)
            said = {"prompts": f"{len(prompts):,}, {config.num_samples} answers each", "answers": str(config.output)}
            last_panel(Console(), "Answers", said | endings(config.output, config), {})


def row(config: Config, prompt: Prompt, reply: Reply) -> str:
    """A line of the output, which is also a row of training data."""
    values: dict[str, Any] = {"messages": [*prompt.messages, {"role": "assistant", "content": reply.text}]}
    values |= {"finish": reply.finish} | ({"answer": prompt.answer} if prompt.answer else {})
    values |= {"tokens": reply.tokens, "logps": reply.logps} if config.logps else {}
    return json.dumps(values, ensure_ascii=False)


def made_of(config: Config, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What the answers depend on, as JSON: settings, and hashes of the prompts and of the files of the model."""
    settings = {name: value for name, value in plain(config).items() if name not in FREE}
    asked = json.dumps([[p.messages, p.answer] for p in prompts], sort_keys=True, default=str)
    settings["prompts"] = hashlib.sha256(asked.encode()).hexdigest()
    folders = {"checkpoint_dir": config.checkpoint_dir, "adapter": config.adapter}
    settings |= {name: folder and files_of(folder) for name, folder in folders.items()}
    if config.chat_format and Path(config.chat_format).is_file():
        settings["chat_format"] = Path(config.chat_format).read_text(encoding="utf-8")
    return json.loads(json.dumps(settings))


def files_of(folder: Path) -> str:
    """A hash of what lies in ``folder`` by names, sizes and times: reading a large model would take minutes."""
    found = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    listed = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in found]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def mark_of(partial: Path) -> Path:
    """The file beside unfinished answers that says what they were made of."""
    return partial.with_name(f"{partial.name}.made_of")


def finished(partial: Path, config: Config, made_of: dict[str, Any]) -> int:
    """How many prompts an earlier run has answered; a torn end is cut off. UserError if its answers are of other
    prompts, models or settings."""
    mark = mark_of(partial)
    if not partial.exists() or not partial.stat().st_size:
        partial.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(mark, json.dumps(made_of))
        return 0
    ways = f"give another output, or remove {partial} to start anew"
    if not mark.exists():
        raise UserError(
            f"output: {partial} holds answers of an earlier run, but {mark.name} does not say of what; {ways}"
        )
    before = read_json(mark)
    changed = [
        name if name in HASHED else f"{name} ({before.get(name)} then, {value} now)"
        for name, value in made_of.items()
        if before.get(name) != value
    ]
    if changed:
        what = f"{partial} holds answers of an earlier run with other {', '.join(changed)}"
        raise UserError(f"output: {what}; restore that to go on after them, {ways}")
    lines = partial.read_bytes().split(b"\n")[:-1]  # by bytes: a text may hold other line ends, or be torn in a letter
    prompts = len(lines) // config.num_samples
    os.truncate(partial, sum(len(line) + 1 for line in lines[: prompts * config.num_samples]))
    return prompts


def endings(output: Path, config: Config) -> dict[str, str]:
    """How many answers ended in which way, and what that means where it is not the usual one."""
    meaning = {
        "length": f"cut at sampling.max_new_tokens {config.sampling.max_new_tokens} or seq_len {config.seq_len}",
        "too_long": f"empty, as their prompts do not fit seq_len {config.seq_len}",
        "not_finite": "broken off, as the model computed values that are not finite",
    }
    found: Counter[str] = Counter()
    first: dict[str, int] = {}
    with open(output, "rb") as f:
        for number, line in enumerate(f, 1):
            finish = json.loads(line)["finish"]
            found[finish] += 1
            first.setdefault(finish, number)
    return {
        finish: f"{count:,}" + (f" {meaning[finish]}; the first: line {first[finish]}" if finish in meaning else "")
        for finish, count in found.items()
    }


if __name__ == "__main__":
    start(main, Config, recipe="generate")
