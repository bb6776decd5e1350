"""Which tokens are learned, against the definition: one of the token's bytes is of a wanted character."""

import random

import pytest
from vocabularies import QWEN_SPECIAL, byte_level, random_texts, train_sentencepiece

from torchft.errors import UserError
from torchft.files import read_json
from torchft.tokenizers import bpe, spm
from torchft.tokenizers.tokenizer import Tokenizer


def engine(kind, folder):
    if kind == "spm":
        train_sentencepiece(folder)
        return spm.from_model(folder / "tokenizer.model", prefix="first")[0]
    (folder / "tokenizer.json").write_text(byte_level(bpe.PATTERNS["Qwen 2"], special=QWEN_SPECIAL, nfc=True).to_str())
    return bpe.from_json(read_json(folder / "tokenizer.json"), set(), folder)


def by_definition(engine, text, wanted, ids):
    mask = bytearray()  # of each byte of the normalised text
    for end in range(1, len(text) + 1):
        num_bytes = len(engine.normalize(text[:end]).encode())
        mask += bytes([wanted[end - 1]]) * (num_bytes - len(mask))
    start, learned = 0, []
    for width in engine.widths(ids, text, at_start=True):
        learned.append(any(mask[start : start + max(width, 1)]))  # one of no width goes with what follows it
        start += width
    return learned


@pytest.mark.parametrize("kind", ["nfc", "spm"])
def test_learned_tokens_are_those_that_overlap(kind, tmp_path):
    tokenizer = Tokenizer.__new__(Tokenizer)
    tokenizer._engine = engine(kind, tmp_path)
    rng, compared = random.Random(0), 0
    for text in filter(None, random_texts(800, 5, ["é", "Å", " cat"])):
        wanted = bytearray()
        while len(wanted) < len(text):
            wanted += bytes([rng.randrange(2)]) * rng.randrange(1, 6)
        wanted = wanted[: len(text)]
        if kind == "nfc" and tokenizer._engine.normalize(text) != text:
            continue  # where composing crosses a border, the border is the implementation's to choose
        try:
            ids = tokenizer._engine.encode(text, at_start=True)
        except UserError:
            continue
        assert tokenizer._learned(text, wanted, ids, True) == by_definition(tokenizer._engine, text, wanted, ids), text
        compared += 1
    assert compared > 300
