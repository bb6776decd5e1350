# ruff: noqa: RUF001  these letters are meant
"""Small tokenizers of each kind, trained on generated text, and random texts to try them on."""

import json
import random
from pathlib import Path

import sentencepiece
import tokenizers
import transformers
import trl
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from torchft.tokenizers import bpe, load

transformers.logging.set_verbosity_error()
TEMPLATES = Path(trl.__file__).parent / "chat_templates"

WORDS = (  # noqa: SIM905  a list would take a page
    "the of and to in hello world assistant system user function return don't we'll I'M 12 345 2024 foo_bar x=1; </p> "
    "Größe Straße été naïve ſ's привет мир Здравствуйте שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดี 你好 世界 今天 "
    "こんにちは カタカナ 안녕하세요 세계 Ελλάδα 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ½ ﬁ Å e\u0301 \u200b"
).split()
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
]  # fmt: skip
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_MARKUP = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


def corpus(seed: int = 0, num_lines: int = 1500) -> list[str]:
    rng = random.Random(seed)
    syllables = [
        "ba",
        "ke",
        "ti",
        "no",
        "ru",
        "th",
        "ing",
        "Sch",
        "ö",
        "при",
        "вет",
        "你",
        "学",
        "한",
        "ノ",
        "שם",
        "नम",
        "ing ",
    ]
    made = ["".join(rng.choices(syllables, k=rng.randrange(1, 5))) for _ in range(900)]
    return [
        " ".join(rng.choices(WORDS + made, k=12)) + rng.choice(["", "\n", "\n\n", "  ", "\t"]) for _ in range(num_lines)
    ]


def random_texts(count: int, seed: int, pieces: list[str]) -> list[str]:
    """Texts of all planes: letters, marks, ZWJ emoji, right-to-left, NUL, white space, digits, ``pieces``."""
    rng = random.Random(seed)
    blanks = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\x00",
        "\x85",
        "\xa0",
        "\u180e",
        "\u2003",
        "\u2028",
        "\u3000",
        "\ufeff",
        "\x1c",
    ]
    marks = ["\u0301", "\u0338", "\u200d", "\ufe0f", "\u0e31", "\u094d", "\u20e3", "\u1161", "\u202e", "\u2581"]
    contractions = ["'s", "'S", "'ll", "'ſ", "n't", "I'", "'Re", "’s"]

    def piece() -> str:
        kind = rng.randrange(9)
        if kind == 0:
            return rng.choice(blanks) * rng.choice([1, 1, 1, 2, 7])
        if kind == 1:
            return rng.choice(marks)
        if kind == 2:
            return rng.choice(contractions)
        if kind == 3:
            return "".join(rng.choices("0123456789٣¾Ⅷ", k=rng.choice([1, 3, 20])))
        if kind == 4:
            return rng.choice(pieces)
        if kind in (5, 6):
            return rng.choice(WORDS)
        point = rng.choice(
            [rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x10000), rng.randrange(0x110000)]
        )
        return chr(point) if not 0xD800 <= point < 0xE000 else "\ue000"

    return ["".join(piece() for _ in range(rng.randrange(1, 14))) for _ in range(count)]


def write(folder: Path, **files: object) -> Path:
    """Write ``name=content`` as name.json, or name.jinja for a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        is_template = name == "chat_template"
        path = folder / (f"{name}.jinja" if is_template else f"{name}.json")
        path.write_text(str(content) if is_template else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def template(name: str) -> str:
    """A released chat template, as trl ships it."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def hub(folder: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(folder)


def byte_level(
    pattern: str | tuple[str, ...],
    *,
    special: list[str],
    markup: list[str] = (),
    nfc: bool = False,
    llama: bool = False,
) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=llama))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    use_regex = pattern in (bpe.PATTERNS["GPT-2"], bpe.DIGITS)
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    digits = pre_tokenizers.Digits(individual_digits=True)
    regex = pattern if isinstance(pattern, str) else pattern[0]
    split = digits if pattern == bpe.DIGITS else pre_tokenizers.Split(Regex(regex), "removed", invert=True)
    if pattern in (bpe.PATTERNS["Llama 3"], bpe.PATTERNS["Qwen 2"]):
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
    splits = [split]
    if isinstance(pattern, tuple):
        splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in pattern]
    is_gpt2 = pattern == bpe.PATTERNS["GPT-2"]
    tokenizer.pre_tokenizer = byte if is_gpt2 else pre_tokenizers.Sequence([*splits, byte])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in markup])
    if llama:
        begin = special[0]
        template = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def pair(folder, source, special, markup, eos, bos=None, **options):
    """(our tokenizer, transformers' one) of a checkpoint with this chat template."""
    write(folder, tokenizer_config={"bos_token": bos, "eos_token": eos}, chat_template=source)
    byte_level(bpe.PATTERNS["Llama 3"], special=special, markup=markup).save(str(folder / "tokenizer.json"))
    return load(folder, **options), hub(folder)


def train_sentencepiece(folder: Path) -> None:
    """Put a tokenizer.model of Llama 2's kind into ``folder``."""
    text = folder / "corpus.txt"
    text.write_text("\n".join(line.strip("\n") for line in corpus()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=850,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
