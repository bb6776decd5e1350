"""Texts with labels and scores: documents, targets, cuts, and rows that are refused."""

import pytest
import torch
import transformers
from letters import write_jsonl

from torchft import tokenizers
from torchft.data.labelled import candidates, classes, graded, label_names
from torchft.data.loader import Loader
from torchft.data.preferences import check_judged
from torchft.errors import UserError

LABELS = ["no", "yes"]
WORDS = "red green blue one two three".split()  # noqa: SIM905
ROWS = [
    {"text": "red", "other": "one two", "label": "yes", "labels": ["yes", "no"], "flag": True, "grade": 0.5},
    {"text": "green blue", "other": "three", "label": "no", "labels": [], "flag": False, "grade": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def samples_of(builder, tmp_path, folder, rows=ROWS, **options):
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    return builder(source, tokenizer=tokenizers.load(folder), seq_len=64, **options).samples()


def documents(samples):
    return [[samples.tokens[p].tolist() for p in samples.documents(i)] for i in range(len(samples))]


def test_classes(tmp_path, folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    one = samples_of(classes, tmp_path, folder, labels=LABELS)
    assert documents(one) == [[theirs(row["text"])["input_ids"]] for row in ROWS]
    assert one.targets.tolist() == [0, 1, 1, 0]
    two = samples_of(classes, tmp_path, folder, labels=LABELS, text_pair="other", text_len=5)
    want = [theirs(row["text"], row["other"], truncation=True, max_length=5)["input_ids"] for row in ROWS]
    assert documents(two) == [[ids] for ids in want]
    flags = samples_of(classes, tmp_path, folder, labels=["true", "false"], label="flag")
    assert flags.targets.tolist() == [1, 0, 0, 1]
    several = samples_of(classes, tmp_path, folder, labels=LABELS, label="labels", several=True)
    assert several.targets.tolist() == [1, 1, 0, 0]
    check_judged(one, "classes", why="a loss")
    with pytest.raises(UserError, match=r"needs data of another kind: .*with one label for each row"):
        check_judged(several, "classes", why="a loss")
    check_judged(several, "scored", why="a loss")


def test_graded(tmp_path, folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    samples = samples_of(graded, tmp_path, folder, scores=["grade"], text="text", text_pair="other")
    assert documents(samples) == [[theirs(row["text"], row["other"])["input_ids"]] for row in ROWS]
    assert samples.targets.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("num_negatives", [1, 2])
def test_candidates(tmp_path, folder, num_negatives):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [{"query": "red", "positive": "one", "negative": ["two", "three"]}]
    samples = samples_of(candidates, tmp_path, folder, rows, num_negatives=num_negatives)
    want = [theirs("red", word)["input_ids"] for word in ["one", "two", "three"][: 1 + num_negatives]]
    assert documents(samples) == [want]
    assert (samples.are_pairs, samples.are_several) == (num_negatives == 1, num_negatives == 2)
    check_judged(samples, "candidates", why="a loss")
    if num_negatives == 2:
        with pytest.raises(UserError, match=r"another kind: torchft\.data\.preferences\.pairs"):
            check_judged(samples, "pairs", why="a loss")


@pytest.mark.parametrize("padding_apart", [False, True])
def test_padding_is_a_document_if_wanted(tmp_path, folder, padding_apart):
    samples = samples_of(classes, tmp_path, folder, labels=LABELS)
    (batch,) = Loader(samples, batch_size=2, seed=0, shuffle=False, padding_apart=padding_apart)
    if not padding_apart:
        assert batch.positions is None
        return
    assert (batch.positions == 0).sum(1).tolist() == [2, 2] and batch.documents_of.tolist() == [[0], [2]]
    assert batch.positions[0, :4].tolist() == [0, 1, 2, 0] and torch.equal(batch.tokens[0, 3:], torch.zeros(61))


@pytest.mark.parametrize(
    ("builder", "options", "row", "message"),
    [
        (classes, {"labels": LABELS}, {"text": "a", "label": "yess"}, "'yess', which is none of the labels no, yes"),
        (classes, {"labels": LABELS}, {"text": "a", "label": None}, "'label' is 'null', which is none of"),
        (classes, {"labels": LABELS}, {"text": "a"}, "label"),
        (classes, {"labels": LABELS, "several": True}, {"text": "a", "label": "no"}, "must be a list of labels"),
        (classes, {"labels": LABELS, "text_pair": "b"}, {"text": "a", "label": "no"}, "'b'"),
        (graded, {"scores": ["s"]}, {"query": "a", "document": "b", "s": "high"}, "'s' must be a number, found 'high'"),
        (candidates, {}, {"query": "a", "positive": "b", "negative": []}, "has 0 texts, but num_negatives is 1"),
        (candidates, {}, {"query": "a", "positive": "b", "negative": "b"}, "cannot be right and wrong"),
    ],
)
def test_bad_rows_are_named(tmp_path, folder, builder, options, row, message):
    first = {"text": "x", "label": ["no"] if "several" in options else "no", "b": "y", "query": "q", "document": "d",
             "s": 1, "positive": "one", "negative": ["two"]}  # fmt: skip
    with pytest.raises(UserError, match=message) as e:
        samples_of(builder, tmp_path, folder, [first, row], **options)
    assert "rows.jsonl:2" in str(e.value)


def test_bad_settings_are_named(tmp_path, folder):
    for builder, options, message in (
        (classes, {"labels": ["a"]}, "are not 2 different labels or more"),
        (classes, {"labels": ["a", "b", "a"]}, "are not 2 different labels"),
        (graded, {"scores": []}, "name at least one column"),
        (candidates, {"num_negatives": 0}, "leaves nothing to compare with"),
        (candidates, {"text_len": 4}, "leave no room for texts"),
    ):
        with pytest.raises(UserError, match=message):
            samples_of(builder, tmp_path, folder, **options)
    with pytest.raises(UserError, match="all data sets need the same ones in the same order"):
        label_names([{"labels": ["a", "b"]}, {"labels": ["b", "a"]}], num_scores=2)
    assert label_names([{}, {}], num_scores=2) == ["score_0", "score_1"]
