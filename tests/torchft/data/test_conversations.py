"""Conversations to answer: any format of a data set, refused with their place if there is nothing to compare with."""

import pytest
from letters import turns, write_jsonl

from torchft.data.conversations import conversations
from torchft.errors import UserError


def test_formats_and_max_rows(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [turns("1+1?", "2"), turns("2+2?", "4"), turns("x", "y")])
    assert conversations(path, max_rows=2) == [turns("1+1?", "2")["messages"], turns("2+2?", "4")["messages"]]
    path = write_jsonl(tmp_path / "b.jsonl", [{"instruction": "1+1?", "output": "2"}])
    assert [m["content"] for m in conversations(path, max_rows=9)[0]] == ["1+1?", "2"]


@pytest.mark.parametrize(
    "row",
    [
        turns("question"),
        turns("question", "answer", "question"),
        {"messages": [{"role": "assistant", "content": "answer"}]},
        turns("question", [{"type": "text", "text": "answer"}]),
        {"messages": [*turns("question")["messages"], {"role": "assistant", "tool_calls": [{"name": "f"}]}]},
    ],
)
def test_d7_no_answer_to_compare_with(tmp_path, row):
    path = write_jsonl(tmp_path / "a.jsonl", [turns("1+1?", "2"), row])
    with pytest.raises(UserError, match=r"a\.jsonl:2: the last two messages must be a question and its answer, text"):
        conversations(path, max_rows=9)
