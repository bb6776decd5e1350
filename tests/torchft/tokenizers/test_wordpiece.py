"""WordPiece against transformers: ids and texts, from tokenizer.json and from vocab.txt, with and without case."""

import pickle

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer
from vocabularies import corpus, random_texts, write

from torchft.errors import UserError
from torchft.files import read_json
from torchft.tokenizers import load

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NAMED = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
PIECES = [
    *SPECIAL,
    "##ing",
    "don't",
    "a.b",
    "Σας",
    "ΑΣ",
    "İ",
    "学习",
    "e\u0301",
    "x" * 101,
    "«»",
    "$+<=>^`|~",
    "\u200d",
]


def trained(lowercase):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


@pytest.fixture(scope="module", params=[(True, "json"), (False, "json"), (True, "txt"), (False, "txt")], ids=str)
def pair(request, tmp_path_factory):
    lowercase, kind = request.param
    folder = tmp_path_factory.mktemp("bert")
    write(folder, tokenizer_config=NAMED | {"tokenizer_class": "BertTokenizer", "do_lower_case": lowercase})
    tokenizer = trained(lowercase)
    if kind == "json":
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in vocab), encoding="utf-8")
    return load(folder), BertTokenizer.from_pretrained(folder)


def test_ids(pair):
    ours, theirs = pair
    texts = [*corpus(seed=1, num_lines=300), *random_texts(600, 0, PIECES)]
    differs = [t for t in texts if ours.encode(t) != theirs(t, add_special_tokens=False)["input_ids"]]
    assert differs == []
    for text in texts[:50]:
        assert ours.encode(text, add_special_tokens=True) == theirs(text)["input_ids"]
    assert ours.vocab_size == len(theirs)


def test_control_tokens_in_data_are_plain_text(pair):
    ours, _ = pair
    sep = ours.encode("[SEP]")
    assert sep == [ours.eos_id] and ours.eos_id not in ours.encode("[SEP]", control=False)


def test_decode(pair):
    ours, theirs = pair
    for text in corpus(seed=2, num_lines=100):
        ids = ours.encode(text, add_special_tokens=True)
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_pairs(pair):
    ours, theirs = pair
    texts = [*corpus(seed=3, num_lines=60), "a", "b"]
    for i, (one, other) in enumerate(zip(texts, reversed(texts))):
        room = 4 + i % 40
        want = theirs(one, other, truncation=True, max_length=room, split_special_tokens=True)["input_ids"]
        assert ours.encode_pair_within(one, other, room) == want


def test_it_pickles(pair):
    ours, _ = pair
    again = pickle.loads(pickle.dumps(ours))
    assert again.encode("Größe 学习 don't") == ours.encode("Größe 学习 don't")


def test_what_is_unknown_is_refused(tmp_path):
    write(tmp_path, tokenizer_config=NAMED)
    trained(True).save(str(tmp_path / "tokenizer.json"))
    spec = read_json(tmp_path / "tokenizer.json")
    write(tmp_path, tokenizer=spec | {"pre_tokenizer": {"type": "Whitespace"}})
    with pytest.raises(UserError, match=r"pre_tokenizer is .*Whitespace"):
        load(tmp_path)
