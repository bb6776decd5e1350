"""Writes the demo's data, tokenizer and config.json: letter, number and word tasks as chats, the same on every machine.

    python configs/demo/make_data.py            # the small tasks (kept in the repository) and base/'s tokenizer
    python configs/demo/make_data.py pretrain   # what the base model is trained on, into out/demo_data (27 MB)

The base model learns the tasks of ``TASKS``. The LoRA demo teaches ``palindrome``, which none of them is, the demos of
reinforcement learning ``backwards``, a task in words that the base rarely understands, the preference demo to answer
tasks that it knows in capital letters, the embedding demo to find the answer of a task among others, the demos of
classes and rerankers to tell what was done to a word. Words of the test files never occur in the training files.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
VOWELS, LETTERS = "aeiou", "abcdefghijklmnopqrstuvwxyz"
Sample = tuple[str, str]  # question, answer


def word(r: random.Random, low: int, high: int) -> str:
    """A made-up word, vowels and consonants mixed so that it reads like one."""
    letters = [r.choice(VOWELS) if r.random() < 0.4 else r.choice(LETTERS) for _ in range(r.randint(low, high))]
    return "".join(letters)


def is_test(*words: str) -> bool:
    """One word in twenty belongs to the test files, judged by its letters alone."""
    return any(sum((i + 3) * ord(c) for i, c in enumerate(w)) % 20 == 0 for w in words)


def _on_word(
    question: str, answer: Callable[[str], str], high: int = 7
) -> Callable[[random.Random], tuple[Sample, bool]]:
    def make(r: random.Random) -> tuple[Sample, bool]:
        w = word(r, 3, high)
        return (question.format(w), answer(w)), is_test(w)

    return make


def _on_two_words(question: str, answer: Callable[[str, str], str]) -> Callable[[random.Random], tuple[Sample, bool]]:
    def make(r: random.Random) -> tuple[Sample, bool]:
        v, w = word(r, 2, 5), word(r, 2, 5)
        return (question.format(v, w), answer(v, w)), is_test(v, w)

    return make


def _on_two_numbers(
    question: str, answer: Callable[[int, int], str], high: int
) -> Callable[[random.Random], tuple[Sample, bool]]:
    def make(r: random.Random) -> tuple[Sample, bool]:
        m, n = r.randint(0, high), r.randint(0, high)
        return (question.format(m, n), answer(m, n)), (7 * m + n) % 20 == 0

    return make


def _count_up(r: random.Random) -> tuple[Sample, bool]:
    start = r.randint(0, 90)
    end = start + r.randint(1, 6)
    return (f"Count from {start} to {end}.", " ".join(map(str, range(start, end + 1)))), (start + end) % 20 == 0


def _next_letter(r: random.Random) -> tuple[Sample, bool]:
    i = r.randrange(25)
    return (f'Which letter comes after "{LETTERS[i]}"?', LETTERS[i + 1]), False


TASKS = {
    "repeat": _on_word('Repeat the word "{}".', lambda w: w),
    "reverse": _on_word('Write the word "{}" backwards.', lambda w: w[::-1]),
    "capitals": _on_word('Write the word "{}" in capital letters.', str.upper),
    "spell": _on_word('Spell the word "{}".', "-".join),
    "twice": _on_word('Write each letter of "{}" twice.', lambda w: "".join(c + c for c in w)),
    "first": _on_word('What is the first letter of "{}"?', lambda w: w[0]),
    "last": _on_word('What is the last letter of "{}"?', lambda w: w[-1]),
    "length": _on_word('How many letters are in "{}"?', lambda w: str(len(w))),
    "join": _on_two_words('Join the words "{}" and "{}".', lambda v, w: v + w),
    "swap": _on_two_words('Swap the words "{}" and "{}".', lambda v, w: f"{w} {v}"),
    "longer": _on_two_words('Which word is longer, "{}" or "{}"?', lambda v, w: w if len(w) > len(v) else v),
    "add": _on_two_numbers("What is {} plus {}?", lambda m, n: str(m + n), 50),
    "larger": _on_two_numbers("Which number is larger, {} or {}?", lambda m, n: str(max(m, n)), 99),
    "count": _count_up,
    "next": _next_letter,
}
palindrome = _on_word('Make a palindrome from "{}".', lambda w: w + w[::-1], high=6)
backwards = _on_word('Write "{}" backwards.', lambda w: w[::-1], high=6)  # without "the word", which the base knows


FORMS = {  # what is done to a word, told by a class, or asked for in words and found among the others
    "spelled": ('Spell the word "{}".', "-".join),
    "doubled": ('Write each letter of "{}" twice.', lambda w: "".join(c + c for c in w)),
    "capitals": ('Write the word "{}" in capital letters.', str.upper),
    "backwards": ('Write the word "{}" backwards.', lambda w: w[::-1]),
}
PREFERRED = ("repeat", "reverse", "twice", "join")  # answered in letters, which can be capitals


def samples(makers: list, count: int, *, seed: int, test: bool) -> Iterator[Sample]:
    """Up to ``count`` samples of ``makers`` in turn, only test ones or only others; a test sample comes once.

    A maker with no more test samples to give (there are few sums) is passed over.
    """
    r, seen = random.Random(seed), set()
    for i in range(count):
        for _ in range(300):
            sample, is_test_sample = makers[i % len(makers)](r)
            if is_test_sample == test and not (test and sample in seen):
                seen.add(sample)
                yield sample
                break


def write(path: Path, rows: Iterator[Sample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        for question, answer in rows:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            f.write(json.dumps({"messages": messages}) + "\n")


def write_alpaca(path: Path, rows: Iterator[Sample]) -> None:
    with open(path, "w", encoding="utf-8") as f:
        for question, answer in rows:
            f.write(json.dumps({"instruction": question, "input": "", "output": answer}) + "\n")


def write_texts(path: Path, rows: Iterator[Sample]) -> None:
    """Questions and their answers, of which each comes once."""
    seen = set()
    with open(path, "w", encoding="utf-8") as f:
        for question, answer in rows:
            if answer not in seen:
                f.write(json.dumps({"query": question, "positive": answer}) + "\n")
            seen.add(answer)


def write_pairs(path: Path, rows: Iterator[Sample]) -> None:
    """The right answer in capital letters is preferred to the same answer as the base model gives it."""
    with open(path, "w", encoding="utf-8") as f:
        for question, answer in rows:
            f.write(json.dumps({"prompt": question, "chosen": answer.upper(), "rejected": answer}) + "\n")


def write_forms(classes: Path, candidates: Path, count: int, *, seed: int, test: bool) -> None:
    """A form of each word with its name, and the task that asks for it with the right answer and three others."""
    r, names = random.Random(seed), list(FORMS)
    with open(classes, "w", encoding="utf-8") as of_classes, open(candidates, "w", encoding="utf-8") as of_candidates:
        for i in range(count):
            while is_test(w := word(r, 3, 7)) != test:
                pass
            name = names[i % len(names)]
            answers = {other: make(w) for other, (_, make) in FORMS.items()}
            right, wrong = answers[name], [answers[other] for other in names if other != name]
            of_classes.write(json.dumps({"text": right, "label": name}) + "\n")
            row = {"query": FORMS[name][0].format(w), "positive": right, "negative": wrong}
            of_candidates.write(json.dumps(row) + "\n")


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
# Qwen 2's pattern: single digits, so that numbers are learnt digit by digit.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(rest)}


def bpe(words: list[str]) -> dict:
    """A byte-level BPE tokenizer.json whose merges build ``words`` from their left end, so that each is one token.

    They start with a space, which the made-up words (in quotes, or first in an answer) do not: those stay letters.
    """
    alphabet = byte_alphabet()
    vocab = {alphabet[b]: i for i, b in enumerate(range(256))}
    merges = []
    for w in words:
        symbols = [alphabet[b] for b in w.encode()]
        left = symbols[0]
        for right in symbols[1:]:
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append([left, right])
            left += right
    added = [
        {"id": len(vocab) + i, "content": s, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, s in enumerate(SPECIALS)
    ]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": merges},
    }  # fmt: skip


def write_base(folder: Path) -> None:
    """The base model's folder without its weights."""
    r = random.Random(0)
    questions = [make(r)[0][0] for make in TASKS.values()] + ["Make a palindrome from."]
    words = sorted({" " + w for q in questions for w in q.replace("?", "").replace(",", "").split() if w.isalpha()})
    tok = bpe(words)
    vocab_size = len(tok["model"]["vocab"]) + len(SPECIALS)
    eos = {s: vocab_size - len(SPECIALS) + i for i, s in enumerate(SPECIALS)}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": (vocab_size + 63) // 64 * 64,
        "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "intermediate_size": 768, "hidden_act": "silu", "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": None, "eos_token_id": eos["<|end|>"],
        "pad_token_id": eos["<|endoftext|>"], "dtype": "bfloat16",
    }  # fmt: skip
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|endoftext|>",
        "model_max_length": 256, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    generation = {"eos_token_id": eos["<|end|>"], "pad_token_id": eos["<|endoftext|>"], "do_sample": False}
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in {
        "config.json": config,
        "tokenizer.json": tok,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": generation,
    }.items():
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["pretrain"]:
        out = Path("out/demo_data")
        write(out / "pretrain_train.jsonl", samples(list(TASKS.values()), 240_000, seed=1, test=False))
        write(out / "pretrain_test.jsonl", samples(list(TASKS.values()), 700, seed=2, test=True))
    else:
        write(HERE / "palindrome_train.jsonl", samples([palindrome], 6000, seed=3, test=False))
        write(HERE / "palindrome_test.jsonl", samples([palindrome], 200, seed=4, test=True))
        write_alpaca(HERE / "old_tasks.jsonl", samples(list(TASKS.values()), 2000, seed=5, test=False))
        write(HERE / "backwards_train.jsonl", samples([backwards], 2000, seed=5, test=False))
        write(HERE / "backwards_test.jsonl", samples([backwards], 200, seed=6, test=True))
        answered = [TASKS[name] for name in ("spell", "twice", "capitals", "join")]
        write_texts(HERE / "texts_train.jsonl", samples(answered, 3000, seed=9, test=False))
        write_texts(HERE / "texts_test.jsonl", samples(answered, 200, seed=10, test=True))
        preferred = [TASKS[name] for name in PREFERRED]
        write_pairs(HERE / "capitals_train.jsonl", samples(preferred, 2000, seed=5, test=False))
        write_pairs(HERE / "capitals_test.jsonl", samples(preferred, 100, seed=6, test=True))
        write_forms(HERE / "classes_train.jsonl", HERE / "candidates_train.jsonl", 800, seed=11, test=False)
        write_forms(HERE / "classes_test.jsonl", HERE / "candidates_test.jsonl", 100, seed=12, test=True)
        write_base(HERE / "base")
