"""ModernBERT's own layout of tokenizer.json, small, against transformers: GPT-2's byte-level BPE with NFC, runs of
spaces and markers as added tokens, [CLS] and [SEP] around a text."""

import json

import pytest
from tokenizers import AddedToken, processors
from vocabularies import byte_level, hub, random_texts, write

from torchft.tokenizers import bpe, load

SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
NAMED = {name: f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}
PIECES = [*SPECIAL, " [MASK] ", "|||IP_ADDRESS|||", "<|padding|>", "[unused0]", "  ", "   ", " " * 9, " " * 30, "\n  x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modernbert")
    made = byte_level(bpe.PATTERNS["GPT-2"], special=["<|padding|>"], nfc=True)
    made.add_tokens([AddedToken("|||IP_ADDRESS|||", normalized=True, special=False)])
    made.add_tokens([AddedToken(" " * n, normalized=True, special=False) for n in range(24, 1, -1)])
    made.add_tokens([AddedToken("[unused0]", normalized=True, special=False)])
    made.add_special_tokens([AddedToken(t, normalized=False, lstrip=t == "[MASK]") for t in SPECIAL])
    ids = {token: made.token_to_id(token) for token in ("[CLS]", "[SEP]")}
    made.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=list(ids.items())
    )
    made.save(str(folder / "tokenizer.json"))
    spec = json.loads(made.to_str())
    decoder = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in spec["added_tokens"]}
    config = {f"{name}_token": token for name, token in NAMED.items()}
    mask = decoder[str(made.token_to_id("[MASK]"))]
    return write(
        folder,
        tokenizer_config=config | {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder},
        special_tokens_map=config | {"mask_token": mask},
        config={"architectures": ["ModernBertModel"], "bos_token_id": ids["[CLS]"], "eos_token_id": ids["[SEP]"]},
    )


def test_ids_are_transformers(folder):
    tokenizer, oracle = load(folder), hub(folder)
    texts = random_texts(10_000, 8, PIECES)
    wanted = [e.ids for e in oracle.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    got = [tokenizer.encode(text) for text in texts]
    assert got == wanted
    assert [tokenizer.decode(ids) for ids in got] == [oracle.decode(ids) for ids in wanted]
    assert tokenizer.encode("Hello", add_special_tokens=True) == oracle("Hello").input_ids
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.separator_id, tokenizer.vocab_size) == (
        oracle.pad_token_id, oracle.sep_token_id, oracle.sep_token_id, len(oracle),
    )  # fmt: skip


def test_spaces_in_data_are_the_tokens_of_runs(folder):
    """User data has no control tokens, but runs of spaces are text."""
    tokenizer = load(folder)
    run = tokenizer.encode(" " * 9)
    assert len(run) == 1 and run[0] in tokenizer.encode(f"x{' ' * 9}[SEP]", control=False)
    assert tokenizer.separator_id not in tokenizer.encode("x [SEP]", control=False)


def test_pairs_are_transformers(folder):
    tokenizer, oracle = load(folder), hub(folder)
    texts = random_texts(300, 9, ["  ", " " * 9])
    for i, (one, other) in enumerate(zip(texts, reversed(texts))):
        room = 4 + i % 40
        want = oracle(one, other, truncation=True, max_length=room)["input_ids"]
        assert tokenizer.encode_pair_within(one, other, room) == want
