"""Byte-level BPE against Hugging Face's tokenizers: the ids of any text, and refusal of what is not known exactly."""

import base64
import json
import pickle
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX
from vocabularies import LLAMA3_SPECIAL, QWEN_MARKUP, QWEN_SPECIAL, corpus, hub, random_texts, write

from torchft.errors import UserError
from torchft.tokenizers import bpe, load
from torchft.tokenizers.nfc import nfc

KINDS = ("gpt2", "llama3", "qwen2", "tekken", "o200k", "digits", "qwen3_5", "kimi", "deepseek")
PIECES = [*LLAMA3_SPECIAL, *QWEN_SPECIAL, *QWEN_MARKUP, "<|im_", "<|", "end|>"]


def rewrite(folder: Path, into: Path, change: dict | None = None, **model: object) -> Path:
    """A copy of a checkpoint folder with parts of its tokenizer.json replaced."""
    shutil.copytree(folder, into)
    spec = json.loads((into / "tokenizer.json").read_text()) | (change or {})
    spec["model"] |= model
    return write(into, tokenizer=spec)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_ten_thousand_random_texts(kind, ours, theirs):
    texts = random_texts(10_000, 1, PIECES)
    wanted = [e.ids for e in theirs[kind].backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    got = [ours[kind].encode(text) for text in texts]
    assert got == wanted
    decoded = [ours[kind].decode(ids) for ids in got]
    if kind in ("qwen2", "digits"):  # each run between added tokens is normalized by itself
        assert decoded == [theirs[kind].decode(ids, skip_special_tokens=False) for ids in wanted]
    else:
        assert decoded == texts


def test_regexes_are_the_released_ones():
    """Most as transformers has them, Kimi's from its repository's tokenization_kimi.py."""
    assert bpe.PATTERNS["Qwen 3.5"] == PRETOKENIZE_REGEX
    theirs = {"Llama 3": "llama3", "Qwen 2": "qwen2", "Tekken": "tekken", "o200k": "gpt-4o"}
    assert {ours: bpe.PATTERNS[ours] for ours in theirs} == {k: GGUF_PRE_TOKENIZER_SPLITS[v] for k, v in theirs.items()}
    begin, no_han = r"[^\r\n\p{L}\p{N}]?", r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    end = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    kimi = [
        r"[\p{Han}]+",
        rf"{begin}[\p{{Lu}}\p{{Lt}}{no_han}*[\p{{Ll}}{no_han}+{end}",
        rf"{begin}[\p{{Lu}}\p{{Lt}}{no_han}+[\p{{Ll}}{no_han}*{end}",
        r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    ]  # fmt: skip
    assert bpe.PATTERNS["Kimi"] == "|".join(kimi)


def test_the_comparison_can_fail(ours, theirs):
    """A seeded mistake: Qwen's regex (digits one by one, no run of three) in place of Llama 3's."""
    texts = random_texts(500, 1, PIECES)
    engine = bpe.ByteBPE(ours["llama3"]._engine._engine._mergeable_ranks, None, pattern=bpe.PATTERNS["Qwen 2"])
    wanted = [theirs["llama3"].encode(text, add_special_tokens=False) for text in texts]
    assert [engine.encode(text, at_start=True) for text in texts] != wanted


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_ids_of_any_text(kind, ours, theirs, text):
    assert ours[kind].encode(text) == theirs[kind].encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_around_a_text(kind, ours, theirs):
    assert ours[kind].encode("hello", add_special_tokens=True) == theirs[kind].encode("hello")
    assert ours[kind].encode("", add_special_tokens=True) == theirs[kind].encode("")


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_user_text_stay_text(kind, ours):
    for token in ours[kind]._added:
        ids = ours[kind].encode(f"a {token.content} b", control=False)
        assert token.id not in ids
        assert ours[kind].decode(ids) == f"a {token.content} b"


@pytest.mark.parametrize("kind", KINDS)
def test_vocab_size_and_decode_beyond_it(kind, ours, theirs):
    assert ours[kind].vocab_size == len(theirs[kind])
    assert ours[kind].decode([10**6, *ours[kind].encode("hi")]) == "hi"


@pytest.mark.parametrize("kind", KINDS)
def test_pickles(kind, ours):
    again = pickle.loads(pickle.dumps(ours[kind]))
    assert again.encode("Größe 123 <|im_end|>") == ours[kind].encode("Größe 123 <|im_end|>")


def test_ids_that_are_not_in_merge_order(folders, tmp_path):
    spec = json.loads((folders["qwen2"] / "tokenizer.json").read_text())
    vocab, specials = spec["model"]["vocab"], [t["id"] for t in spec["added_tokens"]]
    shuffled = sorted(vocab.values(), key=lambda i: hash((i * 7919) % 1009))
    folder = rewrite(folders["qwen2"], tmp_path / "x", vocab=dict(zip(vocab, shuffled)))
    assert not set(specials) & set(shuffled)
    tokenizer, oracle = load(folder), hub(folder)
    for text in random_texts(500, 2, PIECES):
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode("Größe 世界")) == "Größe 世界"


def test_a_vocabulary_without_all_bytes_refuses_what_it_cannot_hold(tmp_path):
    toy = tokenizers.Tokenizer(models.BPE())
    toy.pre_tokenizer, toy.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    toy.train_from_iterator(["hello world"] * 9, trainers.BpeTrainer(vocab_size=40, special_tokens=["<eos>"]))
    folder = write(tmp_path / "toy", tokenizer_config={"eos_token": "<eos>"})
    toy.save(str(folder / "tokenizer.json"))
    tokenizer = load(folder)
    assert tokenizer.encode("hello world") == toy.encode("hello world").ids
    with pytest.raises(UserError, match="no token for 'é'"):
        tokenizer.encode("hello é")


def test_meta_llama3_file(folders, tmp_path):
    """tokenizer.model of Meta: base64 tokens and ranks, then 256 special tokens at fixed places."""
    ranks = load(folders["llama3"])._engine.token_bytes
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in sorted(ranks.items())]
    folder = write(tmp_path / "meta", config={"model_type": "llama"})
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    tokenizer, base = load(folder), len(ranks)
    same = load(folders["llama3"])
    for text in random_texts(300, 3, [" "]):
        assert tokenizer.encode(text) == same.encode(text)
    assert tokenizer.encode("<|begin_of_text|><|eot_id|><|python_tag|><|reserved_special_token_247|>") == [
        base, base + 9, base + 10, base + 255,
    ]  # fmt: skip
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (base, base + 1, base + 256)
    assert tokenizer.encode("hi", add_special_tokens=True)[0] == base


def test_a_broken_rank_line_is_named(tmp_path):
    folder = write(tmp_path / "meta", config={})
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== one\n")
    with pytest.raises(UserError, match=r"tokenizer.model:2: expected a base64 token and its rank"):
        load(folder)


BAD_PARTS = {
    "unknown pre_tokenizer": {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
    "unknown pre_tokenizer .*Digits": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ]}
    },
    "unknown pre_tokenizer .*add_prefix_space': True": {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    },
    "pre_tokenizer splits by an unknown regex": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\w+|\W"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ]}
    },
    "unknown normalizer .*NFKC": {"normalizer": {"type": "NFKC"}},
    "unknown post_processor 'Odd'": {
        "post_processor": {"type": "Odd", "sep": ["a", 1], "cls": ["b", 2]}
    },
    "unknown model type 'WordLevel'": {"model": {"type": "WordLevel", "vocab": [["a", 0.0]]}},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_PARTS)
def test_an_unknown_part_is_refused_with_the_file(message, folders, tmp_path):
    folder = rewrite(folders["llama3"], tmp_path / "x", BAD_PARTS[message])
    with pytest.raises(UserError, match=f"tokenizer.json: {message}"):
        load(folder)


@pytest.mark.parametrize("option", ["dropout", "continuing_subword_prefix"])
def test_an_unknown_model_option_is_refused(option, folders, tmp_path):
    with pytest.raises(UserError, match=f"tokenizer.json: model.{option}"):
        load(rewrite(folders["gpt2"], tmp_path / "x", **{option: 0.1 if option == "dropout" else "##"}))


def test_merges_that_an_engine_cannot_order_are_refused(folders, tmp_path):
    merges = json.loads((folders["gpt2"] / "tokenizer.json").read_text())["model"]["merges"]
    with pytest.raises(UserError, match="not next to each other"):
        load(rewrite(folders["gpt2"], tmp_path / "x", merges=[*merges, merges[0]]))
    with pytest.raises(UserError, match="not in the vocabulary"):
        load(rewrite(folders["gpt2"], tmp_path / "y", merges=[*merges, "zzz qqq"]))


def test_text_that_no_engine_takes(ours):
    with pytest.raises(UserError, match=r"lone surrogate \('\\ud800' at character 2\)"):
        ours["gpt2"].encode("ab\ud800")
    with pytest.raises(UserError, match="white space in a row"):
        ours["llama3"].encode("a" + " " * 2_000_000 + "b")
    assert len(ours["llama3"].encode(" " * 150_000 + "b" * 200_000)) > 1


def test_nfc_is_that_of_tokenizers():
    """Its tables are of Unicode 9; a mark of a later one (U+1ACA) is reordered by Python's and not by its."""
    oracle = tokenizers.normalizers.NFC()
    text = "M\u1aca\u0334"
    assert nfc(text) == oracle.normalize_str(text) == text
    for text in random_texts(
        3000, 4, ["\u1aca", "\U00011938", "\u07fd", "\u0898\u0316", "e\u0301", "\u1100\u1161\u11a8"]
    ):
        assert nfc(text) == oracle.normalize_str(text)


def test_corpus_is_the_same_each_time():
    assert corpus()[:3] == corpus()[:3]


def test_a_token_outside_the_byte_alphabet_is_refused(folders, tmp_path):
    spec = json.loads((folders["gpt2"] / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"] | {"世": 5000, "世a": 5001}
    with pytest.raises(UserError, match="'世a' is not spelled in the byte alphabet"):
        load(rewrite(folders["gpt2"], tmp_path / "x", vocab=vocab, merges=[*spec["model"]["merges"], ["世", "a"]]))
