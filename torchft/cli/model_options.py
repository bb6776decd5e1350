"""The options of the verbs that answer: which model, where, and how long; and what is wrong with them."""

import argparse
from pathlib import Path

import torch

from torchft import tokenizers
from torchft.config import Range
from torchft.errors import collecting
from torchft.generation.loaded import context_of, load
from torchft.modules.decoder import Decoder
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.training.environment import pick_device

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", type=Path, help="a PEFT folder, such as a run's export/adapter")
    parser.add_argument("--chat-format", help="instead of the checkpoint's own template")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--device", default="auto", help="auto takes the accelerator if there is one")
    parser.add_argument("--max-len", type=int, help="tokens of a question and its answer; default: as many as fit")
    parser.add_argument(
        "--compile", action="store_true", help="faster answers on a GPU, after a few minutes the first time"
    )


def model_problems(given: argparse.Namespace) -> list[str]:
    """What is wrong with `add_model_options`, as far as it shows before weights are read."""
    problems: list[str] = []
    with collecting(problems):
        context = context_of(given.checkpoint)
        if given.max_len is not None and given.max_len > context:
            problems.append(f"--max-len: {given.max_len} is more than the model's context of {context} tokens")
        if given.chat_format is not None:
            tokenizers.load(given.checkpoint, chat_format=given.chat_format)
    with collecting(problems):
        pick_device(given.device)
    if given.adapter is not None and not given.adapter.is_dir():
        problems.append(f"--adapter: {given.adapter} is no folder; name one with adapter_config.json")
    return problems


def load_model(given: argparse.Namespace) -> tuple[Decoder, Tokenizer]:
    """What `add_model_options` has asked for."""
    return load(
        given.checkpoint,
        adapter=given.adapter,
        chat_format=given.chat_format,
        dtype=DTYPES[given.dtype],
        device=pick_device(given.device),
    )


def range_problems(given: argparse.Namespace, ranges: dict[str, Range]) -> list[str]:
    """Options whose numbers are out of their range."""
    values = {name: vars(given)[name] for name in ranges}
    found = {name: ranges[name].problem(value) for name, value in values.items() if value is not None}
    return [f"{option(name)}: {values[name]} {problem}" for name, problem in found.items() if problem]


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
