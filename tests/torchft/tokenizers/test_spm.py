"""Sentencepiece BPE (the Llama 2 kind) against transformers, for each way in which a folder says where spaces go."""

import json
import pickle
import shutil

import pytest
import sentencepiece
from vocabularies import corpus, hub, random_texts, write

from torchft.errors import UserError
from torchft.tokenizers import load

PIECES = ["<s>", "</s>", "<unk>", " <s>", "</s> ", "▁", "▁▁", "<0x41>", "[INST]"]

FOLDERS = {  # tokenizer_config.json, and what replaces tokenizer.json's own; None: only tokenizer.model
    "model": ({"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}, None),
    "model, legacy": ({"tokenizer_class": "LlamaTokenizerFast", "legacy": True}, None),
    "model, no prefix": ({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "add_eos_token": True}, None),
    "json": ({"tokenizer_class": "LlamaTokenizer", "legacy": False}, {}),
    "json, legacy": ({"tokenizer_class": "LlamaTokenizer", "legacy": True}, {}),
    "json of transformers 4": (
        {"tokenizer_class": "LlamaTokenizer"},
        {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}},
    ),
    "json as it is": (
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}},
    ),
    "gemma": (
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
         "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                           "invert": False},
         "decoder": {"type": "Sequence", "decoders": [
             {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
             {"type": "Fuse"}]}},
    ),
    "metaspace first": ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    "metaspace always": (
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}},
    ),
    "metaspace never": (
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}},
    ),
}  # fmt: skip


def make(base, into, config, change):
    """A folder of one of the FOLDERS."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(into, tokenizer_config=named | config)
    if change is None:
        shutil.copy(base / "tokenizer.model", into)
    else:
        spec = json.loads(hub(base).backend_tokenizer.to_str()) | change
        write(into, tokenizer=spec)
    return into


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_transformers(name, folders, tmp_path):
    folder = make(folders["llama2"], tmp_path / "x", *FOLDERS[name])
    tokenizer, oracle = load(folder), hub(folder)
    texts = random_texts(10_000 if name == "json" else 1_000, 6, PIECES)
    wanted = [e.ids for e in oracle.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    got = [tokenizer.encode(text) for text in texts]
    assert got == wanted
    assert tokenizer.encode("Hello", add_special_tokens=True) == oracle("Hello").input_ids
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (
        len(oracle),
        oracle.eos_token_id,
        oracle.bos_token_id,
    )
    if name != "metaspace never":  # the decoder in this file still strips one
        assert [tokenizer.decode(ids) for ids in got] == [oracle.decode(ids) for ids in wanted]


def test_the_comparison_can_fail(folders, tmp_path):
    """A seeded mistake: the space before every run instead of before the first."""
    tokenizer = load(make(folders["llama2"], tmp_path / "x", *FOLDERS["json, legacy"]))
    oracle = hub(make(folders["llama2"], tmp_path / "y", *FOLDERS["json"]))
    assert tokenizer.encode("<s>hello") != oracle.encode("<s>hello", add_special_tokens=False)


def test_ids_are_sentencepieces(folders):
    """Meta's own reading of tokenizer.model, for text that starts with no space."""
    engine = sentencepiece.SentencePieceProcessor(model_file=str(folders["llama2"] / "tokenizer.model"))
    tokenizer = load(folders["llama2"])
    for text in corpus(seed=9, num_lines=300):
        assert tokenizer.encode(text, control=False) == engine.encode(text)


def test_a_bare_tokenizer_model_is_read_as_sentencepiece_reads_it(folders, tmp_path):
    shutil.copy(folders["llama2"] / "tokenizer.model", tmp_path)
    tokenizer = load(tmp_path)
    engine = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer.encode("hello world") == engine.encode("hello world")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_control_tokens_in_user_text_stay_text(folders):
    tokenizer = load(folders["llama2"])
    ids = tokenizer.encode("a</s>b<s>", control=False)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == "a</s>b<s>"


def test_pickles(folders):
    tokenizer = load(folders["llama2"])
    assert pickle.loads(pickle.dumps(tokenizer)).encode("Größe") == tokenizer.encode("Größe")


def test_other_sentencepiece_models_are_refused(folders, tmp_path):
    text = tmp_path / "corpus.txt"
    text.write_text("\n".join(line.strip() for line in corpus(num_lines=300)), encoding="utf-8")
    options = {"input": str(text), "minloglevel": 2, "hard_vocab_limit": False}
    for name, message, more in [
        (
            "unigram",
            "of kind Unigram with byte fallback",
            {"model_type": "unigram", "byte_fallback": True, "vocab_size": 500},
        ),
        ("plain", "of kind BPE without byte fallback", {"model_type": "bpe", "vocab_size": 400}),
        ("nfkc", "normalizes text", {"model_type": "bpe", "byte_fallback": True, "vocab_size": 500}),
    ]:
        folder = write(tmp_path / name, config={})
        sentencepiece.SentencePieceTrainer.train(model_prefix=str(folder / "tokenizer"), **options, **more)
        with pytest.raises(UserError, match=message):
            load(folder)


def test_a_broken_model_is_refused(folders, tmp_path):
    whole = (folders["llama2"] / "tokenizer.model").read_bytes()
    for i, data in enumerate(
        [whole[:1000], b"\n\xff\xff\xff", b"\nnot a model at all", b"version https://git-lfs.github.com/spec/v1"]
    ):
        folder = write(tmp_path / str(i), config={})
        (folder / "tokenizer.model").write_bytes(data)
        with pytest.raises(UserError, match=r"tokenizer\.model"):
            load(folder)


def test_unknown_parts_of_tokenizer_json_are_refused(folders, tmp_path):
    lower = {"normalizer": {"type": "Lowercase"}}
    with pytest.raises(UserError, match=r"tokenizer.json: unknown normalizer .*Lowercase"):
        load(make(folders["llama2"], tmp_path / "x", {"tokenizer_class": "PreTrainedTokenizerFast"}, lower))
