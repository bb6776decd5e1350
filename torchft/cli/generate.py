"""``tune generate``: ask a model, once, for a file of prompts, or in a chat."""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from torchft.cli.arguments import Parser
from torchft.cli.model_options import add_model_options, load_model, model_problems, option, range_problems
from torchft.config import Range
from torchft.data.prompts import Prompt, prompts
from torchft.errors import UserError, collecting
from torchft.generation.batch import answers
from torchft.generation.chat import Chat
from torchft.generation.loaded import engine
from torchft.generation.room import gib, longest_slots, slots_that_fit
from torchft.generation.sampling import Sampling, sampling_of
from torchft.modules.decoder import Decoder
from torchft.tokenizers.tokenizer import Tokenizer

RANGES = {
    "num_samples": Range(min=1),
    "num_slots": Range(min=1),
    "max_len": Range(min=2),
    "seed": Range(min=0, max=2**30),
}
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
MOST_TOLD = 10  # prompts that are too long


def main(arguments: list[str]) -> None:
    """``tune generate CHECKPOINT [PROMPT ...] [--file FILE]``; without prompts a chat."""
    parser = Parser("generate", "Ask a model: the prompts given, those of a file, or, without any, in a chat.")
    parser.epilog = "A prompt that begins with - goes behind --: tune generate CHECKPOINT -- '-3 plus 5?'"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a Hub folder, such as a run's export/")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to answer")
    parser.add_argument("--file", help="prompts: a .jsonl, .json, .csv or .parquet file with messages or prompt")
    parser.add_argument("--output", type=Path, help="where the answers to a file go, as .jsonl; default: the screen")
    parser.add_argument("--system", default="", help="a system prompt")
    parser.add_argument("--raw", action="store_true", help="continue the prompts as they stand, without a chat format")
    parser.add_argument("--num-samples", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--num-slots", type=int, default=32, help="answers that are computed together, if they fit")
    parser.add_argument("--seed", type=int, default=0)
    add_model_options(parser)
    add_sampling_options(parser)
    given = _parsed(parser, arguments)
    problems = [*range_problems(given, RANGES), *_conflicts(given), *model_problems(given)]
    asked: list[Prompt] = []
    with collecting(problems):
        sampling = sampling_from(given)
    with collecting(problems):
        asked = _asked(given)
    if problems:
        raise UserError(*problems)
    model, tokenizer = load_model(given)
    if not given.raw and not tokenizer.has_chat:
        raise UserError(f"{given.checkpoint} has no chat template: name a format with --chat-format, or use --raw")
    if asked:
        _answer(given, asked, model, tokenizer, sampling)
        return
    max_len, need = longest_slots(model, num_slots=1, asked=given.max_len)
    one = engine(model, tokenizer, num_slots=1, max_len=max_len, compile=given.compile)
    room = f"{max_len:,} tokens ({gib(need.cache(1, max_len))} of cache), of the model's {model.config.max_seq_len:,}"
    print(f"the conversation may have up to {room}; --max-len changes that", file=sys.stderr)
    _talk(Chat(one, tokenizer, sampling=sampling, seed=given.seed, system=given.system))


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the most likely token")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated")


def sampling_from(given: argparse.Namespace) -> Sampling:
    """What `add_sampling_options` has asked for. UserError with every problem."""
    settings = {name: vars(given)[name] for name in SAMPLING}
    wild = {name for name, value in settings.items() if isinstance(value, float) and not math.isfinite(value)}
    problems = [f"{option(name)}: {settings.pop(name)} is no number to compute with" for name in sorted(wild)]
    if not all(given.stop):
        problems.append("--stop: an empty text would end every answer at once; leave it out")
    if any(re.search("[\ud800-\udfff]", text) for text in given.stop):
        problems.append("--stop: the text is not UTF-8")
    found: list[str] = []
    with collecting(found):
        sampling = sampling_of(settings)
    problems += [f"{option(name)}:{rest}" for name, _, rest in (problem.partition(":") for problem in found)]
    if problems:
        raise UserError(*problems)
    return sampling


def _parsed(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """As `Parser.parse`, with what is behind "--" as prompts, and values that begin with one dash."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    words: list[str] = []
    for word in arguments[:end]:
        options = parser._option_string_actions
        takes = options.get(words[-1]) if words else None
        if takes is not None and takes.nargs is None and re.match("-(?!-)", word) and word not in options:
            words[-1] += f"={word}"  # --seed -1: argparse would take -1 for an option
        elif re.match(r"-.*\s", word) and word.partition("=")[0] not in options:
            raise UserError(f"{word!r} begins like an option; a prompt that does so goes behind --: -- {word!r}")
        else:
            words.append(word)
    given = parser.parse(words)
    given.prompts += arguments[end + 1 :]
    return given


def _conflicts(given: argparse.Namespace) -> list[str]:
    """Options that do not go together, and where the answers cannot go."""
    problems, output = [], given.output
    if given.prompts and given.file is not None:
        problems.append("give prompts or --file, not both")
    if given.raw and not given.prompts:
        problems.append("--raw continues prompts that are given on the command line")
    if given.raw and given.system:
        problems.append("--raw knows no messages, so no --system: write it into the prompt")
    if output is None:
        return problems
    if not given.prompts and given.file is None:
        problems.append("--output is for the answers to prompts or a --file; in a chat /save FILE writes")
    if output.is_dir():
        problems.append(f"--output: {output} is a folder; name a file in it")
    elif not output.parent.is_dir():
        problems.append(f"--output: the folder {output.parent} does not exist; mkdir -p {output.parent}")
    elif not os.access(output if output.exists() else output.parent, os.W_OK):
        problems.append(f"--output: {output} cannot be written: no permission")
    return problems


def _asked(given: argparse.Namespace) -> list[Prompt]:
    """The prompts of the command line or of a file; none for a chat."""
    if given.file == "":
        raise UserError("--file: the name is empty")
    if given.file is not None:
        found = prompts(given.file, new_system_prompt=given.system or None)
        if not found:
            raise UserError(f"--file: {given.file} holds no prompts")
        return found
    system = [{"role": "system", "content": given.system}] if given.system else []
    turns = [[*system, {"role": "user", "content": prompt}] for prompt in given.prompts]
    return [Prompt(messages=turn, answer="", values={}, where=f"prompt {i}") for i, turn in enumerate(turns, 1)]


def _answer(
    given: argparse.Namespace, asked: list[Prompt], model: Decoder, tokenizer: Tokenizer, sampling: Sampling
) -> None:
    """The prompts on the command line, as text, or those of a file, as rows of .jsonl."""
    tokens = _tokens(given, asked, tokenizer)
    most = given.max_len or model.config.max_seq_len
    limit = f"--max-len is {most}" if given.max_len else f"the model's context is {most}"
    problems = [f"{p.where}: the prompt has no tokens; write something" for p, ids in zip(asked, tokens) if not ids]
    long = [(prompt.where, len(ids)) for prompt, ids in zip(asked, tokens) if len(ids) >= most]
    problems += [f"{where}: the prompt has {count} tokens; {limit}" for where, count in long[:MOST_TOLD]]
    problems += [f"and {len(long) - MOST_TOLD} prompts more are too long"] if len(long) > MOST_TOLD else []
    if problems:
        raise UserError(*problems)
    max_len = min(most, max(map(len, tokens)) + sampling.max_new_tokens)
    wanted = min(given.num_slots, len(tokens) * given.num_samples)
    num_slots = slots_that_fit(model, most=wanted, max_len=max_len)
    if num_slots < wanted:
        print(f"{num_slots} answers of up to {max_len:,} tokens fit at a time, not {wanted}", file=sys.stderr)
    slots = engine(model, tokenizer, num_slots=num_slots, max_len=max_len, compile=given.compile)
    found = answers(slots, tokenizer, tokens, sampling=sampling, num_samples=given.num_samples, seed=given.seed)
    lines = []
    for prompt, replies in zip(asked, found):
        for reply in replies:
            messages = [*prompt.messages, {"role": "assistant", "content": reply.text}]
            row = json.dumps({"messages": messages, "finish": reply.finish}, ensure_ascii=False)
            lines.append(row if given.file else reply.text)
    text = "".join(f"{line}\n" for line in lines)
    if given.output is None:
        sys.stdout.write(text)
        return
    try:
        given.output.write_text(text, encoding="utf-8")
    except OSError as e:
        sys.stdout.write(text)  # rather there than nowhere
        raise UserError(f"--output: {given.output} cannot be written: {e.strerror}; the answers are above") from None


def _tokens(given: argparse.Namespace, asked: list[Prompt], tokenizer: Tokenizer) -> list[list[int]]:
    """Of each prompt. UserError that names those that cannot be rendered."""
    if given.raw:
        return [tokenizer.encode(prompt, add_special_tokens=True) for prompt in given.prompts]
    tokens: list[list[int]] = []
    for prompt in asked:
        try:
            tokens.append(tokenizer.render(prompt.messages, add_generation_prompt=True).tokens)
        except UserError as e:
            raise UserError(f"{prompt.where}: {e}") from None
    return tokens


def _talk(chat: Chat) -> None:
    """Lines of stdin are questions, or commands."""
    print("/help says what there is; Ctrl-D ends", file=sys.stderr)
    is_told = False  # how to leave, as the last line was Ctrl-C
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if is_told:
                return
            print("/quit, Ctrl-D or another Ctrl-C ends the chat", file=sys.stderr)
            is_told = True
            continue
        except UnicodeDecodeError as e:
            print(f"error: that line is not {e.encoding}", file=sys.stderr)
            continue
        is_told = False
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
