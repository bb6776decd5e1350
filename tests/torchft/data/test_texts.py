"""Texts that belong together: documents, special tokens, cuts, and rows that are refused."""

import pytest
import torch
from letters import write_jsonl
from vocabularies import byte_level, write

from torchft import tokenizers
from torchft.data.loader import Loader
from torchft.data.texts import check_lengths, texts
from torchft.errors import UserError
from torchft.tokenizers import bpe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write(
        folder, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    )
    byte_level(bpe.PATTERNS["Llama 3"], special=["<s>", "</s>"], llama=True).save(str(folder / "tokenizer.json"))
    return tokenizers.load(folder)


def samples_of(tmp_path, rows, tokenizer, **options):
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    return texts(source, tokenizer=tokenizer, seq_len=64, **options).samples()


def decoded(samples, tokenizer):
    return [
        [tokenizer.decode(samples.tokens[place].tolist()) for place in samples.documents(i)]
        for i in range(len(samples))
    ]


ROWS = [
    {"query": "red", "positive": "green", "negative": ["blue", "one"]},
    {"query": "two three", "positive": "four", "negative": ["five", "good", "day"]},
]


def test_documents_are_the_texts(tmp_path, tokenizer):
    samples = samples_of(tmp_path, ROWS, tokenizer, num_negatives=2, query_prompt="q: ", document_prompt="d: ")
    start, end = [*tokenizer.encode("", add_special_tokens=True), None, None][:2]
    around = [tokenizer.decode([i]) if i is not None else "" for i in (start, end)]
    want = [["q: red", "d: green", "d: blue", "d: one"], ["q: two three", "d: four", "d: five", "d: good"]]
    if end is None:
        around = [around[0], ""]
    assert decoded(samples, tokenizer) == [[f"{around[0]}{t}{around[1]}" for t in row] for row in want]
    longest = max(len(samples.tokens[p]) for i in range(2) for p in samples.documents(i))
    check_lengths(samples, longest)
    with pytest.raises(UserError, match=f"a text has {longest} tokens, but the model has {longest - 1} positions"):
        check_lengths(samples, longest - 1)


@pytest.mark.parametrize("packed", [False, True])
def test_batches_keep_documents_apart(tmp_path, tokenizer, packed):
    samples = samples_of(tmp_path, ROWS, tokenizer, num_negatives=1)
    (batch,) = Loader(samples, batch_size=1 + (not packed), seed=0, packed=packed)
    assert batch.documents_of.shape == (2, 3) and batch.positions is not None
    starts = (batch.positions == 0).flatten().nonzero()[:, 0]
    ends = torch.cat((starts[1:], torch.tensor([batch.tokens.numel()])))
    for sample, documents in zip(batch.samples, batch.documents_of.tolist()):
        for place, document in zip(samples.documents(sample), documents):
            got = batch.tokens.flatten()[starts[document] : ends[document]].tolist()
            assert got == samples.tokens[place].tolist()


def test_long_texts_lose_their_end_but_not_the_special_tokens(tmp_path, tokenizer):
    row = {"query": "red " * 40, "positive": "green"}
    samples = samples_of(tmp_path, [row], tokenizer, text_len=8)
    whole = tokenizer.encode("red " * 40, add_special_tokens=True)
    num_after = int(whole[-1] == tokenizer.eos_id)
    want = whole[: 8 - num_after] + whole[len(whole) - num_after :]
    assert samples.tokens[samples.documents(0)[0]].tolist() == want


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "a"}, "positive"),
        ({"query": "a", "positive": "b", "negative": ["b"]}, "cannot be right and wrong"),
        ({"query": "a", "positive": "b", "negative": []}, "has 0 texts, but num_negatives is 1"),
    ],
)
def test_bad_rows_are_named(tmp_path, tokenizer, row, message):
    with pytest.raises(UserError, match=message) as e:
        samples_of(tmp_path, [ROWS[0], row], tokenizer, num_negatives=1)
    assert "rows.jsonl:2" in str(e.value)
