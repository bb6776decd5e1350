"""Rows of several forms as questions."""

import pytest
from letters import turns, write_jsonl

from torchft.data.prompts import PromptLoader, prompts
from torchft.errors import UserError

ASKED = [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (turns("2+2?", "4"), "4"),
        (turns("2+2?"), ""),
        ({"prompt": "2+2?"}, ""),
        ({"prompt": "2+2?", "answer": "4"}, "4"),
        ({"prompt": "2+2?", "answer": 4}, "4"),
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


def test_a_loader_goes_through_epochs_in_an_order_of_its_seed(tmp_path):
    found = prompts(write_jsonl(tmp_path / "a.jsonl", [{"prompt": str(i)} for i in range(7)]))
    loader = PromptLoader(found, seed=1)
    texts = [p.messages[0]["content"] for p in loader.take(3) + loader.take(11)]
    assert sorted(texts[:7]) == sorted(texts[7:]) == [str(i) for i in range(7)] and texts[:7] != texts[7:]
    again, other = PromptLoader(found, seed=1), PromptLoader(found, seed=2)
    state = loader.state_dict()
    again.load_state_dict(state)
    assert [p.where for p in again.take(5)] == [p.where for p in loader.take(5)]
    assert [p.messages[0]["content"] for p in other.take(7)] != texts[:7]
    for changed in (other, PromptLoader(found[:6], seed=1)):
        with pytest.raises(UserError, match="cannot resume"):
            changed.load_state_dict(state)
