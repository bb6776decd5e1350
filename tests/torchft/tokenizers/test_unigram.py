"""XLM-RoBERTa's Unigram vocabularies against transformers: both files of a folder, odd white space, marks, pairs."""

import json
import pickle
import shutil
import unicodedata

import pytest
import sentencepiece
from vocabularies import corpus, hub, random_texts, write

from torchft.errors import UserError
from torchft.tokenizers import load

PIECES = [
    "<s>", "</s>", "<unk>", "<mask>", " <mask> ", "<pad>", "▁", "▁▁", "e\u0301", "™\u0301", "ﬁ\u0301\u0302", "\u0600a",
]  # fmt: skip
ODD = ["", " ", " \n a  b\u3000c ", "a" * 300, "\0", "\uff5e\uff0c\uff01 ", "👩\u200d👩\u200d👧 x", "a\u2028"]
CLASSES = ["XLMRobertaTokenizer", "PreTrainedTokenizerFast"]
NAMED = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>",
    "sep_token": "</s>", "mask_token": "<mask>",
}  # fmt: skip
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
OLD_METASPACE = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True, "str_rep": "▁"}
BLANKS = {"type": "Replace", "pattern": {"Regex": " {2,}"}}
STRIP = {"type": "Strip", "strip_left": False, "strip_right": True}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder as fairseq's models have it: sentencepiece.bpe.model alone."""
    folder = tmp_path_factory.mktemp("xlm_roberta")
    text = folder / "corpus.txt"
    text.write_text("\n".join(line.strip("\n") for line in corpus()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "sentencepiece.bpe"), model_type="unigram", vocab_size=700,
        hard_vocab_limit=False, character_coverage=0.98, normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    return write(
        folder,
        config={"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"]},
        tokenizer_config={"tokenizer_class": "XLMRobertaTokenizer"},
    )


def with_json(trained, into, kind, *, normalizers=(), pre_tokenizers=None):
    """A folder with tokenizer.json, in which ``normalizers`` follow the compiled one."""
    spec = json.loads(hub(trained).backend_tokenizer.to_str())
    if normalizers:
        spec["normalizer"] = {"type": "Sequence", "normalizers": [spec["normalizer"], *normalizers]}
    if pre_tokenizers:
        many = {"type": "Sequence", "pretokenizers": pre_tokenizers}
        spec["pre_tokenizer"] = many if len(pre_tokenizers) > 1 else pre_tokenizers[0]
    write(into, tokenizer=spec, tokenizer_config=NAMED | {"tokenizer_class": kind})
    shutil.copy(trained / "config.json", into)
    return into


LAYOUTS = {  # of tokenizer.json, as releases of transformers wrote it
    "as it is": {},
    "old spelling": {"pre_tokenizers": [{"type": "WhitespaceSplit"}, OLD_METASPACE]},
    "blanks": {"normalizers": [BLANKS | {"content": " "}]},
    "no split": {"normalizers": [STRIP, BLANKS | {"content": "▁"}], "pre_tokenizers": [METASPACE]},
}


def compare(folder, count, seed):
    tokenizer, oracle = load(folder), hub(folder)
    texts = [*random_texts(count, seed, PIECES), *ODD]
    wanted = [e.ids for e in oracle.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    got = [tokenizer.encode(text) for text in texts]
    assert got == wanted
    assert [tokenizer.decode(ids) for ids in got] == [oracle.decode(ids) for ids in wanted]
    assert tokenizer.encode("Hello", add_special_tokens=True) == oracle("Hello").input_ids
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.separator_id) == (
        len(oracle), oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id, oracle.sep_token_id,
    )  # fmt: skip
    return tokenizer, oracle


def test_ids_are_transformers(trained):
    tokenizer, _ = compare(trained, 10_000, 3)
    ids = [tokenizer.encode(text) for text in ("<s>", "<pad>", "</s>", "<unk>")]
    assert ids == [[0], [1], [2], [3]] and tokenizer.encode("<mask>") == [tokenizer.vocab_size - 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CLASSES)
def test_ids_of_tokenizer_json(trained, tmp_path, kind, layout):
    compare(with_json(trained, tmp_path, kind, **LAYOUTS[layout]), 1_500, 4)


def test_pairs_are_transformers(trained):
    """Also those of which one, the other or both are too long."""
    tokenizer, oracle = load(trained), hub(trained)
    texts = random_texts(300, 5, ["red", "green"])
    for i, (one, other) in enumerate(zip(texts, reversed(texts))):
        room = 5 + i % 30
        want = oracle(one, other, truncation=True, max_length=room, split_special_tokens=True)["input_ids"]
        assert tokenizer.encode_pair_within(one, other, room) == want


def test_every_code_point_is_normalized_alike(trained):
    """By itself, with a mark behind it, and behind a letter with its mark."""
    oracle, engine = hub(trained).backend_tokenizer.normalizer, load(trained)._engine
    marks = [chr(i) for i in range(0x20000) if unicodedata.category(chr(i)) in ("Mn", "Mc", "Me", "Cf")]
    for c in [*map(chr, range(0x3400)), *map(chr, range(0xA000, 0xAC00)), *map(chr, range(0xF900, 0xFFFF)), *marks]:
        for text in (c, f"e\u0301{c}x", f"\xa0{c}", f"{c}\u0301", f"{c}e\u0301"):
            assert engine.normalize(text) == oracle.normalize_str(text), ascii(text)


def test_control_tokens_in_user_text_stay_text(trained):
    ids = load(trained).encode("a</s>b<mask>", control=False)
    assert not {0, 1, 2, load(trained).vocab_size - 1} & set(ids)


def test_pickles(trained):
    tokenizer = load(trained)
    assert pickle.loads(pickle.dumps(tokenizer)).encode("ﬁ Größe") == tokenizer.encode("ﬁ Größe")


def test_other_files_are_refused(trained, tmp_path):
    other = write(tmp_path / "camembert", tokenizer_config={"tokenizer_class": "CamembertTokenizer"})
    shutil.copy(trained / "sentencepiece.bpe.model", other)
    with pytest.raises(UserError, match=r"is CamembertTokenizer's, and torchft reads XLMRobertaTokenizer's"):
        load(other)
    strange = with_json(trained, tmp_path / "x", CLASSES[1], pre_tokenizers=[METASPACE])
    with pytest.raises(UserError, match=r"unknown normalizer \[\] with pre_tokenizer .*Metaspace"):
        load(strange)
    spec = json.loads((strange / "tokenizer.json").read_text())
    spec["model"]["byte_fallback"] = True
    write(strange, tokenizer=spec)
    with pytest.raises(UserError, match=r"model\.byte_fallback is True"):
        load(strange)


def test_the_comparison_can_fail(trained, tmp_path):
    """A seeded mistake: without the compiled rules."""
    folder = with_json(trained, tmp_path, CLASSES[0])
    spec = json.loads((folder / "tokenizer.json").read_text())
    write(folder, tokenizer=spec | {"normalizer": None})
    assert load(folder).encode("ﬁve ①") != hub(trained).encode("ﬁve ①", add_special_tokens=False)
