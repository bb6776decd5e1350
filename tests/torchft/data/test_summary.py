"""What is counted, how it reads, and what refuses to start (faults D9, D13, D14, D17)."""

import pytest

from torchft.data.collect import collect
from torchft.data.messages import EmptyError
from torchft.data.samples import CONTROL_TEXT, Encoded, Limits, Notes
from torchft.data.sources import Row
from torchft.data.summary import summarise
from torchft.errors import UserError


def summary(*encoded, seq_len=4):
    def encode(values):
        if values["encoded"] is None:
            raise EmptyError("empty")
        return Encoded(*values["encoded"])

    rows = (Row("f", n, {"encoded": e}) for n, e in enumerate(encoded, 1))
    return summarise(collect(rows, encode, Limits(seq_len=seq_len, too_long="truncate"), pad_id=0))


LONG = ([1, 2, 3, 4, 90, 91], [False, False, True, True, True, True])
SHORT = ([1, 2, 60], [False, False, True], Notes([CONTROL_TEXT]))
UNTRAINED = ([1, 2], [False, False])


def test_counts_and_lines():
    found = summary(LONG, SHORT, UNTRAINED, None, None)
    assert (found.rows, found.samples, found.tokens, found.supervised) == (5, 2, 7, 3)
    assert (found.longest, found.truncated, found.notes, found.max_id) == (6, 1, {CONTROL_TEXT: 1}, 60)
    assert found.supervised_share == 3 / 7
    assert found.lines() == [
        "5 rows -> 2 samples, 7 tokens",
        "3 tokens supervised (42.9%)",
        "longest row 6 tokens (seq_len 4)",
        "1 rows truncated to seq_len (20.0%)",
        "2 rows dropped (40.0%): empty",
        "1 rows dropped (20.0%): nothing to train on",
        "1 rows spell a control token in their text; encoded as plain text",
    ]
    assert str(found).startswith("5 rows -> 2 samples")
    found.check(vocab_size=61, batch_size=2)


def test_d9_nothing_supervised_stops():
    with pytest.raises(
        UserError, match=r"none of 3 rows has a supervised token \(2 rows nothing to train on; 1 rows empty"
    ):
        summary(UNTRAINED, UNTRAINED, None).check(vocab_size=100, batch_size=1)
    with pytest.raises(UserError, match="1 rows cut before the first trained token"):
        summary(LONG, seq_len=2).check(vocab_size=100, batch_size=1)


def test_d14_ids_beyond_the_embedding_stop():
    with pytest.raises(UserError, match="token id 60 is outside the model's 60 embedding rows"):
        summary(SHORT).check(vocab_size=60, batch_size=1)


def test_d17_fewer_rows_than_one_batch_stop():
    with pytest.raises(UserError, match=r"batch_size 4 is more than the 2 samples of an epoch; lower batch_size"):
        summary(SHORT, SHORT).check(vocab_size=100, batch_size=4)


def test_all_problems_at_once():
    with pytest.raises(UserError) as e:
        summary(SHORT).check(vocab_size=50, batch_size=4)
    assert len(e.value.problems) == 2
