"""Answers to a file of prompts, as .jsonl, by as many GPUs as there are; a run that was ended goes on.

    tune run generate checkpoint_dir=Llama-3.2-1B-Instruct prompts.source=questions.jsonl output=answers.jsonl
    tune run generate_distributed --config my.yaml num_samples=8 sampling.temperature=1.0
    python recipes/generate.py --config my.yaml adapter=out/my_run/export/adapter

For a few prompts or a chat there is `tune generate`. To change it: `tune cp generate my_recipe.py`.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from torchft.adapters.fp8 import FP8Config
from torchft.adapters.nf4 import NF4Config
from torchft.cli.run import start
from torchft.config import Component, Folder, Kind, Range
from torchft.data.prompts import Prompt
from torchft.errors import UserError
from torchft.generation.batch import Reply, answers
from torchft.generation.compiled import Compile
from torchft.generation.loaded import engine, load
from torchft.generation.sampling import Sampling
from torchft.ranks import from_main, gather, is_main
from torchft.training import distributed
from torchft.training.console import Console, Steps
from torchft.training.distributed import ParallelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
        prompts = config.prompts.build()
        sizes = {"num_slots": config.num_slots, "max_len": config.seq_len}
        slots = engine(model, tokenizer, **sizes, compile=config.compile)
        partial = config.output.with_suffix(".jsonl.partial")
        done = from_main(lambda: finished(partial, config.num_samples))  # prompts
        with Steps(Console(quiet=not is_main()), len(prompts), start=done) as progress:
            while done < len(prompts):
                chunk = prompts[done : done + config.save_every]
                own = chunk[world.data_rank :: world.data_size]
                tokens = [tokenizer.render(prompt.messages, add_generation_prompt=True).tokens for prompt in own]
                numbers = range(done + world.data_rank, done + len(chunk), world.data_size)  # all that draws depend on
                how = {"sampling": config.sampling, "num_samples": config.num_samples, "seed": config.seed}
                found = answers(slots, tokenizer, tokens, numbers=numbers, **how)
                theirs = gather([[row(config, p, reply) for reply in replies] for p, replies in zip(own, found)])
                if is_main():
                    partial.parent.mkdir(parents=True, exist_ok=True)
                    with open(partial, "a", encoding="utf-8") as f:
                        for i in range(len(chunk)):
                            who, place = i % world.data_size * world.tokens.tp, i // world.data_size
                            f.writelines(f"{line}\n" for line in theirs[who][place])
                done += len(chunk)
                progress.update(done, dict(slots.num_finished))
        if is_main():
            os.replace(partial, config.output)
            Console().print(f"{len(prompts)} prompts, {config.num_samples} answers each: {config.output}")


def row(config: Config, prompt: Prompt, reply: Reply) -> str:
    """A line of the output, which is also a row of training data."""
    values: dict[str, Any] = {"messages": [*prompt.messages, {"role": "assistant", "content": reply.text}]}
    values |= {"finish": reply.finish} | ({"answer": prompt.answer} if prompt.answer else {})
    values |= {"tokens": reply.tokens, "logps": reply.logps} if config.logps else {}
    return json.dumps(values, ensure_ascii=False)


def finished(partial: Path, num_samples: int) -> int:
    """How many prompts an earlier run has answered; a torn end is cut off. UserError if its answers do not fit."""
    if not partial.exists():
        return 0
    lines = partial.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    prompts = len(whole) // num_samples
    partial.write_text("".join(whole[: prompts * num_samples]), encoding="utf-8")
    if lines and not prompts:
        raise UserError(f"{partial} holds no whole answers; remove it to start anew")
    return prompts


if __name__ == "__main__":
    start(main, Config, recipe="generate")
