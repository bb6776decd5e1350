"""Conditions on columns: which rows stay, and what is refused with its place."""

import pytest

from torchft.data.filters import check, passes
from torchft.data.messages import RowError
from torchft.errors import UserError

ROW = {"language": "en", "score": 4, "text": "abc 1", "meta": {"license": None}, "missing": float("nan"), "a.b": 7}


@pytest.mark.parametrize(
    ("filters", "stays"),
    [
        ({}, True),
        ({"language": "en"}, True),
        ({"language": "de"}, False),
        ({"language": ["de", "en"]}, True),
        ({"language": {"not": "en"}}, False),
        ({"language": {"not": ["de", "fr"]}}, True),
        ({"score": {"min": 4}}, True),
        ({"score": {"min": 4.5}}, False),
        ({"score": {"max": 4, "min": 3}}, True),
        ({"score": {"max": 3}}, False),
        ({"text": {"matches": r"\d$"}}, True),
        ({"text": {"matches": r"^\d"}}, False),
        ({"text": {"min_chars": 5, "max_chars": 5}}, True),
        ({"text": {"min_chars": 6}}, False),
        ({"text": {"max_chars": 4}}, False),
        ({"meta.license": None}, True),
        ({"meta.license": {"not": None}}, False),
        ({"missing": {"min": 0}}, False),  # NaN is null
        ({"missing": {"not": [None]}}, False),
        ({"a.b": 7}, True),
        ({"language": "en", "score": 5}, False),
    ],
)
def test_conditions(filters, stays):
    check(filters)
    assert passes(ROW, filters) is stays


def test_refusals():
    with pytest.raises(UserError) as e:
        check({"a": {"mim": 1}, "b": {"matches": "("}, "c": {"min_chars": "x"}})
    assert [str(p).split(":")[0] for p in e.value.problems] == [
        "dataset.filters.a",
        "dataset.filters.b.matches",
        "dataset.filters.c.min_chars",
    ]
    assert "did you mean 'min'" in str(e.value)
    with pytest.raises(RowError, match=r"no column 'lang' \(did you mean 'language'"):
        passes(ROW, {"lang": "en"})
    with pytest.raises(RowError, match=r"filters.text: .* does not fit str 'abc 1'"):
        passes(ROW, {"text": {"min": 3}})
