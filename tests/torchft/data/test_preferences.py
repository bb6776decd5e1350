"""Rows that judge answers: tokens and masks by hand, what is refused with its row and field, and batches of pairs."""

import pytest
import torch
from letters import BOS, END, EOS, ROLES, Letters, turns, write_jsonl

from torchft.data.loader import Loader
from torchft.data.mixture import mix
from torchft.data.preferences import auto, pairs, scored, stepwise, unpaired
from torchft.errors import UserError

USER, ASSISTANT = ROLES["user"], ROLES["assistant"]
NAMES = {BOS: "<bos>", EOS: "<eos>", END: "<end>"} | {v: f"<{k}>" for k, v in ROLES.items()}


def build(builder, tmp_path, rows, *, seq_len=100, has_chat=True, **options):
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    return builder(path, tokenizer=Letters(has_chat=has_chat), seq_len=seq_len, **options).samples()


def documents(samples, index=0):
    """Each document's text with [ ] around what is trained: labels put back where their tokens are."""
    found = []
    for place in samples.documents(index):
        tokens, labels = samples.tokens[place].tolist(), samples.labels[place].tolist()
        trained = [False] + [label != -100 for label in labels[:-1]]
        assert labels[-1] == -100
        assert all(y in (-100, t) for y, t in zip(labels, tokens[1:]))
        pieces = [f"[{NAMES.get(t, chr(t))}]" if on else NAMES.get(t, chr(t)) for t, on in zip(tokens, trained)]
        found.append("".join(pieces).replace("][", ""))
    return found


def refused(builder, tmp_path, rows, **options):
    with pytest.raises(UserError) as e:
        build(builder, tmp_path, rows, **options)
    return str(e.value)


USER_HI = {"role": "user", "content": "Hi"}
GOOD, BAD = ({"role": "assistant", "content": c} for c in ("Yo", "No"))
CHAT = ["<bos><user>Hi<end><assistant>[Yo<end>]", "<bos><user>Hi<end><assistant>[No<end>]"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Yo", "rejected": "No"},
        {"prompt": [USER_HI], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER_HI], "chosen": GOOD, "rejected": "No"},
        {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER_HI, GOOD], "rejected": [USER_HI, BAD]},
        {"prompt": "Hi", "chosen": [USER_HI, GOOD], "rejected": [USER_HI, BAD]},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Yo"},
            "rejected": {"from": "gpt", "value": "No"},
        },
    ],
)
def test_every_way_to_write_a_pair(tmp_path, row):
    assert documents(build(pairs, tmp_path, [row])) == CHAT


def test_columns_of_another_name(tmp_path):
    row = {"question": "Hi", "response_j": "Yo", "response_k": "No"}
    names = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
    assert documents(build(pairs, tmp_path, [row], column_map=names)) == CHAT


def test_only_what_follows_the_shared_turns_is_trained(tmp_path):
    chosen, rejected = (turns("Hi", "Yo", "A?", last)["messages"] for last in ("B", "C"))
    shared = "<bos><user>Hi<end><assistant>Yo<end><user>A?<end><assistant>"
    found = documents(build(pairs, tmp_path, [{"chosen": chosen, "rejected": rejected}]))
    assert found == [f"{shared}[B<end>]", f"{shared}[C<end>]"]
    rejected = turns("Hi", "Yo", "C?", "D")["messages"]  # conversations that part with a question
    found = documents(build(pairs, tmp_path, [{"chosen": chosen, "rejected": rejected}]))
    assert found[1] == "<bos><user>Hi<end><assistant>Yo<end><user>C?<end><assistant>[D<end>]"


def test_plain_text(tmp_path):
    """Of a checkpoint without a chat format, or with no prompt of its own: the answer starts at a word."""
    row = {"prompt": "Hi:", "chosen": " Yo", "rejected": " No"}
    found = documents(build(pairs, tmp_path, [row], has_chat=False))
    assert found == ["<bos>Hi:[ Yo<eos>]", "<bos>Hi:[ No<eos>]"]
    row = {"chosen": "Q: it\nA: the cat", "rejected": "Q: it\nA: the cow"}
    found = documents(build(pairs, tmp_path, [row]))
    assert found == ["<bos>Q: it\nA: the[ cat<eos>]", "<bos>Q: it\nA: the[ cow<eos>]"]
    row = {"chosen": "Q: it\nA: the", "rejected": "Q: it\nA: the cow"}
    assert documents(build(pairs, tmp_path, [row])) == ["<bos>Q: it\nA:[ the<eos>]", "<bos>Q: it\nA:[ the cow<eos>]"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "Hi", "chosen": "Yo"}, "no column 'rejected'"),
        ({"prompt": "Hi", "chosen": "Yo", "rejected": None}, "'rejected' is empty: a pair needs both answers"),
        ({"prompt": "Hi", "chosen": [], "rejected": "No"}, "'chosen' is empty"),
        ({"prompt": "Hi", "chosen": "Yo", "rejected": "Yo"}, "'chosen' and 'rejected' are the same"),
        ({"prompt": "Hi", "chosen": [GOOD], "rejected": "Yo"}, "become the same tokens"),
        (
            {"chosen": [USER_HI, GOOD], "rejected": [{"role": "user", "content": "Ho"}, BAD]},
            "answer different prompts: their first messages differ",
        ),
        ({"chosen": "Yo", "rejected": "No"}, "texts that begin differently"),
        ({"prompt": "Hi", "chosen": [{"text": "Yo"}], "rejected": [BAD]}, "'chosen': 'messages' must list"),
    ],
)
def test_d22_pairs_that_prefer_nothing(tmp_path, row, problem):
    """By the row's place, and refused unless bad rows are dropped."""
    good = {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}
    message = refused(pairs, tmp_path, [good, row])
    assert f"{tmp_path / 'd.jsonl'}:2: " in message and problem in message
    samples = build(pairs, tmp_path, [good, row, good], bad_rows="drop")
    assert len(samples) == 2 and samples.counts.dropped == {"broken": 1}


def test_no_answer_is_cut(tmp_path):
    """seq_len bounds both documents together."""
    long, short = ({"prompt": "Hi", "chosen": "Yo" * n, "rejected": "No"} for n in (20, 1))
    whole = build(pairs, tmp_path, [short])
    assert len(whole[0].tokens) == 18 and whole[0].border == 9
    samples = build(pairs, tmp_path, [long, short], seq_len=18)
    assert documents(samples) == CHAT and samples.counts.dropped == {"too long": 1}
    assert "18 tokens are more than seq_len 17" in refused(pairs, tmp_path, [short], seq_len=17, too_long="error")


def test_cutting_is_refused(tmp_path):
    assert "dataset.too_long: an answer that is judged is never cut" in refused(
        pairs, tmp_path, [{"prompt": "Hi", "chosen": "Yo", "rejected": "No"}], too_long="truncate"
    )


def test_margins(tmp_path):
    rows = [{"prompt": "Hi", "chosen": "Yo", "rejected": "No", "margin": m} for m in (2, 0.5)]
    samples = build(pairs, tmp_path, rows, margin_column="margin")
    assert [sample.targets for sample in samples] == [(2.0,), (0.5,)]
    assert "'margin' must be a number, found 'x'" in refused(
        pairs, tmp_path, [rows[0] | {"margin": "x"}], margin_column="margin"
    )


def test_good_and_bad_answers(tmp_path):
    labels = (True, False, 1, 0, 1.0, "false")
    rows = [{"prompt": "Hi", "completion": "Yo", "label": label} for label in labels]
    rows.append(turns("Hi", "Yo") | {"label": True})
    samples = build(unpaired, tmp_path, rows)
    assert [sample.targets for sample in samples] == [(1.0,), (0.0,), (1.0,), (0.0,), (1.0,), (0.0,), (1.0,)]
    assert all(documents(samples, i) == CHAT[:1] for i in range(7)) and not samples.are_pairs
    for label in ("maybe", 2, None, 0.5):
        message = refused(unpaired, tmp_path, [rows[0], rows[1] | {"label": label}])
        assert f":2: label is {label!r}: a judgement is true or 1, false or 0" in message
    assert "no column 'label'" in refused(unpaired, tmp_path, [turns("Hi", "Yo")])
    assert "no answer to judge" in refused(unpaired, tmp_path, [turns("Hi", "Yo", "A?") | {"label": 1}])


def test_scores(tmp_path):
    rows = [turns("Hi", "Yo") | {"help": 4, "truth": 0.5}]
    samples = build(scored, tmp_path, rows, scores=["truth", "help"])
    assert samples[0].targets == (0.5, 4.0) and samples.num_targets == 2 and documents(samples) == CHAT[:1]
    for value in (None, "5", True, float("inf")):
        assert "'help' must be a number" in refused(scored, tmp_path, [rows[0] | {"help": value}], scores=["help"])
    assert "no column 'style'" in refused(scored, tmp_path, rows, scores=["style"])


def test_steps(tmp_path):
    """A step's label stands at its last token, the line break."""
    row = {"prompt": "Hi", "completions": ["a b", "c"], "labels": [True, 0]}
    (sample,) = build(stepwise, tmp_path, [row])
    text = "".join(NAMES.get(t, chr(t)) for t in sample.tokens)
    assert text == "<bos><user>Hi<end>a b\nc\n"
    assert sample.labels == [-100] * 8 + [1, -100, 0]
    for changes, problem in (
        ({"labels": [True]}, "'completions' has 2 steps, but 'labels' has 1"),
        ({"labels": [True, "?"]}, "labels[1] is '?': a judgement is"),
        ({"completions": ["a", None]}, "'completions[1]' is empty"),
        ({"completions": "a"}, "'completions' must be a list"),
    ):
        assert problem in refused(stepwise, tmp_path, [row | changes], empty_rows="error")


def three_pairs(tmp_path):
    rows = [
        {"prompt": p, "chosen": c, "rejected": r} for p, c, r in (("a", "bbb", "c"), ("d", "e", "ff"), ("g", "h", "i"))
    ]
    return build(pairs, tmp_path, rows, seq_len=40)


@pytest.mark.parametrize("packed", [True, False])
def test_batches_say_which_document_is_which(tmp_path, packed):
    """Both of a pair in one row, positions from 0 in each; the sums of a pair are found by its documents."""
    samples = three_pairs(tmp_path)
    seen = {}
    for batch in Loader(samples, batch_size=2, seed=0, packed=packed, one_shape=True):
        ids = (batch.positions == 0).flatten().cumsum(0).view_as(batch.positions) - 1
        assert batch.documents == (ids.max() + 1, batch.positions.max() + 1, False)
        assert batch.all_samples == len(batch.samples) == len(batch.documents_of)
        for sample, documents_of in zip(batch.samples, batch.documents_of.tolist()):
            places = [(ids == document).nonzero() for document in documents_of]
            assert places[0][0, 0] == places[1][0, 0] and places[0][-1, 1] + 1 == places[1][0, 1]
            seen[sample] = [batch.tokens[place[:, 0], place[:, 1]].tolist() for place in places]
            for place, tokens in zip(places, seen[sample]):
                assert batch.positions[place[:, 0], place[:, 1]].tolist() == list(range(len(tokens)))
    assert seen == {i: [samples.tokens[place].tolist() for place in samples.documents(i)] for i in range(3)}


def test_targets_travel_with_their_samples(tmp_path):
    rows = [turns("Hi", "Yo" * n) | {"help": n, "truth": -n} for n in (1, 2, 3)]
    samples = build(scored, tmp_path, rows, scores=["help", "truth"])
    (batch,) = Loader(samples, batch_size=3, seed=0, packed=True)
    assert batch.targets.tolist() == [[i + 1.0, -i - 1.0] for i in batch.samples]
    assert batch.documents_of.tolist() == [[0], [1], [2]] and batch.to("cpu").targets.dtype == torch.float32


def test_a_rank_without_rows_has_no_pairs(tmp_path):
    samples = three_pairs(tmp_path)
    batches = [next(iter(Loader(samples, batch_size=3, seed=0, rank=r, num_ranks=2))) for r in (0, 1)]
    assert [len(batch.documents_of) for batch in batches] == [3, 0]
    assert batches[1].documents_of.shape == (0, 2) and batches[1].all_samples == 3


def test_data_sets_of_two_kinds_are_not_mixed(tmp_path):
    one = pairs(
        write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        tokenizer=Letters(),
        seq_len=40,
    )
    two = unpaired(write_jsonl(tmp_path / "u.jsonl", [turns("a", "b") | {"label": 1}]), tokenizer=Letters(), seq_len=40)
    assert mix([one, one]).borders.tolist() == [7, 7] and mix([two, two]).targets.tolist() == [1, 1]
    with pytest.raises(UserError, match=r"datasets: .*u.jsonl holds another kind of samples"):
        mix([one, two])


def test_the_fingerprint_sees_borders_and_targets(tmp_path):
    rows = [{"prompt": "Hi", "completion": "Yo", "label": label} for label in (1, 0)]
    prints = {build(unpaired, tmp_path, [row]).fingerprint() for row in rows}
    assert len(prints) == 2
    samples = three_pairs(tmp_path)
    before = samples.fingerprint()
    samples.borders[0] += 1
    samples._fingerprint = ""
    assert samples.fingerprint() != before


@pytest.mark.parametrize(
    ("row", "builder"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, pairs),
        ({"prompt": "Q", "completion": "A", "label": False}, unpaired),
        ({"prompt": "Q", "completions": ["A", "B"], "labels": [True, False]}, stepwise),
    ],
)
def test_auto_by_the_first_row(tmp_path, row, builder):
    path = write_jsonl(tmp_path / "auto.jsonl", [row])
    how = {"tokenizer": Letters(), "seq_len": 99}
    assert list(auto(path, **how).samples()) == list(builder(path, **how).samples())
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "Q", "completion": "A"}])
    with pytest.raises(UserError, match=r"other.jsonl:1: no column 'chosen', 'rejected'"):
        auto(other, **how).samples()
