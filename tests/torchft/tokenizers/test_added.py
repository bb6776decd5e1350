"""Added tokens against Hugging Face's matching: longest first, lstrip, rstrip, single_word, white-space tokens."""

import unicodedata
from dataclasses import replace

import pytest
from tokenizers import AddedToken as HubAddedToken
from vocabularies import byte_level, random_texts, write

from torchft.tokenizers import bpe, load
from torchft.tokenizers.added import AddedToken, AddedTokens

FLAGS = [
    HubAddedToken("<a>", special=True, normalized=False),
    HubAddedToken("<a><b>", special=True, normalized=False),
    HubAddedToken("<l>", special=True, normalized=False, lstrip=True),
    HubAddedToken("<r>", special=True, normalized=False, rstrip=True),
    HubAddedToken("<lr>", special=False, normalized=False, lstrip=True, rstrip=True),
    HubAddedToken("word", special=False, normalized=False, single_word=True),
    HubAddedToken("   ", special=False, normalized=False),
    HubAddedToken("[MASK]", special=True, normalized=False, lstrip=True, single_word=True),
]


def is_assigned(char):
    return unicodedata.category(char) != "Cn"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    hub = byte_level(bpe.PATTERNS["GPT-2"], special=["<eos>"])
    hub.add_tokens(FLAGS)
    folder = write(tmp_path_factory.mktemp("flags"), tokenizer_config={"eos_token": "<eos>"})
    hub.save(str(folder / "tokenizer.json"))
    return load(folder), hub


def test_flags_are_hugging_faces(pair):
    tokenizer, hub = pair
    pieces = [*(t.content for t in FLAGS), "sword", "word ", "  ", "<a", "<a><", "é"]
    # code points newer than Python's tables are letters to Rust's and unassigned to Python's: not compared
    texts = [text for text in random_texts(4000, 5, pieces) if all(map(is_assigned, text))]
    texts += ["<a><b>", "x <l> y", "<r>  <l> ", "word,word words _word", "a    b", "\u2003<lr>\x1c<lr>\n"]
    assert [tokenizer.encode(text) for text in texts] == [
        e.ids for e in hub.encode_batch(texts, add_special_tokens=False)
    ]


def test_white_space_tokens_are_ordinary_text(pair):
    """Vocabularies such as GPT-NeoX's list runs of spaces as added tokens; user text must use them too."""
    tokenizer, hub = pair
    ids = tokenizer.encode("a   b <a>", control=False)
    assert ids == hub.encode("a   b <", add_special_tokens=False).ids + hub.encode("a>", add_special_tokens=False).ids


def test_normalized_tokens_are_found_in_what_the_others_leave():
    """A token that takes the white space before it is older than a run of spaces; in a gap runs are found as ever."""
    run = AddedToken(content="  ", id=0, normalized=True)
    mask = AddedToken(content="[M]", id=1, special=True, lstrip=True)
    text = "a  b  [M]  "
    assert list(AddedTokens([run, mask]).find(text, [(len(text), True)])) == [(1, 3, 0), (4, 9, 1), (9, 11, 0)]
    at_once = AddedTokens([replace(run, normalized=False), mask])
    assert list(at_once.find(text, [(len(text), True)])) == [(1, 3, 0), (4, 6, 0), (6, 9, 1), (9, 11, 0)]
