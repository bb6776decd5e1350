"""Tokens per second and core of tokenising conversations: Hugging Face's fast tokenizer, ours, and the whole stream.

    python benchmarks/tokenise.py                 # a vocabulary learned from the standard library's documentation

On one thread, the best of three rounds over the same conversations, in seconds of processor time: the text alone, which
is rendered already; conversations in Llama 3's released template, which we render natively and Hugging Face cannot
mask; the same by a template with {% generation %} marks, which we run in a sandbox; and a stream, which reads the
file, mixes, shuffles, packs and collates as well. Needs transformers and tokenizers (the dev extra).
"""

import argparse
import inspect
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from torchft import tokenizers
from torchft.data.datasets import chat
from torchft.data.stream import StreamConfig, gather
from torchft.data.stream_loader import StreamLoader
from torchft.tokenizers.bpe import PATTERNS

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
RELEASED = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="conversations")
    parser.add_argument("--vocab-size", type=int, default=64_000, help="of the learned vocabulary")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_checkpoint(folder, given.vocab_size)
        measure(folder, make_data(folder / "data.jsonl", given.rows))


def measure(folder: Path, data: Path) -> None:
    conversations = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    (released, native), (marked, sandboxed) = (with_template(folder, source) for source in (RELEASED, MARKED))
    texts = [released.apply_chat_template(messages, tokenize=False) for messages in conversations]
    fast = released.backend_tokenizer
    ids = [fast.encode(text, add_special_tokens=False).ids for text in texts]
    assert ids == [native.encode(text) for text in texts] == [native.render(m).tokens for m in conversations]
    num_tokens = sum(map(len, ids))
    stream = gather([chat(str(data), tokenizer=native, seq_len=2048)], streaming=StreamConfig())
    loader = StreamLoader(stream, batch_size=8, seed=0, packed=True)
    loader.take(4)  # the first rows wait until the look-ahead is full
    num_batches = max(num_tokens // (8 * 2048), 4)
    masks = {"return_dict": True, "return_assistant_tokens_mask": True}
    rounds: dict[str, tuple[Callable[[], Any], int]] = {
        "Hugging Face, text": (lambda: [fast.encode(text, add_special_tokens=False) for text in texts], num_tokens),
        "torchft, text": (lambda: [native.encode(text) for text in texts], num_tokens),
        "Hugging Face, conversations": (lambda: [released.apply_chat_template(m) for m in conversations], num_tokens),
        "torchft, conversations and masks": (lambda: [native.render(m) for m in conversations], num_tokens),
        "Hugging Face, marked template": (
            lambda: [marked.apply_chat_template(m, **masks) for m in conversations],
            num_tokens,
        ),
        "torchft, marked template": (lambda: [sandboxed.render(m) for m in conversations], num_tokens),
        "torchft, stream to packed batches": (lambda: loader.take(num_batches), num_batches * 8 * 2048),
    }
    size = sum(map(len, texts)) / len(texts)
    print(f"{len(texts):,} conversations of {num_tokens / len(texts):.0f} tokens, {size:.0f} characters")
    for name, (run, tokens) in rounds.items():
        print(json.dumps({"what": name, "tokens_per_second": round(tokens / min(seconds(run) for _ in range(3)))}))


def with_template(folder: Path, source: str) -> tuple[Any, Any]:
    """Their tokenizer and ours, of the folder with this chat template."""
    settings = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[-1], "chat_template": source}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder), tokenizers.load(folder)


def seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()  # of this core, whatever else runs on the machine
    run()
    return time.process_time() - began


def prose() -> list[str]:
    """Paragraphs of the standard library's documentation, an English text that every machine has."""
    found = []
    names = ["argparse", "asyncio", "collections", "concurrent.futures", "csv", "datetime", "decimal", "difflib",
             "email", "fractions", "functools", "heapq", "http.client", "inspect", "ipaddress", "itertools", "json",
             "logging",
             "multiprocessing", "optparse", "os", "pathlib", "pickle", "random", "re", "shutil", "smtplib", "socket",
             "sqlite3", "statistics", "string", "subprocess", "tarfile", "textwrap", "threading", "turtle", "typing",
             "unittest", "urllib.request", "uuid", "zipfile"]  # fmt: skip
    for name in names:
        module = __import__(name, fromlist=["_"])
        for item in [module, *vars(module).values()]:
            members = [item, *(vars(item).values() if inspect.isclass(item) else ())]
            found += [inspect.cleandoc(m.__doc__) for m in members if isinstance(getattr(m, "__doc__", None), str)]
    return sorted({text for text in found if len(text) > 80})


def make_data(path: Path, rows: int) -> Path:
    """Conversations of one to three exchanges of about 100 tokens a message."""
    paragraphs, draw = prose(), random.Random(0)
    with open(path, "w") as f:
        for _ in range(rows):
            turns = [
                {"role": role, "content": draw.choice(paragraphs)[: draw.randint(100, 900)]}
                for _ in range(draw.randint(1, 3))
                for role in ("user", "assistant")
            ]
            f.write(json.dumps({"messages": turns}) + "\n")
    return path


def make_checkpoint(folder: Path, vocab_size: int) -> None:
    """A tokenizer of Llama 3's kind, learned from `prose`, and a config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS["Llama 3"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(prose(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocab_size}))


if __name__ == "__main__":
    main()
