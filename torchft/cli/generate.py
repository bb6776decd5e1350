"""``tune generate``: ask a model, once, for a file of prompts, or in a chat."""

import argparse
import json
import sys
from pathlib import Path

import torch

from torchft.cli.arguments import Parser
from torchft.data.prompts import Prompt, prompts
from torchft.errors import UserError
from torchft.generation.batch import answers
from torchft.generation.chat import Chat
from torchft.generation.loaded import engine, load
from torchft.generation.sampling import Sampling, sampling_of
from torchft.modules.decoder import Decoder
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.training.environment import pick_device

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(arguments: list[str]) -> None:
    """``tune generate CHECKPOINT [PROMPT ...] [--file FILE]``; without prompts a chat."""
    parser = Parser("generate", "Ask a model: the prompts given, those of a file, or, without any, in a chat.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a Hub folder, such as a run's export/")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to answer")
    parser.add_argument("--file", help="prompts: a .jsonl, .json, .csv or .parquet file with messages or prompt")
    parser.add_argument("--output", type=Path, help="where the answers to a file go, as .jsonl; default: the screen")
    parser.add_argument("--system", default="", help="a system prompt")
    parser.add_argument("--raw", action="store_true", help="continue the prompts as they stand, without a chat format")
    parser.add_argument("--num-samples", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--num-slots", type=int, default=32, help="answers that are computed together")
    parser.add_argument("--seed", type=int, default=0)
    add_model_options(parser)
    add_sampling_options(parser)
    given = parser.parse(arguments)
    if given.prompts and given.file:
        raise UserError("give prompts or --file, not both")
    if given.raw and not given.prompts:
        raise UserError("--raw continues prompts that are given on the command line")
    if min(given.num_samples, given.num_slots) < 1:
        raise UserError("--num-samples and --num-slots must be at least 1")
    sampling = sampling_from(given)
    model, tokenizer = load_model(given)
    max_len = given.max_len or model.config.max_seq_len
    if given.prompts or given.file:
        _answer(given, model, tokenizer, sampling, max_len)
    else:
        one = engine(model, tokenizer, num_slots=1, max_len=max_len, compile=given.compile)
        _talk(Chat(one, tokenizer, sampling=sampling, seed=given.seed, system=given.system))


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", type=Path, help="a PEFT folder, such as a run's export/adapter")
    parser.add_argument("--chat-format", help="instead of the checkpoint's own template")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--device", default="auto", help="auto takes the accelerator if there is one")
    parser.add_argument("--max-len", type=int, help="tokens of question and answer; default: what the model can")
    parser.add_argument("--compile", action="store_true", help="faster answers on a GPU, after a minute at the start")


def load_model(given: argparse.Namespace) -> tuple[Decoder, Tokenizer]:
    """What `add_model_options` has asked for."""
    return load(
        given.checkpoint,
        adapter=given.adapter,
        chat_format=given.chat_format,
        dtype=DTYPES[given.dtype],
        device=pick_device(given.device),
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the most likely token")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated")


def sampling_from(given: argparse.Namespace) -> Sampling:
    """What `add_sampling_options` has asked for."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
    return sampling_of({name: vars(given)[name] for name in names})


def _answer(given: argparse.Namespace, model: Decoder, tokenizer: Tokenizer, sampling: Sampling, max_len: int) -> None:
    """The prompts on the command line, as text, or those of a file, as rows of .jsonl."""
    system = [{"role": "system", "content": given.system}] if given.system else []
    if given.file:
        asked = prompts(given.file, new_system_prompt=given.system or None)
    else:
        turns = [[*system, {"role": "user", "content": prompt}] for prompt in given.prompts]
        asked = [Prompt(messages=messages, answer="", values={}, where="the command line") for messages in turns]
    if given.raw:
        tokens = [tokenizer.encode(prompt, add_special_tokens=True) for prompt in given.prompts]
    else:
        tokens = [tokenizer.render(prompt.messages, add_generation_prompt=True).tokens for prompt in asked]
    for prompt, ids in zip(asked, tokens):
        if len(ids) >= max_len:
            raise UserError(f"{prompt.where}: the prompt has {len(ids)} tokens; --max-len is {max_len}")
    num_slots = min(given.num_slots, len(tokens) * given.num_samples)
    slots = engine(model, tokenizer, num_slots=num_slots, max_len=max_len, compile=given.compile)
    found = answers(slots, tokenizer, tokens, sampling=sampling, num_samples=given.num_samples, seed=given.seed)
    lines = []
    for prompt, replies in zip(asked, found):
        for reply in replies:
            messages = [*prompt.messages, {"role": "assistant", "content": reply.text}]
            row = json.dumps({"messages": messages, "finish": reply.finish}, ensure_ascii=False)
            lines.append(row if given.file else reply.text)
    text = "".join(f"{line}\n" for line in lines)
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


def _talk(chat: Chat) -> None:
    """Lines of stdin are questions, or commands."""
    print("/help says what there is; Ctrl-D ends", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.startswith("/"):
            print(chat.command(line), file=sys.stderr)
        elif line.strip():
            try:
                for piece in chat.answer(line.strip()):
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                print(" [interrupted]", end="")
            except UserError as e:
                print(f"error: {e}", end="", file=sys.stderr)
            print()
