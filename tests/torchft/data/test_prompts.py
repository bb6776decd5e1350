"""Rows of several forms as questions."""

import pytest
from letters import turns, write_jsonl

from torchft.data.prompts import prompts
from torchft.errors import UserError

ASKED = [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (turns("2+2?", "4"), "4"),
        (turns("2+2?"), ""),
        ({"prompt": "2+2?"}, ""),
        ({"prompt": "2+2?", "answer": "4"}, "4"),
        ({"prompt": ASKED, "level": 3}, ""),
        ({"prompt": "2+2?", "completion": "4"}, "4"),
        ({"instruction": "2+2?", "output": "4"}, "4"),
    ],
)
def test_forms(tmp_path, row, answer):
    [found] = prompts(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert (found.messages, found.answer, found.values) == (ASKED, answer, row)
    assert found.where.endswith("a.jsonl:1")


def test_column_map_and_system(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "2+2?", "solution": "4"}])
    columns = {"prompt": "question", "answer": "solution"}
    [found] = prompts(path, column_map=columns, new_system_prompt="Think.")
    assert found.messages == [{"role": "system", "content": "Think."}, *ASKED] and found.answer == "4"


@pytest.mark.parametrize(
    "row", [{"foo": "bar"}, {"prompt": ""}, turns(), {"messages": [turns("a", "b")["messages"][1]]}]
)
def test_rows_without_a_question_are_named(tmp_path, row):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "fine"}, row])
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        prompts(path)
