"""Qwen 3.5's own chat format is trl's twin of the released template, which keeps the reasoning of every turn."""

import pytest
from conversations import PLAIN, TOOL_USE, TOOLS, assistant, call, user
from vocabularies import QWEN_MARKUP, QWEN_SPECIAL, pair, template

from torchft.errors import UserError
from torchft.models import qwen3_5
from torchft.tokenizers import load

MORE = {
    "reasoning": [
        user("a"), {**assistant("b"), "reasoning_content": " hm\n"}, user("c"),
        {**assistant("\nd"), "reasoning_content": "y"},
    ],
    "reasoning in the text": [
        user("a"), assistant("<think>\nso\n</think>\n\n b"), user("c"), assistant("<think>x</think>d\n")
    ],
    "calls": [
        user("Weather?"),
        {**call("get_weather", {"city": " Zürich\n2", "days": [1, {"a": None}], "n": 1.5, "x": True, "y": None}),
         "content": "Let me look."},
        {"role": "tool", "content": "21 \n"}, {"role": "tool", "content": "22"}, assistant("warm"), user("and?"),
        {"role": "assistant", "tool_calls": call("now", {})["tool_calls"] * 2, "reasoning_content": "again"},
        {"role": "tool", "content": "x"},
    ],
}  # fmt: skip
TWO = {k: v for k, v in TOOL_USE.items() if k in ("tools only offered", "a call and its result")}
ALL = PLAIN | TWO | MORE


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    named, oracle = pair(
        folder, template("qwen3_5_think"), QWEN_SPECIAL, QWEN_MARKUP, "<|im_end|>", chat_format="qwen3_5"
    )
    return named, oracle, load(folder)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("conversation", ALL)
def test_it_is_the_training_template(conversation, tools, qwen):
    (ours, oracle, _), messages = qwen, ALL[conversation]
    assert ours._chat is qwen3_5.chat
    as_read = [{"content": "", **m} for m in messages]
    twin = oracle.apply_chat_template(
        as_read, chat_template=template("qwen3_5_think_training"), tools=tools, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    got = ours.render(messages, tools=tools)
    assert got.tokens == twin["input_ids"]
    assert got.train == [bool(x) for x in twin["assistant_masks"]]
    for more in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}):
        want = [
            oracle.apply_chat_template(
                rows, chat_template=source, tools=tools, tokenize=True, return_dict=False, **more
            )
            for source, rows in ((template("qwen3_5_think_training"), as_read), (ours.chat_template, messages))
        ]
        assert [ours.render(messages, tools=tools, **more).tokens] * 2 == want


def test_single_questions_are_asked_as_released(qwen):
    ours, oracle, released = qwen
    for more in ({}, {"tools": TOOLS}, {"enable_thinking": False}):
        options = {"add_generation_prompt": True, **more}
        want = oracle.apply_chat_template([user("a")], tokenize=True, return_dict=False, **options)
        assert ours.render([user("a")], **options).tokens == want
    with pytest.raises(UserError, match=r"not prefix-stable.*qwen3_5"):
        released.render(PLAIN["two turns"])


def test_refuses_other_roles(qwen):
    with pytest.raises(UserError, match=r"message 2: Qwen 3\.5's chat format has no role 'ipython'"):
        qwen[0].render(TOOL_USE["ipython"])
