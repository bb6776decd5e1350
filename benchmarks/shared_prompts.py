"""Answers that share their prompt against answers that each have their own: time and memory of a micro-step.

    python benchmarks/shared_prompts.py                                          # a pair (DPO) and a group of 8 (GRPO)
    python benchmarks/shared_prompts.py --model llama3/Llama-3.1-8B --layers 8 --prompt 2048 --answer 512 --answers 2

Random weights, bf16, all blocks compiled, every weight trained, no optimizer. Both ways compute the same answers: rows
of ``--tokens`` hold as many as fit with prompts of their own; shared, the same ones take less. A line is the median of
``--repeats``.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from torchft import models
from torchft.documents import count_documents
from torchft.losses.likelihood import IGNORE, nll_sum
from torchft.modules.decoder import Decoder, init_weights

Row = tuple[Tensor, Tensor, Tensor]  # tokens, labels, positions, each [1, s]
ROUND = 128  # tokens: a row's length is a multiple


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama3/Llama-3.2-1B")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--prompt", type=int, help="tokens; default: 128, 512 and 1024")
    parser.add_argument("--answer", type=int, default=512, help="tokens")
    parser.add_argument("--answers", type=int, help="to each prompt; default: 2 and 8")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    model = build(args.model, args.layers, args.device)
    print(f"{args.model}, {len(model.layers)} layers, {device_name(args.device)}, torch {torch.__version__}")
    print("answers  prompt  answer   alone ms   shared ms   faster   tokens saved   alone GiB   shared GiB")
    for answers in [args.answers] if args.answers else [2, 8]:
        for prompt in [args.prompt] if args.prompt else [128, 512, 1024]:
            groups = max(1, args.tokens // (answers * (prompt + args.answer)))
            rows = [row(model, groups, prompt, args.answer, answers, is_shared=flag) for flag in (False, True)]
            (alone, alone_gib), (shared, shared_gib) = (measured(model, own, args.repeats) for own in rows)
            saved = 1 - rows[1][0].numel() / rows[0][0].numel()
            print(
                f"{answers:7}  {prompt:6}  {args.answer:6}  {alone:9.1f}  {shared:10.1f}  {alone / shared:6.2f}x"
                f"  {saved:12.1%}  {alone_gib:10.2f}  {shared_gib:11.2f}"
            )


def build(name: str, layers: int | None, device: str) -> Decoder:
    torch.manual_seed(0)
    model = models.build(name).to(torch.bfloat16)
    if layers:
        model.layers = model.layers[:layers]
    model.to_empty(device=device)
    init_weights(model)
    if device == "cuda":
        for layer in model.layers:
            layer.compile(dynamic=False)
    return model.train()


def row(model: Decoder, groups: int, prompt: int, answer: int, answers: int, *, is_shared: bool) -> Row:
    """``groups`` prompts with ``answers`` each."""

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(groups):
            for i in range(answers):
                first = prompt - 1 if is_shared and i else 0
                labels = torch.randint(model.config.vocab_size, (prompt + answer,))
                labels[: prompt - 1] = IGNORE
                labels[-1] = IGNORE
                yield labels[first:], torch.arange(first, prompt + answer)

    labels, positions = (torch.cat(parts) for parts in zip(*pieces()))
    padding = -len(labels) % ROUND
    labels = torch.cat((labels, labels.new_full((padding,), IGNORE)))
    positions = torch.cat((positions, torch.arange(padding)))
    tokens = torch.randint(model.config.vocab_size, labels.shape)
    device = model.embed_tokens.weight.device
    return tokens[None].to(device), labels[None].to(device), positions[None].to(device)


def measured(model: Decoder, own: Row, repeats: int) -> tuple[float, float]:
    """Milliseconds of forward and backward, and peak memory in GiB beside the weights."""
    tokens, labels, positions = own
    documents, head = count_documents(positions), partial(nll_sum, labels=labels)
    is_cuda = tokens.is_cuda
    found = []
    for i in range(3 + repeats):
        if is_cuda and i == 3:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if is_cuda else 0
        began = time.perf_counter()
        model(tokens, positions, head=head, documents=documents).backward()
        if is_cuda:
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - began))
        model.zero_grad(set_to_none=True)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if is_cuda else 0.0
    return statistics.median(found[3:]), peak


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


if __name__ == "__main__":
    main()
