"""Shifted labels, cuts and policies against hand-written ones; faults D6, D8, D10, D11, D15."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchft.data.collect import collect
from torchft.data.messages import EmptyError, RowError
from torchft.data.samples import Encoded, Limits, Sample, cut, shift
from torchft.data.sources import Row
from torchft.errors import UserError

N = -100


def collected(rows, **limits):
    """Collect rows that are (tokens, trained) already, or an error to raise."""

    def encode(values):
        if "error" in values:
            raise values["error"]
        return Encoded(*values["encoded"])

    made = [{"error": r} if isinstance(r, Exception) else {"encoded": r} for r in rows]
    limits = Limits(**({"seq_len": 4, "too_long": "truncate"} | limits))
    return collect((Row("f.jsonl", n, values) for n, values in enumerate(made, 1)), encode, limits, pad_id=0)


def test_shift():
    sample = shift([5, 6, 7, 8], [False, False, True, True])
    assert sample == Sample(tokens=[5, 6, 7, 8], labels=[N, 7, 8, N])
    assert shift([5, 6, 7], [True, False, True]).labels == [N, 7, N]  # nothing predicts the first token
    assert shift([5], [True]).labels == [N]


def test_d15_pad_equal_to_eos_keeps_eos_supervised():
    samples = collected([([5, 6, 0], [False, True, True])])  # 0 is both the end and the padding
    assert samples[0].labels == [6, 0, N]


@given(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=20))
def test_d16_a_label_is_the_next_token_or_ignored(row):
    tokens, train = zip(*row)
    sample = shift(list(tokens), list(train))
    assert all(label in (N, after) for label, after in zip(sample.labels, [*tokens[1:], N], strict=True))


@given(st.integers(1, 50), st.integers(2, 12))
def test_split_pieces_predict_each_token_once(length, seq_len):
    tokens = list(range(length))
    pieces = [shift(p.tokens, p.train) for p in cut(Encoded(tokens, [True] * length), seq_len, split=True)]
    assert all(len(p.tokens) <= seq_len for p in pieces)
    predicted = [(t, y) for p in pieces for t, y in zip(p.tokens, p.labels) if y != N]
    assert predicted == [(i, i + 1) for i in range(length - 1)]


def test_d10_truncate_keeps_the_beginning_and_appends_nothing():
    samples = collected([([1, 2, 3, 4, 5, 6], [False] * 2 + [True] * 4), ([1, 2, 3, 4], [True] * 4)])
    assert samples[0] == Sample(tokens=[1, 2, 3, 4], labels=[N, 3, 4, N])
    assert samples[1] == Sample(tokens=[1, 2, 3, 4], labels=[2, 3, 4, N])
    assert (samples.counts.truncated, samples.counts.longest, samples.counts.rows) == (1, 6, 2)
    assert not samples.counts.dropped


def test_d10_drop_error_and_split():
    rows = [([1, 2, 3, 4, 5, 6], [True] * 6), ([1, 2], [True] * 2)]
    dropped = collected(rows, too_long="drop")
    assert len(dropped) == 1 and dropped.counts.dropped == Counter({"too long": 1})
    with pytest.raises(UserError, match=r"f.jsonl:1: 6 tokens are more than seq_len 4; raise seq_len, or too_long:"):
        collected(rows, too_long="error")
    split = collected(rows, too_long="split")
    assert [s.tokens for s in (split[0], split[1], split[2])] == [[1, 2, 3, 4], [4, 5, 6], [1, 2]]
    assert [split.where(i) for i in range(3)] == ["f.jsonl:1", "f.jsonl:1", "f.jsonl:2"]
    assert split.counts.split == 1 and split.counts.truncated == 0


def test_d8_sample_without_supervised_token_is_dropped_and_counted():
    cut_off = ([1, 2, 3, 4, 5], [False] * 4 + [True])
    nothing = ([1, 2], [False, False])
    first_only = ([1, 2], [True, False])  # nothing can predict the first token
    samples = collected([cut_off, nothing, first_only, ([1, 2], [False, True])])
    assert len(samples) == 1 and samples.where(0) == "f.jsonl:4"
    assert samples.counts.dropped == Counter({"cut before the first trained token": 1, "nothing to train on": 2})
    assert samples.counts.truncated == 0  # only rows that were kept


def test_d11_no_sample_is_longer_than_a_pack():
    rows = [(list(range(n)), [True] * n) for n in range(2, 30)]
    for too_long in ("truncate", "split", "drop"):
        assert max(collected(rows, too_long=too_long).lengths()) <= 4


def test_d6_empty_rows_are_dropped_or_reported():
    rows = [EmptyError("assistant message is empty"), ([1, 2], [True, True])] * 2
    samples = collected(rows)
    assert len(samples) == 2 and samples.counts.dropped == Counter({"empty": 2})
    with pytest.raises(UserError, match=r"^f.jsonl:1 and 1 more rows: assistant message is empty \(to skip"):
        collected(rows, empty_rows="error")


def test_bad_rows_are_reported_together_or_dropped():
    rows = [RowError(f"fault {i % 7}") for i in range(21)] + [([1, 2], [True, True])]
    with pytest.raises(UserError) as e:
        collected(rows)
    assert len(e.value.problems) == 6
    assert e.value.problems[1] == "f.jsonl:2 and 2 more rows: fault 1 (to skip such rows: bad_rows: drop)"
    assert e.value.problems[5] == "6 other rows have problems too"
    assert collected(rows, bad_rows="drop").counts.dropped == Counter({"broken": 21})


def test_reading_stops_when_all_is_bad():
    def endless():
        while True:
            yield Row("f.jsonl", 1, {})

    def encode(values):
        raise RowError("always")

    with pytest.raises(UserError, match="stopped reading after 1000 bad rows"):
        collect(endless(), encode, Limits(seq_len=4, too_long="truncate"), pad_id=0)


def test_origins_and_bounds():
    rows = [Row(origin, n, {}) for origin in ("a", "b:c", "a") for n in (1, 2)]
    samples = collect(rows, lambda _: Encoded([1, 2], [True] * 2), Limits(seq_len=4, too_long="drop"), pad_id=0)
    assert [samples.where(i) for i in range(6)] == ["a:1", "a:2", "b:c:1", "b:c:2", "a:1", "a:2"]
    with pytest.raises(IndexError):
        samples[6]
    with pytest.raises(IndexError):
        samples[-1]


def test_fingerprint_sees_tokens_labels_and_borders():
    one = collected([([1, 2, 3], [True] * 3)])
    assert one.fingerprint() == collected([([1, 2, 3], [True] * 3)]).fingerprint()
    for other in ([([1, 2, 4], [True] * 3)], [([1, 2, 3], [True, False, True])], [([1, 2], [True] * 2), ([3], [True])]):
        assert collected(other).fingerprint() != one.fingerprint()


def test_seq_len_must_leave_something_to_predict():
    with pytest.raises(UserError, match="seq_len: 1"):
        Limits(seq_len=1, too_long="drop")
